"""The attention seam: one call that every kernel answers alike.

    out = softmax(q k^T / sqrt(d)) v            (Vaswani et al. 2017, equation 1; no causal mask, no dropout)

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.

A kernel is a pure function of its tensors and knows no group. Masked keys have weight exactly zero, and a sample whose
keys are all masked yields zeros, with zero gradients, never NaN.
"""

from typing import Protocol

from torch import Tensor

from framework.kernels.aten import aten_attention
from framework.kernels.config import AttentionConfig, resolve_attention
from framework.kernels.reference import reference_attention


class AttentionKernel(Protocol):
    """`q_bshd` over `k_blhd`, `v_blhd` -> `B S H d`, in q's dtype; `mask_bl` is boolean, True = attend, None = all."""

    def __call__(self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, mask_bl: Tensor | None, /) -> Tensor: ...


def build_attention(config: AttentionConfig) -> AttentionKernel:
    """The kernel that `config` names, with `auto` resolved."""
    match resolve_attention(config).kernel:
        case "aten":
            return aten_attention
        case "reference":
            return reference_attention
        case other:
            raise AssertionError(f"RESOLVED names the kernel {other!r}, which has no arm here")
