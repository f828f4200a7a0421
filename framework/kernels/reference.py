"""Attention as it is written down: every score in memory, in at least float32.

It needs `B H S L` numbers, so it is for small checks and as the measure of every other kernel.
Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor


def reference_attention(q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, mask_bl: Tensor | None, /) -> Tensor:
    """softmax(q k^T / sqrt(d)) v -> `B S H d`; see `attention.AttentionKernel`."""
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q_bshd, k_blhd, v_blhd))
    scores_bhsl = einsum(q, k, "b s h d, b l h d -> b h s l") * q.shape[-1] ** -0.5
    if mask_bl is None:
        weights_bhsl = scores_bhsl.softmax(dim=-1)
    else:
        # The most negative finite number instead of -inf: a row with no key is then uniform, not 0/0, until the second
        # fill makes it zero. In a row with a key, exp() of a masked score is exactly zero either way.
        hidden_b11l = rearrange(~mask_bl, "b l -> b 1 1 l")
        lowest = torch.finfo(dtype).min
        weights_bhsl = scores_bhsl.masked_fill(hidden_b11l, lowest).softmax(dim=-1).masked_fill(hidden_b11l, 0.0)
    return einsum(weights_bhsl, v, "b h s l, b l h d -> b s h d").to(q_bshd.dtype)
