"""The objective against its equations, worked out in float64 with other words."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from framework.batch import Batch, Condition, TokenLayout, Tokens
from framework.diffusion.config import FixedShiftConfig, FlowConfig, LossConfig, ShiftConfig, TimestepsConfig
from framework.diffusion.flow import Flow, keyed_noise
from framework.keys import key
from framework.models.patchify import patchify
from framework.parallel.mesh import lone_mesh
from framework.shapes import ClipShape, LatentShape

SEED, STEP, K = 11, 7, 3.0
LATENT = LatentShape(4, 2, 6)
CONFIG = FlowConfig(shift=ShiftConfig("fixed", FixedShiftConfig(K)))


def make_flow(config: FlowConfig = CONFIG, weight: str = "per_sample", patch: tuple[int, int, int] = (2, 1, 2)) -> Flow:
    return Flow(config, LossConfig(weight), seed=SEED, patch_size=patch)  # type: ignore[arg-type]


def make_batch(draws: Sequence[str], positions: Sequence[int] | None = None) -> Batch:
    """Latents of three channels; an empty draw is an empty slot."""
    latents = torch.randn(len(draws), 3, 4, 2, 6, generator=torch.Generator().manual_seed(5))
    return Batch(
        latents=latents,
        weights=torch.tensor([1.0 if draw else 0.0 for draw in draws]),
        condition=Condition(torch.zeros(len(draws), 1, 1)),
        uids=tuple(draws),
        draws=tuple(draws),
        positions=tuple(positions if positions is not None else range(len(draws))),
        bucket_samples=5,
        bucket=0,
        clip=ClipShape(13, 16, 48),
        latent=LATENT,
    )


def eps_of(draw: str) -> Tensor:
    generator = torch.Generator().manual_seed(key(SEED, "noise", uid=draw, step=STEP))
    return torch.randn(3, 4, 2, 6, generator=generator).double()


def u_of(draw: str) -> float:
    return (key(SEED, "timestep", uid=draw, step=STEP) >> 11) / 2**53


def test_noising_is_the_equation() -> None:
    batch = make_batch(["a", "b", "c"])
    noised = make_flow().noise(batch, step=STEP)
    for i, draw in enumerate(batch.draws):
        u, eps, clean = u_of(draw), eps_of(draw), batch.latents[i].double()
        sigma = K * u / (1 + (K - 1) * u)
        torch.testing.assert_close(noised.latents[i].double(), clean + sigma * (eps - clean), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(noised.target[i].double(), eps - clean, rtol=1e-6, atol=1e-6)
        # The model is told 1000 sigma, once for all frames.
        assert noised.timesteps[i].tolist() == pytest.approx([1000 * sigma], rel=1e-6)
    assert noised.latents.dtype == torch.float32 and noised.weights is batch.weights


def test_a_clip_is_noised_alike_in_any_batch() -> None:
    """Bitwise: which other clips are there, or on which rank, doesn't matter."""
    together = make_flow().noise(make_batch(["a", "b", "c"]), step=STEP)
    whole = make_batch(["a", "b", "c"])
    for i in range(3):
        alone = replace(
            whole, latents=whole.latents[i : i + 1], weights=whole.weights[i : i + 1], draws=whole.draws[i : i + 1],
            uids=whole.uids[i : i + 1], positions=(i,),
        )  # fmt: skip
        noised = make_flow().noise(alone, step=STEP)
        for name in ("latents", "target", "timesteps"):
            assert torch.equal(getattr(noised, name)[0], getattr(together, name)[i])


def test_step_draw_and_seed_change_noise_and_level() -> None:
    def levels(noised: object) -> list[float]:
        return noised.timesteps[:, 0].tolist()  # type: ignore[attr-defined]

    reference = make_flow().noise(make_batch(["a"]), step=STEP)
    for other in (
        make_flow().noise(make_batch(["a"]), step=STEP + 1),
        make_flow().noise(make_batch(["b"]), step=STEP),
        Flow(CONFIG, LossConfig(), seed=SEED + 1, patch_size=(2, 1, 2)).noise(make_batch(["a"]), step=STEP),
    ):
        assert levels(other) != levels(reference) and not torch.equal(other.target, reference.target)


def test_stratified_levels_share_out_the_step() -> None:
    """Each of the step's 5 places draws from its own fifth; an empty slot, place -1, doesn't matter but works."""
    flow = make_flow(replace(CONFIG, timesteps=TimestepsConfig(stratified=True)))
    noised = flow.noise(make_batch(["a", "b", ""], [3, 0, -1]), step=STEP)
    places = [(3 + u_of("a")) / 5, (0 + u_of("b")) / 5]
    expected = [1000 * K * u / (1 + (K - 1) * u) for u in places]
    assert noised.timesteps[:2, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_level_for_each_frame() -> None:
    """4 latent frames in patches of 2: two levels a clip, each from a key of its own; both frames of a patch share."""
    flow = make_flow(replace(CONFIG, timesteps=TimestepsConfig(per_frame=True)))
    batch = make_batch(["a", "b"])
    noised = flow.noise(batch, step=STEP)
    seen = []
    for i, draw in enumerate(batch.draws):
        us = [(key(SEED, "frame_timestep", uid=f"{draw}@{frame}", step=STEP) >> 11) / 2**53 for frame in range(2)]
        sigmas = [K * u / (1 + (K - 1) * u) for u in us]
        seen += sigmas
        assert noised.timesteps[i].tolist() == pytest.approx([1000 * sigma for sigma in sigmas], rel=1e-6)
        eps, clean = eps_of(draw), batch.latents[i].double()
        for frame in range(4):
            expected = clean[:, frame] + sigmas[frame // 2] * (eps - clean)[:, frame]
            torch.testing.assert_close(noised.latents[i, :, frame].double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(noised.target[i].double(), eps - clean, rtol=1e-6, atol=1e-6)
    assert len(set(seen)) == 4
    tokens = patchify(noised, (2, 1, 2))
    assert tokens.timesteps.shape == (2, 2) and tokens.frame_index[0].tolist() == [0] * 6 + [1] * 6
    alone = flow.noise(make_batch(["a"]), step=STEP)
    assert torch.equal(alone.timesteps[0], noised.timesteps[0]) and torch.equal(alone.target[0], noised.target[0])


def test_levels_of_frames_are_not_stratified() -> None:
    with pytest.raises(ValueError, match=r"stratified=true .* per_frame=true"):
        TimestepsConfig(stratified=True, per_frame=True)


def test_keyed_noise_is_standard_normal() -> None:
    noise = keyed_noise(key(0, "noise"), (200_000,))
    assert abs(noise.mean()) < 5 / 200_000**0.5 and abs(noise.std() - 1) < 0.01
    assert torch.equal(noise[:1000], keyed_noise(key(0, "noise"), (200_000,))[:1000])


def make_tokens(target: Tensor, weights: list[float], valid: tuple[int, ...], index: int = 0) -> Tokens:
    empty = torch.zeros(0)
    return Tokens(empty, target, empty, empty, empty, torch.tensor(weights), TokenLayout(valid, index, lone_mesh()))


PREDICTION = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[0.0, 0.0], [1.0, 1.0], [7.0, 7.0]]])
TARGET = torch.tensor([[[0.0, 2.0], [1.0, 1.0], [0.0, 0.0]], [[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
# Squared errors of the two valid tokens: 1 + 0 + 4 + 9 = 14 and 4 + 0 + 0 + 1 = 5; the third token is padding.


def test_losses_per_token_by_hand() -> None:
    losses = make_flow(weight="per_token").losses(PREDICTION, make_tokens(TARGET, [1.0, 1.0], (2,)))
    assert losses.tolist() == [14.0, 5.0]


def test_losses_per_sample_by_hand() -> None:
    """Divided by the clip's elements over all ranks of cp: 2 valid tokens here and 5 there, of 2 numbers each."""
    one = make_flow().losses(PREDICTION, make_tokens(TARGET, [1.0, 1.0], (2,)))
    assert one.tolist() == [14 / 4, 5 / 4]
    split = make_flow().losses(PREDICTION, make_tokens(TARGET, [1.0, 1.0], (5, 2), index=1))
    assert split.tolist() == pytest.approx([14 / 14, 5 / 14])


@pytest.mark.parametrize("weight", ["per_sample", "per_token"])
def test_empty_slots_weigh_nothing(weight: str) -> None:
    flow = make_flow(weight=weight)
    losses = flow.losses(PREDICTION, make_tokens(TARGET, [1.0, 0.0], (2,)))
    assert losses[0] > 0 and losses[1] == 0


def test_the_global_count_by_hand() -> None:
    latents = [LatentShape(2, 2, 2), LatentShape(3, 4, 5)]
    for weight in ("per_sample", "per_step"):
        assert make_flow(weight=weight).global_count((3, 2), latents, channels=8) == 5.0
    assert make_flow(weight="per_token").global_count((3, 2), latents, channels=8) == 3 * 64 + 2 * 480


@pytest.mark.parametrize("weight", ["per_sample", "per_token", "per_step"])
def test_sum_over_count_is_the_mean(weight: str) -> None:
    """Two batches of other shapes: the mean over clips, or over elements, of the squared error on whole latents."""
    flow, patch = make_flow(weight=weight, patch=(1, 2, 2)), (1, 2, 2)
    small, large = LatentShape(1, 2, 2), LatentShape(2, 4, 2)
    total, errors = 0.0, []
    for latent, clips in ((small, 3), (large, 2)):
        shape = (clips, 3, latent.frames, latent.height, latent.width)
        generator = torch.Generator().manual_seed(clips)
        batch = replace(make_batch(["x"] * clips), latents=torch.randn(shape, generator=generator), latent=latent)
        tokens = patchify(flow.mix(batch, torch.randn(shape, generator=generator), [[0.5]] * clips), patch)
        assert tokens.target is not None
        total += float(flow.losses(torch.zeros_like(tokens.target), tokens).sum())
        target = torch.randn(shape, generator=torch.Generator().manual_seed(clips))
        noise = torch.Generator().manual_seed(clips)
        torch.randn(shape, generator=noise)
        errors += list(((torch.randn(shape, generator=noise) - target).double() ** 2).flatten(1))
    mean = sum(e.mean() for e in errors) / 5 if weight != "per_token" else torch.cat(errors).mean()
    assert total / flow.global_count((3, 2), [small, large], channels=3) == pytest.approx(float(mean), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_errors_are_summed_in_float32_or_wider(given: torch.dtype, expected: torch.dtype) -> None:
    losses = make_flow().losses(PREDICTION.to(given), make_tokens(TARGET, [1.0, 1.0], (2,)))
    assert losses.dtype == expected and losses.tolist() == [14 / 4, 5 / 4]
