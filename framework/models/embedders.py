"""What the model is told: the time, the text and, in image-to-video, the image.

A timestep tau (0 = clean, 1000 = noise) becomes sinusoids (Ho et al. 2020, arXiv 2006.11239, cosines first),

    e_j = cos(tau w_j), e_(F/2 + j) = sin(tau w_j),      w_j = 10000^(-j / (F/2)),  F = freq_dim

then two linears give `temb` (for the head) and a third the six vectors that modulate every block. All of it is
computed in at least float32: bf16 holds no odd integer above 256, so sinusoids of timesteps have no meaning in it.

Shapes: `B` samples, `t` timesteps of a sample, `L` text tokens, `N` image tokens, `D` width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from framework.models.config import ModelConfig
from framework.models.layers import FeedForward, LayerNorm, PreciseLinear

MAX_PERIOD = 10000.0


def sinusoids(timesteps_bt: Tensor, freq_dim: int, dtype: torch.dtype) -> Tensor:
    """`B t` -> `B t freq_dim`, computed in `dtype`."""
    half = freq_dim // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=dtype, device=timesteps_bt.device) / half
    angles_btf = timesteps_bt.to(dtype)[..., None] * exponents.exp()
    return torch.cat((angles_btf.cos(), angles_btf.sin()), dim=-1)


class TimeEmbedder(nn.Module):
    """Two linears with a SiLU between: sinusoids `B t F` -> `temb` `B t D`."""

    def __init__(self, freq_dim: int, width: int) -> None:
        super().__init__()
        self.linear_1 = PreciseLinear(freq_dim, width)
        self.linear_2 = PreciseLinear(width, width)

    def forward(self, sinusoids_btf: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(sinusoids_btf)))
        return out


class TextEmbedder(nn.Module):
    """Two linears with a gelu (tanh form) between: the caption encoder's `B L text_dim` -> `B L D`."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text_blc: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(text_blc), approximate="tanh"))
        return out


class ImageEmbedder(nn.Module):
    """Learned position (if configured), norm, feed-forward, norm: the image encoder's `B N image_dim` -> `B N D`."""

    def __init__(self, image_dim: int, width: int, num_positions: int | None) -> None:
        super().__init__()
        self.norm1 = LayerNorm(image_dim)
        self.ff = FeedForward((image_dim, image_dim, width), approximate="none")
        self.norm2 = LayerNorm(width)
        self.pos_embed = None if num_positions is None else nn.Parameter(torch.empty(1, num_positions, image_dim))

    def forward(self, image_bnc: Tensor) -> Tensor:
        dtype = image_bnc.dtype
        if self.pos_embed is not None:
            image_bnc = image_bnc + self.pos_embed
        hidden_bnd = self.ff(self.norm1(image_bnc).to(dtype))
        out: Tensor = self.norm2(hidden_bnd).to(dtype)
        return out


class ConditionEmbedder(nn.Module):
    """Time, text and image to the model's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TimeEmbedder(config.freq_dim, config.width)
        self.time_proj = PreciseLinear(config.width, 6 * config.width)
        self.text_embedder = TextEmbedder(config.text_dim, config.width)
        self.image_embedder = (
            None
            if config.image_dim is None
            else ImageEmbedder(config.image_dim, config.width, config.pos_embed_seq_len)
        )

    def forward(
        self, timesteps_bt: Tensor, text_blc: Tensor, image_bnc: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`temb` `B t D` and modulation `B t 6 D` in `dtype`, text `B L D` and image `B N D` in their own dtype.

        ValueError unless there is an image exactly when the model has `image_dim`.
        """
        if (image_bnc is None) != (self.image_embedder is None):
            raise ValueError(
                "image tokens are given exactly if the model has image_dim: "
                f"got {'no ' if image_bnc is None else ''}image tokens for a model with"
                f"{'out' if self.image_embedder is None else ''} image_dim"
            )
        temb_btd = self.time_embedder(sinusoids(timesteps_bt, self.freq_dim, dtype))
        modulation_bt6d = rearrange(self.time_proj(F.silu(temb_btd)), "b t (six d) -> b t six d", six=6)
        image_bnd = None if self.image_embedder is None else self.image_embedder(image_bnc)
        return temb_btd, modulation_bt6d, self.text_embedder(text_blc), image_bnd
