"""What every video tokenizer is, and the one place that builds them.

A tokenizer maps pixels to latents and back. The framework needs its strides (for shapes), its channels, the
normalisation of its latents, and a version that shards of latents carry:

    latents = (raw - latent_mean) / latent_scale             raw = latents * latent_scale + latent_mean

Shapes: b clips, c channels (3 for pixels), t h w frames, rows and columns; pixels lie in [-1, 1].
"""

from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from framework.shapes import Strides
from framework.tokenizer.config import DctConfig, TokenizerConfig, WanConfig
from framework.tokenizer.dct import DctTokenizer


class Tokenizer(Protocol):
    """A video tokenizer.

    strides: in time and space, causal or not. channels: of the latents. version: tokenizer_version of its config.
    latent_mean, latent_scale: `c` float32, the normalisation that `encode` applies and `decode` removes.
    """

    strides: Strides
    channels: int
    version: str
    latent_mean: Tensor
    latent_scale: Tensor

    def encode(self, video_bcthw: Tensor, *, first: bool = True) -> Tensor:
        """Pixels in [-1, 1] to normalised latents `b c t h w`, on the device of the pixels, in float32 or wider.

        first: whether this piece starts with the clip's first frame. A causal tokenizer takes a long clip piece by
        piece: 1 + st k frames first, then st k frames with first=False, and gives bitwise what the whole gives; or it
        raises ValueError at first=False. Raises ValueError with the nearest shapes that work, when the strides don't
        divide the clip.
        """
        ...

    def decode(self, latents_bcthw: Tensor, *, first: bool = True) -> Tensor:
        """Normalised latents to pixels `b 3 t h w`, not clamped; `first` as in encode."""
        ...


class PixelEncoder(Protocol):
    """The part of a tokenizer that encodes whole clips."""

    def encode(self, video_bcthw: Tensor) -> Tensor:
        """Pixels in [-1, 1] to normalised latents `b c t h w`."""
        ...


def encode_frames(frames_bthwc: Tensor, tokenizer: PixelEncoder) -> Tensor:
    """Decoded frames `b t h w 3` uint8 -> normalised latents `b c t h w`."""
    return tokenizer.encode(rearrange(frames_bthwc, "b t h w c -> b c t h w").to(torch.float32) / 127.5 - 1)


def build_tokenizer(config: TokenizerConfig, device: torch.device | str = "cpu") -> Tokenizer:
    """The tokenizer that the recipe names. device: where one with weights keeps them and computes.

    Raises ValueError, with what to do, where weights or packages are missing. Never reads anything from a network.
    """
    match config.name:
        case "dct":
            return DctTokenizer(config.dct or DctConfig())
        case "wan":
            from framework.tokenizer.wan import WanTokenizer

            return WanTokenizer(config.wan or WanConfig(), device)
        case "latents":
            raise ValueError(
                "tokenizer.name=latents knows the shape of latents that were made elsewhere, and can neither encode "
                "nor decode pixels: train on shards of latents, without samples, or choose tokenizer.name=dct or wan"
            )
