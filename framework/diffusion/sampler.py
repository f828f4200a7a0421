"""Euler's method along the flow, with classifier-free guidance.

    x <- x + (sigma_{i+1} - sigma_i) v,    sigma_i = shift(1 - i / n),   v = v_uncond + g (v_cond - v_uncond)

(arXiv 2503.20314, section 4.2; guidance: arXiv 2207.12598). Guidance 1 runs the conditional pass alone.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from framework.diffusion.config import SamplerConfig
from framework.diffusion.timesteps import shift

# (latents `B c t h w`, sigma) -> velocity `B c t h w`
Velocity = Callable[[Tensor, float], Tensor]


def sigmas(num_steps: int, k: float) -> list[float]:
    """num_steps + 1 noise levels from 1 to 0."""
    return [shift(1 - i / num_steps, k) for i in range(num_steps)] + [0.0]


@torch.no_grad()
def euler(noise: Tensor, conditional: Velocity, unconditional: Velocity, config: SamplerConfig, *, k: float) -> Tensor:
    """Noise `B c t h w` -> latents. k: the shift, where the sampler's config doesn't set one."""
    levels = sigmas(config.steps, config.shift if config.shift is not None else k)
    latents = noise
    for now, then in itertools.pairwise(levels):
        velocity = conditional(latents, now)
        if config.guidance != 1:
            without = unconditional(latents, now)
            velocity = without + config.guidance * (velocity - without)
        latents = latents + (then - now) * velocity
    return latents
