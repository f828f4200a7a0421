"""FlashAttention behind the seam: flash-attn 2, 3 or 4, or the copy of 2 that torch brings (arXiv 2307.08691,
2407.08608).

All four are a dense and a packed call in each direction, which differ in names only (`FlashCalls`). Lengths take the
packed one, with the segments of `lengths.py`: no sample is packed and nothing waits for the host. What they cost is a
copy of q, k and v where these aren't contiguous, one pass over out and dout, and a transposed lse.

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head, `T = B S` packed queries.
"""

from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.config import fitting_flash, installed_flash
from framework.kernels.lengths import Segments, clear_empty, mute_empty, pack, padding_apart, unpack

Gradients = tuple[Tensor, Tensor, Tensor]


class FlashCalls(Protocol):
    """One implementation's own calls, scale 1 / sqrt(d), no mask.

    segments: None for `B S H d` and lse `B H S`; else queries are `T H d`, keys `(B L) H d` and lse `H T`.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """out and lse, float32 and to the base e."""
        ...

    def backward(self, dout: Tensor, attended: Attended, segments: Segments | None) -> Gradients:
        """dq, dk, dv; zeros for keys that no query attends to. Everything in `attended` and dout is contiguous, but k
        and v, whose last dimension is.
        """
        ...


class FlashAttention:
    """See `attention.AttentionKernel`."""

    def __init__(self, calls: FlashCalls) -> None:
        self.calls = calls

    def forward(
        self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if lengths_b is None:
            return self.calls.forward(q_bshd, k_blhd, v_blhd, None)
        batch = q_bshd.shape[0]
        segments = padding_apart(lengths_b, q_bshd.shape[1], k_blhd.shape[1])
        out, lse = self.calls.forward(pack(q_bshd), pack(k_blhd), pack(v_blhd), segments)
        return clear_empty(unpack(out, batch), rearrange(lse, "h (b s) -> b h s", b=batch), lengths_b)

    def backward(self, dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None) -> Gradients:
        dout_bshd, attended = mute_empty(dout_bshd, attended, lengths_b)
        q, k, v, out, lse = attended
        if lengths_b is None:
            whole = Attended(q.contiguous(), k, v, out.contiguous(), lse.contiguous())
            return self.calls.backward(dout_bshd.contiguous(), whole, None)
        batch = q.shape[0]
        segments = padding_apart(lengths_b, q.shape[1], k.shape[1])
        lse_ht = rearrange(lse, "b h s -> h (b s)").contiguous()
        q, k, v, out = (pack(x).contiguous() for x in (q, k, v, out))
        packed = Attended(q, k, v, out, lse_ht)
        dq, dk, dv = self.calls.backward(pack(dout_bshd).contiguous(), packed, segments)
        return unpack(dq, batch), unpack(dk, batch), unpack(dv, batch)


class TorchFlash:
    """flash-attn 2 as torch has it: `aten._flash_attention_forward` and `_backward` (attention.cu).

    Its backward is deterministic under `torch.use_deterministic_algorithms`, which `train.deterministic` sets. The
    random state serves dropout alone, so there is none to remember.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *extents(q, k, segments), 0.0, False, False)
        return out, lse

    def backward(self, dout: Tensor, attended: Attended, segments: Segments | None) -> Gradients:
        q, k, v, out, lse = attended
        state, unused = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *extents(q, k, segments), 0.0, False, state, unused
        )
        return dq, dk, dv


def extents(q: Tensor, k: Tensor, segments: Segments | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Offsets and longest lengths, in the order of torch's operators."""
    if segments is None:
        return None, None, q.shape[1], k.shape[1]
    return segments.queries, segments.keys, segments.max_queries, segments.max_keys


def build_flash(*, deterministic: bool) -> FlashAttention:
    """The fastest installed flash-attn for this GPU. Raises ValueError when none runs on it, which is refused earlier
    where the driver's tool tells the GPU's capability.
    """
    from framework.kernels import flash_calls

    installed, capability = installed_flash(), torch.cuda.get_device_capability()
    match fitting_flash(installed, capability, deterministic):
        case None:
            raise ValueError(
                f"attention.kernel=flash: flash-attn {installed} has no backward for compute capability {capability}; "
                "set attention.kernel=aten"
            )
        case 2:
            return FlashAttention(flash_calls.FlashAttn2(deterministic=deterministic))
        case 3:
            return FlashAttention(flash_calls.FlashAttn3(deterministic=deterministic))
        case generation:
            assert generation == 4, generation
            return FlashAttention(flash_calls.FlashAttn4(deterministic=deterministic))
