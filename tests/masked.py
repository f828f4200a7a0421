"""Attention by a dense mask: what every pattern is compared with. One line of Python for each pattern, no spans."""

import torch
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel
from framework.kernels.config import BlockCausalConfig, PatternConfig, WindowConfig

FULL = PatternConfig()


def causal(frames: int) -> PatternConfig:
    return PatternConfig("block_causal", block_causal=BlockCausalConfig(frames))


def window(frames: int, sinks: int) -> PatternConfig:
    return PatternConfig("window", window=WindowConfig(frames, sinks))


PATTERNS = (
    FULL,
    causal(1),
    causal(3),
    window(0, 0),
    window(1, 0),
    window(1, 1),
    window(2, 3),
    window(0, 2),
    window(9, 1),
)


def name_of(pattern: PatternConfig) -> str:
    match pattern.name:
        case "block_causal":
            assert pattern.block_causal is not None
            return f"causal{pattern.block_causal.frames}"
        case "window":
            assert pattern.window is not None
            return f"window{pattern.window.frames}+{pattern.window.sinks}"
    return "full"


def sees(pattern: PatternConfig, query: int, key: int) -> bool:
    """Whether a token of frame `query` attends to one of frame `key`."""
    if pattern.block_causal is not None:
        return key // pattern.block_causal.frames <= query // pattern.block_causal.frames
    if pattern.window is not None:
        return abs(query - key) <= pattern.window.frames or key < pattern.window.sinks
    return True


def mask_of(pattern: PatternConfig, frames: int, frame_tokens: int) -> Tensor:
    """`S S` bool: token by token."""
    frame = [token // frame_tokens for token in range(frames * frame_tokens)]
    by_frame = torch.tensor([[sees(pattern, query, key) for key in range(frames)] for query in range(frames)])
    return by_frame[frame][:, frame]


def masked_attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, mask_ss: Tensor) -> Tensor:
    """A softmax over the scores that the mask leaves."""
    scores = torch.einsum("bshd,blhd->bhsl", q_bshd, k_bshd) / q_bshd.shape[-1] ** 0.5
    return torch.einsum("bhsl,blhd->bshd", scores.masked_fill(~mask_ss, -torch.inf).softmax(-1), v_bshd)


class CountingKernel:
    """A kernel that counts the pairs of a query and a key, of all samples and heads, that it is asked for."""

    def __init__(self, inner: AttentionKernel) -> None:
        self._inner = inner
        self.forwards = self.backwards = 0

    def forward(
        self, q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.forwards += pairs(q_bshd, k_blhd)
        return self._inner.forward(q_bshd, k_blhd, v_blhd, lengths_b)

    def backward(
        self, dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.backwards += pairs(dout_bshd, attended.k_blhd)
        return self._inner.backward(dout_bshd, attended, lengths_b)


def pairs(q_bshd: Tensor, k_blhd: Tensor) -> int:
    batch, queries, heads, _ = q_bshd.shape
    return batch * queries * heads * k_blhd.shape[1]
