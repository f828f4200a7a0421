"""Attention by cuDNN, through torch's operators (attention.cu, MHA.cpp).

Lengths are a mask of `B 1 1 L` that is added to the scores; the operators spread it over heads and queries, and its
gradient isn't asked for. They return softmax statistics `B H S` or `B H S 1`, depending on torch's release, and take
back what they gave.

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.lengths import clear_empty, length_mask, mute_empty

# cuDNN refuses a single key. A second one, hidden, changes nothing.
MIN_KEYS = 2


class CudnnAttention:
    """See `attention.AttentionKernel`."""

    def __init__(self) -> None:
        self._stats_dim = 3

    def forward(
        self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k_blhd, v_blhd, mask = with_enough_keys(k_blhd, v_blhd, lengths_b)
        q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_blhd, v_blhd))
        out, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, False, False)
        self._stats_dim = stats.dim()
        return clear_empty(out.transpose(1, 2), stats.view(q.shape[:3]), lengths_b)

    def backward(
        self, dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout_bshd, attended = mute_empty(dout_bshd, attended, lengths_b)
        q_bshd, k_blhd, v_blhd, out_bshd, lse_bhs = attended
        num_keys = k_blhd.shape[1]
        k_blhd, v_blhd, mask = with_enough_keys(k_blhd, v_blhd, lengths_b)
        # cuDNN wants the layout of out in dout, which comes as it likes.
        tensors = (dout_bshd.contiguous(), q_bshd, k_blhd, v_blhd, out_bshd.contiguous())
        dout, q, k, v, out = (x.transpose(1, 2) for x in tensors)
        stats = lse_bhs.contiguous() if self._stats_dim == 3 else lse_bhs.contiguous().unsqueeze(-1)
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's random state
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, stats, unused, unused, mask, None, None, q.shape[2], k.shape[2], 0.0, False
        )
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk[:, :num_keys], dv[:, :num_keys]


def with_enough_keys(k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and v of at least `MIN_KEYS` keys, and the mask `B 1 1 L`."""
    missing = MIN_KEYS - k_blhd.shape[1]
    if missing > 0:
        if lengths_b is None:
            lengths_b = torch.full((k_blhd.shape[0],), k_blhd.shape[1], device=k_blhd.device)
        k_blhd, v_blhd = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k_blhd, v_blhd))
    return k_blhd, v_blhd, length_mask(lengths_b, k_blhd.shape[1], k_blhd.dtype)
