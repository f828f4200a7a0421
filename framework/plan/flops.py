"""Model FLOPs of a sample: what MFU counts.

A multiplication and an addition are two. Linears and attention count; norms, rotations, softmax and modulation don't,
nor does what recompute repeats. With S tokens, L text and N image tokens, t timesteps, width D, feed-forward width F,
text width C, image width I, sinusoids Q, a block's forward is

    linears     2 S D (4 D  +  2 D  +  2 F)  +  2 (L + N) D 2 D         self-, cross-attention, feed-forward; k and v
    attention   4 D (A + S (L + N))                                      q k^T and p v

with A = S^2, or the pairs of tokens that attend under a pattern (`kernels/pattern.py`). Around the blocks: 2 S D (P +
P_out) for patch embedding and head, 2 L D (C + D) for text, 2 N I (I + D) for image, 2 t D (Q + D + 6 D) for time. The
backward counts as twice the forward (PaLM, arXiv 2204.02311, appendix B), though an attention kernel's does 2.5 times
as much: it computes the scores again.
"""

from dataclasses import dataclass

from framework.models.config import ModelConfig

BACKWARD = 2


@dataclass(frozen=True)
class Flops:
    """Of linears and of attention."""

    linears: int
    attention: int

    @property
    def total(self) -> int:
        return self.linears + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linears + other.linears, self.attention + other.attention)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.linears * times, self.attention * times)


def linear_flops(num_rows: int, in_dim: int, out_dim: int) -> int:
    """A linear on `num_rows` rows, forward."""
    return 2 * num_rows * in_dim * out_dim


def attention_flops(num_pairs: int, width: int) -> int:
    """Attention of all heads together, which are `width` channels wide, forward. num_pairs: of a query and a key."""
    return 4 * num_pairs * width


def block_flops(model: ModelConfig, *, tokens: int, text: int, image: int = 0, pairs: int | None = None) -> Flops:
    """One block's forward for one sample. pairs: of tokens that attend, None = all."""
    width, seen = model.width, text + image
    linears = linear_flops(tokens, width, 6 * width + 2 * model.ffn_dim) + linear_flops(seen, width, 2 * width)
    pairs = tokens**2 if pairs is None else pairs
    return Flops(linears, attention_flops(pairs + tokens * seen, width))


def forward_flops(
    model: ModelConfig, *, tokens: int, text: int, image: int = 0, timesteps: int = 1, pairs: int | None = None
) -> Flops:
    """The model's forward for one sample. pairs: of tokens that attend, None = all."""
    width, image_dim = model.width, model.image_dim or 0
    around = (
        linear_flops(tokens, width, model.in_patch_dim + model.out_patch_dim)
        + linear_flops(text, width, model.text_dim + width)
        + linear_flops(image, image_dim, image_dim + width)
        + linear_flops(timesteps, width, model.freq_dim + 7 * width)
    )
    block = block_flops(model, tokens=tokens, text=text, image=image, pairs=pairs)
    return block * model.num_layers + Flops(around, 0)


def step_flops(
    model: ModelConfig, *, tokens: int, text: int, image: int = 0, timesteps: int = 1, pairs: int | None = None
) -> Flops:
    """Forward and backward of one sample. pairs: of tokens that attend, None = all."""
    forward = forward_flops(model, tokens=tokens, text=text, image=image, timesteps=timesteps, pairs=pairs)
    return forward * (1 + BACKWARD)
