"""Attention by torch's own kernels, whatever the device and dtype:

    CPU                      `_scaled_dot_product_flash_attention_for_cpu`
    CUDA, bfloat16, float16  flash-attn 2 as torch brings it (flash.py)
    CUDA, float32            memory-efficient attention (arXiv 2112.05682); lengths are a mask added to the scores

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.flash import FlashAttention, TorchFlash
from framework.kernels.lengths import clear_empty, length_mask, mute_empty

Gradients = tuple[Tensor, Tensor, Tensor]

# Elements that rows of the memory-efficient kernel's lse and of its mask take (kernel_forward.h, kAlignLSE;
# attention.cpp, pad_bias).
LSE_MULTIPLE = 32
MASK_MULTIPLE = 16


class AtenAttention:
    """See `attention.AttentionKernel`."""

    def __init__(self) -> None:
        self._flash = FlashAttention(TorchFlash())

    def forward(
        self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not q_bshd.is_cuda:
            return cpu_forward(q_bshd, k_blhd, v_blhd, lengths_b)
        if q_bshd.dtype == torch.float32:
            return efficient_forward(q_bshd, k_blhd, v_blhd, lengths_b)
        return self._flash.forward(q_bshd, k_blhd, v_blhd, lengths_b)

    def backward(self, dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None) -> Gradients:
        if not dout_bshd.is_cuda:
            return cpu_backward(dout_bshd, attended, lengths_b)
        if dout_bshd.dtype == torch.float32:
            return efficient_backward(dout_bshd, attended, lengths_b)
        return self._flash.backward(dout_bshd, attended, lengths_b)


def cpu_forward(q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """out `B S H d`, lse `B H S`."""
    q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_blhd, v_blhd))
    mask = length_mask(lengths_b, k.shape[2], q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    return clear_empty(out.transpose(1, 2), lse, lengths_b)


def cpu_backward(dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None) -> Gradients:
    """dq, dk, dv."""
    dout_bshd, attended = mute_empty(dout_bshd, attended, lengths_b)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_bshd, *attended[:4]))
    mask = length_mask(lengths_b, k.shape[2], q.dtype)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, attended.lse_bhs, 0.0, False, attn_mask=mask
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def efficient_forward(
    q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out `B S H d`, lse `B H S`."""
    q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_blhd, v_blhd))
    mask = expanded_mask(q, k, lengths_b)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
    return clear_empty(out.transpose(1, 2), lse[..., : q.shape[2]], lengths_b)


def efficient_backward(dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None) -> Gradients:
    """dq, dk, dv."""
    dout_bshd, attended = mute_empty(dout_bshd, attended, lengths_b)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_bshd, *attended[:4]))
    mask = expanded_mask(q, k, lengths_b)
    # The padding of a row is what the forward leaves there: exp(s - inf) = 0.
    lse = F.pad(attended.lse_bhs, (0, -q.shape[2] % LSE_MULTIPLE), value=torch.inf).contiguous()
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's random state
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, mask, out, lse, unused, unused, 0.0, [True, True, True, False]
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def expanded_mask(q_bhsd: Tensor, k_bhld: Tensor, lengths_b: Tensor | None) -> Tensor | None:
    """The mask as `B H S L`, without storage for it."""
    mask = length_mask(lengths_b, k_bhld.shape[2], q_bhsd.dtype, multiple=MASK_MULTIPLE)
    return None if mask is None else mask.expand(-1, q_bhsd.shape[1], q_bhsd.shape[2], -1)
