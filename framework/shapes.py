"""Integer arithmetic from a clip to its tokens.

    clip (frames, height, width) --tokenizer strides--> latent (t, h, w) --patch size--> token grid --> S tokens

A causal tokenizer keeps the first frame by itself: frames = 1 + st * k gives t = 1 + k latent frames (Wan, arXiv
2503.20314, section 4.1; CogVideoX). One that isn't causal needs frames = st * k and gives t = k.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ClipShape:
    """A clip in pixels: frames, height, width."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Strides:
    """What a tokenizer divides by: time, height and width, and whether its first frame stands alone."""

    time: int
    height: int
    width: int
    causal: bool


@dataclass(frozen=True)
class LatentShape:
    """A latent video: frames (t), height (h), width (w)."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class TokenShape:
    """The grid of tokens: latent frames, rows and columns divided by the patch size."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


def valid_frames(frames: int, strides: Strides) -> tuple[int, int]:
    """The nearest frame counts at or below and at or above `frames` that the tokenizer takes (at least one latent
    frame).
    """
    first = 1 if strides.causal else strides.time
    below = first + max(0, frames - first) // strides.time * strides.time
    above = below if below >= frames else below + strides.time
    return below, above


def latent_shape(clip: ClipShape, strides: Strides) -> LatentShape:
    """Shape of the latent of a clip.

    Raises ValueError with the nearest shapes that work, when the strides don't divide the clip.
    """
    below, above = valid_frames(clip.frames, strides)
    if clip.frames != below:
        form = f"1 + {strides.time}k" if strides.causal else f"{strides.time}k"
        raise ValueError(
            f"{clip.frames} frames don't fit the tokenizer's time stride {strides.time}: frames must be {form}; "
            f"the nearest are {below} and {above}"
        )
    for name, size, stride in (("height", clip.height, strides.height), ("width", clip.width, strides.width)):
        if size < stride or size % stride:
            low = max(stride, size // stride * stride)
            raise ValueError(
                f"{name} {size} isn't a multiple of the stride {stride}; the nearest are {low} and {low + stride}"
            )
    frames = (clip.frames - 1) // strides.time + 1 if strides.causal else clip.frames // strides.time
    return LatentShape(frames, clip.height // strides.height, clip.width // strides.width)


def token_shape(latent: LatentShape, patch_size: tuple[int, int, int]) -> TokenShape:
    """Grid of tokens of a latent.

    Raises ValueError with the sizes, when the patch size doesn't divide the latent.
    """
    sizes = (latent.frames, latent.height, latent.width)
    for name, size, patch in zip(("frames", "height", "width"), sizes, patch_size, strict=True):
        if size % patch:
            raise ValueError(
                f"latent {name} {size} isn't a multiple of the model's patch size {patch} (patch_size {patch_size})"
            )
    return TokenShape(*(size // patch for size, patch in zip(sizes, patch_size, strict=True)))


def even_parts(total: int, parts: int) -> list[int]:
    """`total` things dealt to `parts` places: sizes that differ by at most one, the larger ones first.

    >>> even_parts(7, 3)
    [3, 2, 2]
    """
    size, rest = divmod(total, parts)
    return [size + (index < rest) for index in range(parts)]


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
