"""Which tokens a rank holds: equal contiguous parts over the replica, in rank order, padded once at the tail.

    part = ceil(S / (ring ulysses tp)),   rank r holds tokens [r part, (r + 1) part),   S and above are padding

No token count is refused, and a rank may hold padding only. As tp and ulysses are inner axes of the rank grid, what
they gather is contiguous too, and padding stays at the tail of it.

Shapes: `B` samples, `S` tokens, `s` tokens of a rank.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from framework.batch import TokenLayout, Tokens
from framework.kernels.config import PatternConfig
from framework.kernels.pattern import EVERY_TOKEN, TokenPattern
from framework.parallel.collectives import all_gather_tokens
from framework.parallel.mesh import Group, Mesh


def token_layout(num_tokens: int, mesh: Mesh, pattern: TokenPattern = EVERY_TOKEN) -> TokenLayout:
    """The parts of `num_tokens` tokens on the replica of `mesh`."""
    part = -(-num_tokens // mesh.replica.size)
    valid = tuple(max(0, min(part, num_tokens - rank * part)) for rank in range(mesh.replica.size))
    return TokenLayout(valid, mesh.replica.index, mesh, pattern)


def split_tokens(tokens: Tokens, mesh: Mesh, pattern: PatternConfig) -> Tokens:
    """This rank's part of the tokens of a micro-batch: every `B S ...` becomes `B s ...`; positions, which attention
    needs, those of all tp ranks: `B (tp s) 3`. pattern: which tokens attend to each other.
    """
    layout = token_layout(tokens.patches.shape[1], mesh, replace(tokens.layout.pattern, config=pattern))

    def part(x: Tensor, group: Group = mesh.replica) -> Tensor:
        size = -(-x.shape[1] // mesh.replica.size) * (mesh.replica.size // group.size)
        mine = x[:, group.index * size : (group.index + 1) * size]
        missing = size - mine.shape[1]
        return F.pad(mine, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else mine

    return replace(
        tokens,
        patches=part(tokens.patches),
        target=None if tokens.target is None else part(tokens.target),
        positions=part(tokens.positions, mesh.cp),
        frame_index=part(tokens.frame_index),
        layout=layout,
    )


def join_tokens(x_bsq: Tensor, layout: TokenLayout) -> Tensor:
    """All tokens of the sample on every rank of the replica, without padding and without gradient: for sampling."""
    return all_gather_tokens(x_bsq, layout.mesh.replica, "join_tokens")[:, : sum(layout.valid)]
