"""Attention as it is written down: every score in memory, in at least float32.

It needs `B H S L` numbers, so it is for small checks and as the measure of every other kernel. With p = exp(s - lse):

    dv = p^T dout,   ds = p (dout v^T - sum_d dout out),   dq = ds k / sqrt(d),   dk = ds^T q / sqrt(d)

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from framework.kernels.attended import Attended


class ReferenceAttention:
    """See `attention.AttentionKernel`."""

    def forward(
        self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores_bhsl = masked_scores(q_bshd, k_blhd, lengths_b)
        lse_bhs = scores_bhsl.logsumexp(dim=-1)
        weights_bhsl = weights(scores_bhsl, lse_bhs)
        out_bshd = einsum(weights_bhsl, v_blhd.to(weights_bhsl.dtype), "b h s l, b l h d -> b s h d")
        return out_bshd.to(q_bshd.dtype), lse_bhs

    def backward(
        self, dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_bshd, k_blhd, v_blhd, out_bshd, lse_bhs = attended
        p_bhsl = weights(masked_scores(q_bshd, k_blhd, lengths_b), lse_bhs)
        dout, q, k, v, out = (x.to(p_bhsl.dtype) for x in (dout_bshd, q_bshd, k_blhd, v_blhd, out_bshd))
        along_bhs1 = rearrange((dout * out).sum(-1), "b s h -> b h s 1")
        ds_bhsl = p_bhsl * (einsum(dout, v, "b s h d, b l h d -> b h s l") - along_bhs1) * q.shape[-1] ** -0.5
        dq = einsum(ds_bhsl, k, "b h s l, b l h d -> b s h d")
        dk = einsum(ds_bhsl, q, "b h s l, b s h d -> b l h d")
        dv = einsum(p_bhsl, dout, "b h s l, b s h d -> b l h d")
        return dq.to(q_bshd.dtype), dk.to(k_blhd.dtype), dv.to(v_blhd.dtype)


def masked_scores(q_bshd: Tensor, k_blhd: Tensor, lengths_b: Tensor | None) -> Tensor:
    """q k^T / sqrt(d), -inf beyond a sample's keys: `B H S L`."""
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)
    scores_bhsl = einsum(q_bshd.to(dtype), k_blhd.to(dtype), "b s h d, b l h d -> b h s l") * q_bshd.shape[-1] ** -0.5
    if lengths_b is None:
        return scores_bhsl
    hidden_bl = torch.arange(k_blhd.shape[1], device=lengths_b.device) >= lengths_b[:, None]
    return scores_bhsl.masked_fill(rearrange(hidden_bl, "b l -> b 1 1 l"), -torch.inf)


def weights(scores_bhsl: Tensor, lse_bhs: Tensor) -> Tensor:
    """exp(s - lse), zero where no key is."""
    return (scores_bhsl - lse_bhs.masked_fill(lse_bhs.isneginf(), 0.0).unsqueeze(-1)).exp()
