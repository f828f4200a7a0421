"""Ulysses: all tokens of some heads instead of some tokens of all heads (DeepSpeed-Ulysses, arXiv 2309.14509).

    B s H d  <->  B (u s) h d,     h = this rank's heads of H, which u needn't divide: sizes differ by at most one

Several tensors of one shape travel in one all-to-all: q, k and v one way, the result the other, so with their
transposes in the backward a layer has four.

Shapes: `B` samples, `s` tokens of a rank, `H` heads, `h` of them, `d` channels of a head, `u` ranks, `n` tensors.
"""

import torch
from einops import rearrange
from torch import Tensor

from framework.parallel.collectives import all_to_all
from framework.parallel.mesh import Group
from framework.shapes import even_parts


def gather_tokens_scatter_heads(tensors: tuple[Tensor, ...], group: Group) -> tuple[Tensor, ...]:
    """Each `B s H d` -> `B (u s) h d`."""
    if group.size == 1:
        return tensors
    batch, tokens, num_heads, head_dim = tensors[0].shape
    heads = even_parts(num_heads, group.size)
    one = len(tensors) * batch * tokens * head_dim
    flat = tensors[0].new_empty(one * num_heads)
    by_rank = zip(*(x.split(heads, dim=2) for x in tensors), strict=True)
    for h, place, parts in zip(heads, flat.split([one * h for h in heads]), by_rank, strict=True):
        for part_bshd, part in zip(place.view(-1, batch, tokens, h, head_dim), parts, strict=True):
            part_bshd.copy_(part)
    got = all_to_all(
        flat, [one * h for h in heads], [one * heads[group.index]] * group.size, group, "gather_tokens_scatter_heads"
    )
    parts_unbshd = got.view(group.size, len(tensors), batch, tokens, heads[group.index], head_dim)
    return rearrange(parts_unbshd, "u n b s h d -> n b (u s) h d").unbind(0)


def scatter_tokens_gather_heads(tensors: tuple[Tensor, ...], num_heads: int, group: Group) -> tuple[Tensor, ...]:
    """Each `B (u s) h d` -> `B s H d`, H = num_heads."""
    if group.size == 1:
        return tensors
    batch, tokens, mine, head_dim = tensors[0].shape
    part = tokens // group.size
    heads = even_parts(num_heads, group.size)
    flat = torch.stack([rearrange(x, "b (u s) h d -> u b s h d", u=group.size) for x in tensors], dim=1).flatten()
    one = len(tensors) * batch * part * head_dim
    got = all_to_all(flat, [one * mine] * group.size, [one * h for h in heads], group, "scatter_tokens_gather_heads")
    parts = [
        piece.view(len(tensors), batch, part, h, head_dim)
        for piece, h in zip(got.split([one * h for h in heads]), heads, strict=True)
    ]
    return torch.cat(parts, dim=3).unbind(0)
