"""What encoding ahead takes: by formula, counted by torch, and worked out by hand."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from framework.forecast.encoding import encoder_flops
from framework.forecast.forecast import forecast
from framework.parallel.config import resolve_mesh
from framework.plan.hardware import load_hardware
from framework.recipe import load_recipe
from framework.shapes import ClipShape
from framework.tokenizer.config import LatentsConfig, TokenizerConfig

RECIPES = Path(__file__).parents[3] / "recipes"
LATENTS = TokenizerConfig(name="latents", latents=LatentsConfig())


@pytest.mark.parametrize("clip", [ClipShape(1, 64, 64), ClipShape(9, 64, 96)], ids=str)
def test_the_encoders_flops_are_those_that_torch_counts(clip: ClipShape) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan()
        video = torch.empty(1, 3, clip.frames, clip.height, clip.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(video)
    assert encoder_flops(LATENTS, clip) == counter.get_total_flops()


def test_nothing_is_said_of_an_encoder_that_is_not_known() -> None:
    assert encoder_flops(TokenizerConfig(name="dct"), ClipShape(9, 64, 64)) is None
    other = TokenizerConfig(name="latents", latents=LatentsConfig(channels=48))
    assert encoder_flops(other, ClipShape(9, 64, 64)) is None


def test_a_clip_takes_what_is_worked_out_by_hand() -> None:
    """Wan at 480p: 21 x 60 x 104 of 16 channels, 2 bytes each; a quarter of an H100's 794.5 TFLOP/s."""
    recipe = load_recipe(RECIPES / "wan2.1-14b.yaml", [])
    found = forecast(recipe, resolve_mesh(recipe.mesh, num_ranks=None), load_hardware("h100"))
    pixels = 480 * 832
    flops = pixels * (6_656_864 + 20 * 20_011_424) + 21 * 4 * 384 * (60 * 104) ** 2
    assert found.clip_latents == found.buckets[0].latent == 2 * 16 * 21 * 60 * 104
    assert found.clip_encoding == pytest.approx(flops / (0.25 * 794.5e12))


def test_several_buckets_count_by_their_shares_of_the_samples() -> None:
    words = ["stages=[]", "data.buckets.1.weight=1", "data.buckets.0.weight=3"]
    recipe = load_recipe(RECIPES / "moviegen-1b.yaml", words)
    found = forecast(recipe, resolve_mesh(recipe.mesh, num_ranks=None), load_hardware("h100"))
    video, image = found.buckets
    assert found.clip_latents == pytest.approx((3 * video.latent + image.latent) / 4)
    assert found.clip_encoding is None, "Movie Gen's encoder isn't Wan's"
