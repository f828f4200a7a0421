"""Euler's method along the flow, with classifier-free guidance.

    x <- x + (sigma_{i+1} - sigma_i) v,    sigma_i = shift(1 - i / n),   v = v_uncond + g (v_cond - v_uncond)

(arXiv 2503.20314, section 4.2; guidance: arXiv 2207.12598). Guidance 1 runs the conditional pass alone. Two models may
share out the noise levels (Wan 2.2), each with its own g.

diffusers' FlowMatchEulerDiscreteScheduler has other levels: it shifts its smallest training level, 1 / 1000, and again
all n from 1 to there, so its last step begins close to 0:  sigma_i = shift(1 - i / (n - 1) (1 - shift(1 / 1000))).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from framework.batch import Predictor
from framework.diffusion.config import SamplerConfig
from framework.diffusion.timesteps import shift

# (latents `B c t h w`, sigma) -> velocity `B c t h w`
Velocity = Callable[[Tensor, float], Tensor]


SMALLEST_LEVEL = 1 / 1000  # that diffusers' scheduler trains on


@dataclass(frozen=True)
class Experts:
    """Two models that share out the noise levels: `high` from the boundary up, `low` below it (Wan 2.2).

    low_guidance: of the model `low`, None takes the sampler's.
    """

    high: Predictor
    low: Predictor
    boundary: float
    low_guidance: float | None = None

    @classmethod
    def lone(cls, predict: Predictor) -> Self:
        """One model for all levels."""
        return cls(high=predict, low=predict, boundary=0.0)

    def at(self, sigma: float) -> Predictor:
        """The model of a noise level."""
        return self.high if sigma >= self.boundary else self.low

    def guidance(self, sigma: float, config: SamplerConfig) -> float:
        """The guidance at a noise level."""
        return config.guidance if sigma >= self.boundary or self.low_guidance is None else self.low_guidance


def sigmas(num_steps: int, k: float, levels: Literal["even", "diffusers"] = "even") -> list[float]:
    """num_steps + 1 noise levels from 1 to 0."""
    match levels:
        case "even":
            unshifted = [1 - i / num_steps for i in range(num_steps)]
        case "diffusers":
            fall = (1 - shift(SMALLEST_LEVEL, k)) / max(1, num_steps - 1)
            unshifted = [1 - i * fall for i in range(num_steps)]
    return [shift(sigma, k) for sigma in unshifted] + [0.0]


@torch.no_grad()
def euler(
    noise: Tensor,
    conditional: Velocity,
    unconditional: Velocity,
    config: SamplerConfig,
    *,
    k: float,
    guidance: Callable[[float], float] | None = None,
) -> Tensor:
    """Noise `B c t h w` -> latents. k: the shift, where the sampler's config doesn't set one. guidance: at a noise
    level; None takes the config's at all.
    """
    levels = sigmas(config.steps, config.shift if config.shift is not None else k, config.levels)
    latents = noise
    for now, then in itertools.pairwise(levels):
        velocity = conditional(latents, now)
        scale = config.guidance if guidance is None else guidance(now)
        if scale != 1:
            without = unconditional(latents, now)
            velocity = without + scale * (velocity - without)
        latents = latents + (then - now) * velocity
    return latents
