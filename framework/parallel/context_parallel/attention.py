"""Self-attention over spacetime tokens that lie on several ranks: Ulysses inside, ring outside (USP, arXiv 2405.07719).

    q, k, v  B s H d  --all-to-all-->  B S h d  --ring-->  out  B S h d  --all-to-all-->  B s H d

One autograd function, so that the order of the exchanges stands written in one place, forward and backward. Under
recompute, what the kernel needs in its backward can be kept from the forward (`Kept`): neither the kernel nor an
exchange is then repeated.

Shapes: `B` samples, `s` tokens of a rank, `S` of a rank of the ring, `H` heads of this tp rank, `h` of this rank,
`d` channels of a head.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from framework.batch import TokenLayout
from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel
from framework.parallel.context_parallel.ring import ring_backward, ring_forward
from framework.parallel.context_parallel.ulysses import gather_tokens_scatter_heads, scatter_tokens_gather_heads

# Puts tensors away until the function that it gives is called, which gives them back.
PutAway = Callable[[tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]


def leave_here(tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Tensors stay where they are."""
    return lambda: tensors


class Kept:
    """One forward's q, k, v, out and lse after the exchange, and the result: kept for its recompute."""

    def __init__(self, put_away: PutAway) -> None:
        self._put_away = put_away
        self._bring: Callable[[], tuple[Tensor, ...]] | None = None

    def put(self, attended: Attended, out_bshd: Tensor) -> None:
        """Of the forward."""
        self._bring = self._put_away((*attended, out_bshd))

    def take(self) -> tuple[Attended, Tensor] | None:
        """Once; None where nothing has been put."""
        if self._bring is None:
            return None
        *attended, out_bshd = self._bring()
        self._bring = None
        return Attended(*attended), out_bshd


class ContextAttention:
    """The self-attention of one block: `(q_bshd, k_bshd, v_bshd, layout) -> B s H d`."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel = kernel
        self.kept: Kept | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, layout: TokenLayout | None) -> Tensor:
        assert layout is not None, "where the tokens lie must be said"
        out: Tensor = Exchanged.apply(q_bshd, k_bshd, v_bshd, layout, self)
        return out

    def keeping(
        self, put_away: PutAway = leave_here
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: what is computed within the first context is found within the second."""
        kept = Kept(put_away)
        return Keeping(self, kept), Keeping(self, kept)


class Keeping(AbstractContextManager[None]):
    """While inside, the block's attention keeps to `kept`, or takes from it."""

    def __init__(self, attention: ContextAttention, kept: Kept) -> None:
        self._attention, self._kept = attention, kept

    def __enter__(self) -> None:
        self._attention.kept = self._kept

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attention.kept = None


class Exchanged(torch.autograd.Function):
    """Exchange, attend, exchange."""

    @staticmethod
    def forward(
        ctx: Any, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, layout: TokenLayout, attention: ContextAttention
    ) -> Tensor:
        kept = attention.kept
        found = None if kept is None else kept.take()
        if found is None:
            found = attend_across(q_bshd, k_bshd, v_bshd, layout, attention.kernel)
            if kept is not None:
                kept.put(*found)
        attended, out_bshd = found
        ctx.save_for_backward(*attended)
        ctx.layout, ctx.kernel, ctx.num_heads = layout, attention.kernel, q_bshd.shape[2]
        return out_bshd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mesh = ctx.layout.mesh
        (dout,) = gather_tokens_scatter_heads((grads[0],), mesh.ulysses)
        attended = Attended(*ctx.saved_tensors)
        gradients = ring_backward(ctx.kernel, dout, attended, ctx.layout.ring_valid, mesh.ring)
        return (*scatter_tokens_gather_heads(gradients, ctx.num_heads, mesh.ulysses), None, None)


def attend_across(
    q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, layout: TokenLayout, kernel: AttentionKernel
) -> tuple[Attended, Tensor]:
    """The forward: what the backward needs, and the result."""
    mesh = layout.mesh
    q, k, v = gather_tokens_scatter_heads((q_bshd, k_bshd, v_bshd), mesh.ulysses)
    out, lse = ring_forward(kernel, q, k, v, layout.ring_valid, mesh.ring)
    (out_bshd,) = scatter_tokens_gather_heads((out,), q_bshd.shape[2], mesh.ulysses)
    return Attended(q, k, v, out, lse), out_bshd


def keep_nothing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: attention is computed, and exchanged, again."""
    return nullcontext(), nullcontext()
