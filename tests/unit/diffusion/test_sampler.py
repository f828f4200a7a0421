"""Euler's method on equations whose solution is known."""

import math

import pytest
import torch
from torch import Tensor

from framework.diffusion.config import SamplerConfig
from framework.diffusion.sampler import Experts, euler, sigmas

NOISE = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
CLEAN = torch.tensor([[0.3, 0.7, -4.0]], dtype=torch.float64)


def never(latents: Tensor, sigma: float) -> Tensor:
    raise AssertionError("guidance 1 needs no unconditional pass")


@pytest.mark.parametrize("k", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_levels_fall_from_one_to_zero(num_steps: int, k: float) -> None:
    found = sigmas(num_steps, k)
    assert len(found) == num_steps + 1 and (found[0], found[-1]) == (1.0, 0.0)
    assert found == sorted(found, reverse=True) and len(set(found)) == num_steps + 1
    expected = [k * (1 - i / num_steps) / (1 + (k - 1) * (1 - i / num_steps)) for i in range(num_steps + 1)]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_a_constant_velocity_is_exact(num_steps: int) -> None:
    """x_0 = x_1 - v, whatever the steps."""
    found = euler(NOISE, lambda x, s: CLEAN, never, SamplerConfig(steps=num_steps), k=5.0)
    torch.testing.assert_close(found, NOISE - CLEAN, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_flow_to_one_clip_is_straight(num_steps: int) -> None:
    """v = (x - x_0) / sigma leads to x_0 exactly."""
    found = euler(NOISE, lambda x, s: (x - CLEAN) / s, never, SamplerConfig(steps=num_steps), k=3.0)
    torch.testing.assert_close(found, CLEAN, rtol=1e-13, atol=1e-13)


def test_a_linear_velocity_converges_at_first_order() -> None:
    """dx / dsigma = a x from sigma 1 to 0: x_0 = x_1 exp(-a). Halving the steps halves the error."""
    a = 1.3
    exact = NOISE * math.exp(-a)
    errors = [
        (euler(NOISE, lambda x, s: a * x, never, SamplerConfig(steps=n), k=1.0) - exact).abs().max().item()
        for n in (200, 400, 800)
    ]
    assert errors[2] < 1e-3
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.01)


@pytest.mark.parametrize("guidance", [0.0, 2.5, 6.0])
def test_guidance_goes_beyond_the_condition(guidance: float) -> None:
    given, empty = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    config = SamplerConfig(steps=3, guidance=guidance)
    found = euler(NOISE, lambda x, s: given, lambda x, s: empty, config, k=1.0)
    torch.testing.assert_close(found, NOISE - (empty + guidance * (given - empty)))


def test_the_configs_shift_goes_before_the_trainings() -> None:
    seen: list[float] = []

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return latents

    euler(NOISE, velocity, never, SamplerConfig(steps=2, shift=4.0), k=9.0)
    euler(NOISE, velocity, never, SamplerConfig(steps=2), k=9.0)
    assert seen == pytest.approx([1.0, 0.8, 1.0, 0.9])


def test_nothing_is_kept_for_a_gradient() -> None:
    noise = NOISE.clone().requires_grad_()
    found = euler(noise, lambda x, s: x, never, SamplerConfig(steps=2), k=1.0)
    assert not found.requires_grad and torch.equal(noise.detach(), NOISE)


@pytest.mark.parametrize("k", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_levels_of_diffusers_are_its_schedulers(num_steps: int, k: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=k)
    scheduler.set_timesteps(num_steps)
    assert sigmas(num_steps, k, "diffusers") == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


def test_experts_share_out_the_levels() -> None:
    """Levels 1, 0.75, 0.5 and 0.25 and the boundary 0.5, which is the high expert's."""
    high, low = (lambda *_: NOISE), (lambda *_: CLEAN)
    experts, config = Experts(high, low, 0.5, low_guidance=2.0), SamplerConfig(guidance=4.0)
    levels = sigmas(4, 1.0)[:-1]
    assert [experts.at(sigma) is high for sigma in levels] == [True, True, True, False]
    assert [experts.guidance(sigma, config) for sigma in levels] == [4.0, 4.0, 4.0, 2.0]
    alone = Experts.lone(low)
    assert all(alone.at(sigma) is low and alone.guidance(sigma, config) == 4.0 for sigma in [*levels, 0.0])
    seen: list[float] = []
    euler(NOISE, lambda x, s: x, lambda x, s: x, config, k=1.0, guidance=lambda s: seen.append(s) or 1.0)
    assert len(seen) == config.steps
