"""Linears and norms whose weights are split over tp, with tokens split between them (Megatron's tensor and sequence
parallelism, arXiv 1909.08053 and 2205.05198).

    column   y = x W + b, this rank's columns of W and b; x holds all tokens of the group     -> this rank's columns
    row      y = sum over tp of x W, this rank's rows of W; x holds its columns; + b          -> this rank's tokens
    norm     x / sqrt(mean(x^2) + eps) * w over all columns, of which this rank holds some

A column linear is `nn.Linear` of fewer columns. The bias of a row linear is added by the first rank before the sum.

The norm's mean is over all D columns, so the sum of squares crosses tp, and so does the sum in its gradient:

    r = 1 / sqrt(sum_tp sum x^2 / D + eps)          y = x r w
    dx = r (g - x r^2 sum_tp sum(g x) / D),  g = dy w          dw = sum over tokens of dy x r

w's columns are this rank's own and see every token of the group: dw isn't summed over tp.

Shapes: `B` samples, `S` tokens, `D` columns of the whole tensor, `D/tp` of this rank's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.parallel.collectives import scatter_tokens, sum_gradient, summed
from framework.parallel.mesh import Group


class RowLinear(nn.Linear):
    """`B (tp s) D/tp` -> `B s out`, where D/tp are this rank's columns and s its tokens."""

    def __init__(self, in_features: int, out_features: int, group: Group) -> None:
        super().__init__(in_features, out_features)
        self.group = group
        self.share = 1.0 if group.index == 0 else 0.0

    def forward(self, input: Tensor) -> Tensor:
        return scatter_tokens(self.product(input), self.group)

    def product(self, input: Tensor) -> Tensor:
        """This rank's summand of the group's tokens, `B (tp s) out`."""
        bias = sum_gradient(self.bias, self.group) * self.share
        return F.linear(input, self.weight, bias)


class SplitRMSNorm(nn.Module):
    """The norm of the docstring over `dim` columns in all: `B S D/tp` -> `B S D/tp`, in x's dtype."""

    upcasts = True

    def __init__(self, columns: int, dim: int, eps: float, group: Group) -> None:
        super().__init__()
        self.dim, self.eps, self.group = dim, eps, group
        self.weight = nn.Parameter(torch.empty(columns))

    def forward(self, x_bsd: Tensor) -> Tensor:
        out: Tensor = NormAcross.apply(x_bsd, self.weight, self.dim, self.eps, self.group)
        return out.to(x_bsd.dtype)


class NormAcross(torch.autograd.Function):
    """The equations of the docstring, in at least float32, which is also what comes out.

    What the forward returns is a fresh tensor: where its last act is in place, or a cast to the dtype that is there
    already, torch 2.11's compiler loses the gradient, without a word.
    """

    @staticmethod
    def forward(ctx: Any, x_bsd: Tensor, weight: Tensor, dim: int, eps: float, group: Group) -> Tensor:
        dtype = torch.promote_types(x_bsd.dtype, torch.float32)
        x = x_bsd.to(dtype)
        squares = torch.linalg.vecdot(x, x).unsqueeze(-1)
        r_bs1 = torch.rsqrt(summed(squares, group, "qk_norm") / dim + eps)
        ctx.save_for_backward(x_bsd, weight, r_bs1)
        ctx.dim, ctx.group = dim, group
        return x * r_bs1 * weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_bsd, weight, r_bs1 = ctx.saved_tensors
        dtype = r_bs1.dtype
        w, dy = weight.to(dtype), grads[0].to(dtype)
        normed = x_bsd.to(dtype) * r_bs1
        along_bsd = dy * normed
        # Not an einsum: that becomes a matrix product of D pairs of columns, 8 times slower.
        dw = along_bsd.sum(dim=(0, 1))
        along_bs1 = summed((along_bsd @ w).unsqueeze(-1), ctx.group, "qk_norm") / ctx.dim
        dx = (dy * w).sub_(normed.mul_(along_bs1)).mul_(r_bs1)
        return dx.to(x_bsd.dtype), dw.to(weight.dtype), None, None, None
