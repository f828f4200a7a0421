"""Attention by torch's built-in flash kernels.

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.
"""

import torch
from einops import rearrange
from torch import Tensor

from framework.kernels.attended import Attended


class AtenAttention:
    """The kernel of the CPU; see `attention.AttentionKernel`."""

    def forward(
        self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_blhd, v_blhd))
        mask = length_mask(lengths_b, k.shape[2], q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
        if lengths_b is not None:
            empty_b111 = rearrange(lengths_b == 0, "b -> b 1 1 1")
            out, lse = out.masked_fill(empty_b111, 0.0), lse.masked_fill(empty_b111[..., 0], -torch.inf)
        return out.transpose(1, 2), lse

    def backward(
        self, dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_bshd, k_blhd, v_blhd, out_bshd, lse_bhs = attended
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_bshd, q_bshd, k_blhd, v_blhd, out_bshd))
        mask = length_mask(lengths_b, k.shape[2], q.dtype)
        if lengths_b is not None:
            empty_b111 = rearrange(lengths_b == 0, "b -> b 1 1 1")
            dout, lse_bhs = dout.masked_fill(empty_b111, 0.0), lse_bhs.masked_fill(empty_b111[..., 0], torch.inf)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse_bhs, 0.0, False, attn_mask=mask
        )
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk, dv


def length_mask(lengths_b: Tensor | None, num_keys: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores: `B 1 1 L`. A sample without a key attends to all; its result is thrown away."""
    if lengths_b is None:
        return None
    hidden_bl = torch.arange(num_keys, device=lengths_b.device) >= lengths_b[:, None]
    hidden_bl &= (lengths_b > 0)[:, None]
    mask_bl = torch.zeros(hidden_bl.shape, dtype=dtype, device=lengths_b.device).masked_fill(hidden_bl, -torch.inf)
    return rearrange(mask_bl, "b l -> b 1 1 l")
