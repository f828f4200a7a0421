"""Rotary positions of clips longer than the weights were trained on, by their periods and by numbers worked out by
hand.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import write_recipe

from framework.kernels.reference import ReferenceAttention
from framework.models.config import ModelConfig, RopeConfig, covering_pair
from framework.models.dit import DiT
from framework.models.patchify import frame_index, token_positions
from framework.models.rope import build_rotation, time_frequencies
from framework.parallel.mesh import lone_mesh
from framework.programs.build import build_model
from framework.programs.local import empty_model
from framework.recipe import load_recipe
from framework.shapes import LatentShape

# Wan: 128 channels of a head, 44 of them for frames; neighbouring periods differ by 10000^(1/22) = 1.5199.
WAN, CHANNELS = 128, 44
PERIODS = (6.2832, 9.5496, 14.5145, 22.0606)  # 2 pi 1.5199^j
SCALED: dict[str, RopeConfig] = {
    "interpolation": RopeConfig("interpolation", 2.0),
    "ntk": RopeConfig("ntk", 2.0),
    "riflex": RopeConfig("riflex", 2.0, 21),
}


def periods(rope: RopeConfig, channels: int = CHANNELS) -> list[float]:
    return [2 * math.pi / float(frequency) for frequency in time_frequencies(channels, rope)]


def test_riflex_stretches_the_first_pair_that_covers_the_trained_length_and_no_other() -> None:
    plain, scaled = periods(RopeConfig()), periods(SCALED["riflex"])
    assert plain[:4] == pytest.approx(PERIODS, rel=1e-4)
    assert scaled[3] == pytest.approx(42.0)  # 21 latent frames * 2, where pair 3 had 22.06
    assert [j for j in range(22) if scaled[j] != plain[j]] == [3]
    # Within it no frame of the longer clip has the angle of another.
    angles = torch.arange(42) * time_frequencies(CHANNELS, SCALED["riflex"])[3] / (2 * math.pi)
    assert len(set(torch.round(angles % 1, decimals=6).tolist())) == 42


@pytest.mark.parametrize(
    ("channels", "length", "pair"), [(44, 21, 3), (44, 22, 3), (44, 23, 4), (16, 13, 1), (4, 7, 1)]
)
def test_the_pair_that_covers_a_length(channels: int, length: int, pair: int) -> None:
    """(16, 13) is CogVideoX, for which RIFLEx publishes k = 2, counted from 1."""
    assert covering_pair(channels, length) == pair


def test_riflex_never_shortens_a_period() -> None:
    """22.06 covers 21 * 1.05 = 22.05 already."""
    assert periods(RopeConfig("riflex", 1.05, 21)) == periods(RopeConfig())
    assert periods(RopeConfig("riflex", 1.06, 21))[3] == pytest.approx(22.26)


def test_a_token_of_two_latent_frames_covers_in_half_as_many() -> None:
    """42 latent frames are 21 tokens."""
    assert torch.equal(
        time_frequencies(CHANNELS, RopeConfig("riflex", 2.0, 42), 2), time_frequencies(CHANNELS, SCALED["riflex"])
    )


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor() -> None:
    plain, scaled = periods(RopeConfig()), periods(SCALED["ntk"])
    assert scaled[0] == plain[0]
    assert scaled[21] == pytest.approx(2 * plain[21])
    assert scaled[1] == pytest.approx(9.5496 * 2 ** (1 / 21), rel=1e-4)  # (s^(44/42))^(2/44)


def test_interpolation_turns_a_frame_as_one_of_half_its_position() -> None:
    positions = torch.tensor([[[2 * t, 5, 6] for t in range(8)]])
    half = torch.tensor([[[t, 5, 6] for t in range(8)]])
    ours = build_rotation(positions, WAN, torch.float64, SCALED["interpolation"])
    assert torch.allclose(ours, build_rotation(half, WAN, torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SCALED)
def test_rows_and_columns_are_untouched_and_a_factor_of_one_scales_nothing(name: str) -> None:
    positions = token_positions(1, LatentShape(3, 8, 6), (1, 2, 2), torch.device("cpu"))
    plain = build_rotation(positions, WAN, torch.float32)
    scaled = build_rotation(positions, WAN, torch.float32, SCALED[name])
    assert torch.equal(scaled[..., 22:], plain[..., 22:]) and not torch.equal(scaled, plain)
    assert torch.equal(build_rotation(positions, WAN, torch.float32, replace(SCALED[name], factor=1.0)), plain)


def written_out(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rotation as it was before anything could be scaled."""
    space = 2 * (head_dim // 6)
    channels = (head_dim - 2 * space, space, space)
    exponents = [torch.arange(0, n, 2, dtype=torch.float64) / n for n in channels]
    angles = torch.cat([positions[..., a, None] * (1.0 / 10000.0**e) for a, e in enumerate(exponents)], dim=-1)
    return torch.complex(angles.cos().float(), angles.sin().float()).unsqueeze(2)


def test_without_scaling_nothing_has_changed() -> None:
    positions = token_positions(1, LatentShape(21, 12, 10), (1, 2, 2), torch.device("cpu"))
    assert torch.equal(build_rotation(positions, WAN, torch.float32), written_out(positions, WAN))


def test_the_recipes_scaling_reaches_the_model_that_trains_and_the_one_that_samples(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, ["attention.kernel=aten", "rope.time=interpolation", "rope.factor=3"])
    trained, sampled = build_model(recipe, lone_mesh())[0], empty_model(recipe)
    assert isinstance(trained, DiT) and trained.rope == sampled.rope == RopeConfig("interpolation", 3.0)


def test_the_model_turns_by_it() -> None:
    """At three times the frames, factor 3 gives what no scaling gives at the frames themselves."""
    config = ModelConfig(num_attention_heads=2, attention_head_dim=12, num_layers=1, text_dim=4, freq_dim=8, ffn_dim=8)
    positions = token_positions(1, LatentShape(4, 2, 4), (1, 2, 2), torch.device("cpu"))
    patches = torch.randn(1, positions.shape[1], config.in_patch_dim, generator=torch.Generator().manual_seed(0))

    def output(rope: RopeConfig, stretch: int) -> torch.Tensor:
        model, generator = DiT(config, ReferenceAttention(), rope=rope), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in model.parameters():
                value.normal_(0.0, 0.3, generator=generator)
            moved = positions * torch.tensor([stretch, 1, 1])
            return model(patches, moved, frame_index(positions), torch.full((1, 1), 500.0), torch.ones(1, 2, 4))

    plain = output(RopeConfig(), 1)
    assert torch.allclose(output(RopeConfig("interpolation", 3.0), 3), plain, atol=1e-5)
    assert not torch.allclose(output(RopeConfig(), 3), plain, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rope.factor=2"], r"rope.factor=2.0 with rope.time=none: choose rope.time"),
        (["rope.time=ntk", "rope.factor=0.5"], r"rope.factor=0.5 .* must be at least 1"),
        (["rope.time=riflex"], r"needs rope.trained_frames, .* not 0"),
        (["rope.time=ntk", "rope.trained_frames=21"], r"rope.trained_frames=21 with rope.time=ntk: only riflex"),
        (["rope.time=ntk", "model.attention_head_dim=6"], r"rope.time=ntk: the 2 channels .* rope.time=interpolation"),
        (["rope.time=riflex", "rope.trained_frames=700"], r"rope.time=riflex: the 4 channels .* no period to scale"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(tmp_path, tmp_path), words)
