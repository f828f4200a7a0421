"""The attention seam: a pair of calls that every kernel answers alike.

    out = softmax(q k^T / sqrt(d)) v,   lse = log sum exp(q k^T / sqrt(d))      (Vaswani et al. 2017, equation 1)

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.

A kernel is a pure function of its tensors and knows no group. It is a pair, since a ring of ranks calls the backward of
a block of keys with the output and log-sum-exp over all keys.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from framework.kernels.aten import AtenAttention
from framework.kernels.attended import Attended
from framework.kernels.config import AttentionConfig
from framework.kernels.cudnn import CudnnAttention
from framework.kernels.flash import build_flash
from framework.kernels.pattern import TokenPattern, reaches
from framework.kernels.reference import ReferenceAttention


class AttentionKernel(Protocol):
    """Keys beyond a sample's length have weight exactly zero; a sample without a key gives zeros, and zero gradients.

    lengths_b: int64, the number of leading keys that a sample attends to; None = all.
    """

    def forward(
        self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out `B S H d` in q's dtype, and lse `B H S` in at least float32."""
        ...

    def backward(
        self, dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of these keys."""
        ...


class Attend(torch.autograd.Function):
    """A kernel's pair as one differentiable call."""

    @staticmethod
    def forward(
        ctx: Any, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None, kernel: AttentionKernel
    ) -> Tensor:
        out_bshd, lse_bhs = kernel.forward(q_bshd, k_blhd, v_blhd, lengths_b)
        ctx.save_for_backward(q_bshd, k_blhd, v_blhd, out_bshd, lse_bhs, lengths_b)
        ctx.kernel = kernel
        return out_bshd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *attended, lengths_b = ctx.saved_tensors
        return (*ctx.kernel.backward(grads[0], Attended(*attended), lengths_b), None, None)


def attend(kernel: AttentionKernel, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None) -> Tensor:
    """Attention among tensors that are all here: `B S H d`, differentiable."""
    out: Tensor = Attend.apply(q_bshd, k_blhd, v_blhd, lengths_b, kernel)
    return out


def attend_within(
    kernel: AttentionKernel, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, pattern: TokenPattern
) -> Tensor:
    """Attention among the tokens of whole clips by a pattern: `B S H d`, differentiable."""
    num_tokens = q_bshd.shape[1]
    outs = []
    for reach in reaches(pattern, num_tokens, (0, num_tokens)):
        k, v = (torch.cat([x[:, start:stop] for start, stop in reach.keys], 1) for x in (k_bshd, v_bshd))
        outs.append(attend(kernel, q_bshd[:, slice(*reach.queries)], k, v, None))
    return torch.cat(outs, 1)


def build_attention(config: AttentionConfig, *, deterministic: bool = False) -> AttentionKernel:
    """The kernel that `config` names; `auto` must be resolved. deterministic: a backward that sums in a fixed order,
    by a kernel that has one (`check_attention`).
    """
    match config.kernel:
        case "flash":
            return build_flash(deterministic=deterministic)
        case "cudnn":
            return CudnnAttention()
        case "aten":
            return AtenAttention()
        case "reference":
            return ReferenceAttention()
        case other:
            raise AssertionError(f"the kernel {other!r} has no arm here: auto is resolved where a run starts")
