"""Noise levels: their distribution, and the shift that grows with the number of tokens.

    uniform        sigma = u
    logit_normal   sigma = sigmoid(mean + std * probit(u))               (SD3, arXiv 2403.03206, equation 19)
    shift          sigma' = k sigma / (1 + (k - 1) sigma)                (same, equation 23)
    range          sigma'' = lo + (hi - lo) * F, F the quantile within [lo, hi], so that the shape inside it stays

Everything is arithmetic on Python floats of one u in [0, 1) a sample: the same number on every machine and mesh.
"""

import math
from statistics import NormalDist

from framework.diffusion.config import FlowConfig, ShiftConfig, TimestepsConfig
from framework.shapes import LatentShape, token_shape


def shift_value(config: ShiftConfig, num_tokens: int) -> float:
    """k of the shift for a token count."""
    match config.name:
        case "fixed":
            assert config.fixed is not None
            return config.fixed.value
        case "tokens":
            assert config.tokens is not None
            return config.tokens.value * math.sqrt(num_tokens / config.tokens.base_tokens)


def shift(sigma: float, k: float) -> float:
    """Move a noise level up (k > 1) or down."""
    return k * sigma / (1 + (k - 1) * sigma)


def unshift(sigma: float, k: float) -> float:
    """The inverse of `shift`."""
    return sigma / (k - (k - 1) * sigma)


def quantile(config: TimestepsConfig, u: float) -> float:
    """The noise level below which a share u of the distribution lies, before the shift."""
    if config.name == "uniform" or not 0 < u < 1:
        return u
    normal = config.logit_normal
    assert normal is not None
    return 1 / (1 + math.exp(-normal.mean - normal.std * NormalDist().inv_cdf(u)))


def cumulative(config: TimestepsConfig, sigma: float) -> float:
    """The inverse of `quantile`."""
    if config.name == "uniform" or not 0 < sigma < 1:
        return sigma
    normal = config.logit_normal
    assert normal is not None
    return NormalDist(normal.mean, normal.std).cdf(math.log(sigma / (1 - sigma)))


def noise_level(config: FlowConfig, u: float, k: float) -> float:
    """sigma for u in [0, 1): the distribution, shifted, restricted to the range."""
    lo, hi = (cumulative(config.timesteps, unshift(edge, k)) for edge in config.range)
    return shift(quantile(config.timesteps, lo + (hi - lo) * u), k)


def num_tokens(latent: LatentShape, patch_size: tuple[int, int, int]) -> int:
    """Tokens of a latent."""
    return token_shape(latent, patch_size).num_tokens
