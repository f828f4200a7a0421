"""The calls of flash-attn 2, 3 and 4 (github.com/Dao-AILab/flash-attention), as their own autograd functions make them.

Their public functions hide the backward, which a ring must call by itself. So these are the functions below those:

    2  flash_attn.flash_attn_interface   from 2.7      a dense and a packed function each
    3  flash_attn_interface              from 3.0      one function, packed where offsets are given
    4  flash_attn.cute.interface         from 4.0.0b36 likewise

All return lse as float32, `B H S` or packed `H T`. Dropout, masks, windows and soft capping are off.
"""

from typing import Any

import torch
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.lengths import Segments

Gradients = tuple[Tensor, Tensor, Tensor]


class FlashAttn2:
    """See `flash.FlashCalls`. deterministic: dq is summed in a fixed order, which takes time and memory."""

    def __init__(self, *, deterministic: bool) -> None:
        from flash_attn import flash_attn_interface

        self._package: Any = flash_attn_interface
        self._deterministic = deterministic

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        call = self._package._flash_attn_forward if segments is None else self._package._flash_attn_varlen_forward
        out, lse, *_ = call(q, k, v, return_softmax=False, **offsets(segments), **plain(q))
        return out, lse

    def backward(self, dout: Tensor, attended: Attended, segments: Segments | None) -> Gradients:
        q, k, v, out, lse = attended
        gradients = empty_gradients(attended)
        call = self._package._flash_attn_backward if segments is None else self._package._flash_attn_varlen_backward
        call(dout, q, k, v, out, lse, *gradients, deterministic=self._deterministic, **offsets(segments), **plain(q))
        return gradients


class FlashAttn3:
    """See `flash.FlashCalls`."""

    def __init__(self, *, deterministic: bool) -> None:
        import flash_attn_interface

        self._package: Any = flash_attn_interface
        self._deterministic = deterministic

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._package._flash_attn_forward(
            q, k, v, softmax_scale=q.shape[-1] ** -0.5, **offsets(segments)
        )
        return out, lse

    def backward(self, dout: Tensor, attended: Attended, segments: Segments | None) -> Gradients:
        q, k, v, out, lse = attended
        dq, dk, dv = empty_gradients(attended)
        self._package._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=q.shape[-1] ** -0.5,
            deterministic=self._deterministic,
            **offsets(segments),
        )
        return dq, dk, dv


class FlashAttn4:
    """See `flash.FlashCalls`. It compiles a kernel at the first call with a head dimension or dtype (seconds).

    2 and 3 are operators that torch.compile takes as they are; 4 is Python that it must not look into.
    """

    def __init__(self, *, deterministic: bool) -> None:
        from flash_attn.cute import interface

        self._package: Any = interface
        self._deterministic = deterministic

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._package._flash_attn_fwd(
            q, k, v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True, **offsets(segments)
        )
        return out, lse

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(self, dout: Tensor, attended: Attended, segments: Segments | None) -> Gradients:
        q, k, v, out, lse = attended
        dq, dk, dv = self._package._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=q.shape[-1] ** -0.5,
            deterministic=self._deterministic,
            **offsets(segments),
        )
        return dq, dk, dv


def offsets(segments: Segments | None) -> dict[str, Tensor | int]:
    """The segments, by the names that all three give them; nothing for a dense call."""
    if segments is None:
        return {}
    return {
        "cu_seqlens_q": segments.queries,
        "cu_seqlens_k": segments.keys,
        "max_seqlen_q": segments.max_queries,
        "max_seqlen_k": segments.max_keys,
    }


def plain(q: Tensor) -> dict[str, float | bool | int | None]:
    """What flash-attn 2 wants to be told: the scale, and that all else is off."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def empty_gradients(attended: Attended) -> Gradients:
    """What the kernel writes dq, dk and dv into."""
    q, k, v = attended[:3]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
