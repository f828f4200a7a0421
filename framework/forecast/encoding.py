"""What it takes to encode clips ahead (`cuboid encode`): bytes of latents, and FLOPs of an encoder that is known.

Of Wan 2.1's encoder (arXiv 2503.20314, section 4.1), as diffusers computes it: the first frame by itself, then four
at a time. A clip of 1 + 4 k frames of n pixels takes

    FIRST n  +  GROUP n k  +  4 * 384 (n / 64)^2 (1 + k)        convolutions; attention within each latent frame
"""

from typing import Final

from framework.plan.hardware import Hardware
from framework.recipe import Recipe
from framework.shapes import ClipShape, Strides, latent_shape
from framework.tokenizer.config import TokenizerConfig, tokenizer_channels, tokenizer_strides

LATENT_BYTES = 2  # float16, what `cuboid encode` writes
FIRST: Final = 6_656_864  # FLOPs of convolutions for a pixel of the first frame
GROUP: Final = 20_011_424  # for a pixel of four more frames
WIDTH: Final = 384  # channels of the attention
WAN: Final = (Strides(4, 8, 8, causal=True), 16)  # strides and channels, by which the encoder is known
# Of `device.matmul.bfloat16`, nobody has measured it: most of the convolutions are 96 and 192 channels wide, which
# fills a GPU less than products as large as those that the rate is of.
ASSUMED_SHARE: Final = 0.25


def latent_bytes(recipe: Recipe, index: int) -> int:
    """Of one sample of a bucket, as `cuboid encode` writes it."""
    strides, clip = tokenizer_strides(recipe.tokenizer), recipe.data.buckets[index].clip
    latent = latent_shape(clip, strides)
    return LATENT_BYTES * tokenizer_channels(recipe.tokenizer) * latent.frames * latent.height * latent.width


def encoder_flops(config: TokenizerConfig, clip: ClipShape) -> int | None:
    """Of encoding one clip; None where nothing is known of the encoder."""
    if (tokenizer_strides(config), tokenizer_channels(config)) != WAN:
        return None
    pixels, groups = clip.height * clip.width, (clip.frames - 1) // 4
    return pixels * (FIRST + GROUP * groups) + 4 * WIDTH * (pixels // 64) ** 2 * (1 + groups)


def encoder_seconds(recipe: Recipe, index: int, hardware: Hardware) -> float | None:
    """Of a device for one clip of a bucket, at the assumed share; None where nothing is known."""
    flops, rate = (
        encoder_flops(recipe.tokenizer, recipe.data.buckets[index].clip),
        hardware.device.matmul.get("bfloat16"),
    )
    return None if flops is None or rate is None else flops / (ASSUMED_SHARE * rate)
