"""Which video tokenizer turns pixels into latents."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from framework.shapes import Strides


@dataclass(frozen=True)
class DctConfig:
    """The tokenizer without weights.

    coefficients: latent channels kept of the 768 of a 4x8x8 block (1..768). scale: what latents are divided by, in
    units of pixels of [-1, 1]; decay: how fast that scale falls with frequency (the law is in tokenizer/dct.py).
    """

    coefficients: int = 48
    scale: float = 0.5
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.coefficients <= 768:
            raise ValueError(f"tokenizer.dct.coefficients={self.coefficients}: a 4x8x8 block of 3 colours has 1 to 768")
        if self.scale <= 0:
            raise ValueError(f"tokenizer.dct.scale={self.scale} must be above 0")


@dataclass(frozen=True)
class TokenizerConfig:
    """name chooses the alternative; only that one's fields may be set."""

    name: Literal["dct"] = "dct"
    dct: DctConfig | None = None


def tokenizer_strides(config: TokenizerConfig) -> Strides:
    """The strides, without building the tokenizer."""
    match config.name:
        case "dct":
            return Strides(time=4, height=8, width=8, causal=True)


def tokenizer_channels(config: TokenizerConfig) -> int:
    """The number of latent channels, without building the tokenizer."""
    match config.name:
        case "dct":
            return (config.dct or DctConfig()).coefficients


def tokenizer_version(config: TokenizerConfig) -> str:
    """Name and hash of everything that changes the latents; shards of latents carry it, and training refuses
    another.
    """
    match config.name:
        case "dct":
            dct = config.dct or DctConfig()
            text = f"dct/1 {dct.coefficients} {dct.scale!r} {dct.decay!r}"
            return f"dct-{blake2b(text.encode(), digest_size=8).hexdigest()}"
