"""Noise levels against scipy, against closed forms and against a sample of the distribution."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit, ndtr, ndtri

from framework.diffusion.config import (
    FixedShiftConfig,
    FlowConfig,
    LogitNormalConfig,
    ShiftConfig,
    TimestepsConfig,
    TokensShiftConfig,
)
from framework.diffusion.timesteps import cumulative, noise_level, num_tokens, quantile, shift, shift_value, unshift
from framework.shapes import LatentShape

UNIFORM = TimestepsConfig()
NORMALS = [(0.0, 1.0), (0.5, 1.3), (-1.0, 0.4)]
LEVELS = np.linspace(0, 1, 201)[1:-1]


def normal(mean: float, std: float) -> TimestepsConfig:
    return TimestepsConfig("logit_normal", LogitNormalConfig(mean, std))


@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_the_logit_normal_is_scipys(mean: float, std: float) -> None:
    found = [quantile(normal(mean, std), float(u)) for u in LEVELS]
    np.testing.assert_allclose(found, expit(mean + std * ndtri(LEVELS)), rtol=1e-12)
    found = [cumulative(normal(mean, std), float(s)) for s in LEVELS]
    np.testing.assert_allclose(found, ndtr((logit(LEVELS) - mean) / std), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("config", [UNIFORM, normal(0.5, 1.3)])
def test_the_edges_are_the_edges(config: TimestepsConfig) -> None:
    assert [quantile(config, u) for u in (0.0, 1.0)] == [0.0, 1.0] == [cumulative(config, s) for s in (0.0, 1.0)]


def test_uniform_is_itself() -> None:
    assert [quantile(UNIFORM, float(u)) for u in LEVELS] == LEVELS.tolist()


@pytest.mark.parametrize("k", [0.3, 1.0, 3.0, 12.0])
def test_the_shift_adds_log_k_to_the_logit(k: float) -> None:
    """k s / (1 + (k - 1) s) = sigmoid(logit(s) + log k), an identity that the code doesn't use."""
    found = np.array([shift(float(s), k) for s in LEVELS])
    np.testing.assert_allclose(found, expit(logit(LEVELS) + math.log(k)), rtol=1e-12)
    np.testing.assert_allclose([unshift(float(s), k) for s in found], LEVELS, rtol=1e-12)
    assert [f(s, k) for f in (shift, unshift) for s in (0.0, 1.0)] == pytest.approx([0.0, 1.0] * 2, abs=1e-15)


def test_the_shift_grows_with_the_root_of_the_tokens() -> None:
    fixed, tokens = (
        ShiftConfig("fixed", FixedShiftConfig(5.0)),
        ShiftConfig("tokens", None, TokensShiftConfig(3.0, 100)),
    )
    assert [shift_value(fixed, n) for n in (1, 10**6)] == [5.0, 5.0]
    assert [shift_value(tokens, n) for n in (100, 400, 25)] == [3.0, 6.0, 1.5]
    assert num_tokens(LatentShape(21, 60, 104), (1, 2, 2)) == 32_760


@pytest.mark.parametrize("k", [2.0, 5.0])
def test_the_mean_of_a_shifted_uniform(k: float) -> None:
    """E = integral of k u / (1 + (k - 1) u) = k / (k - 1) - k log k / (k - 1)^2."""
    num = 20_000
    mean = sum(noise_level(FlowConfig(), (i + 0.5) / num, k) for i in range(num)) / num
    assert mean == pytest.approx(k / (k - 1) - k * math.log(k) / (k - 1) ** 2, abs=1e-8)


@pytest.mark.parametrize("edges", [(0.0, 1.0), (0.875, 1.0), (0.0, 0.875), (0.3, 0.6)])
@pytest.mark.parametrize("config", [UNIFORM, normal(0.0, 1.0), normal(-0.5, 0.8)])
def test_a_range_is_what_the_whole_gives_there(config: TimestepsConfig, edges: tuple[float, float]) -> None:
    """Against draws of the whole distribution, shifted, of which those outside the range are thrown away."""
    k, (lo, hi) = 3.0, edges
    rng = np.random.default_rng(0)
    u = rng.random(400_000)
    raw = (
        u
        if config.logit_normal is None
        else expit(rng.normal(config.logit_normal.mean, config.logit_normal.std, u.size))
    )
    shifted = k * raw / (1 + (k - 1) * raw)
    kept = shifted[(shifted >= lo) & (shifted <= hi)]
    found = [noise_level(FlowConfig(config, range=edges), (i + 0.5) / 2000, k) for i in range(2000)]
    assert lo <= min(found) and max(found) <= hi and found == sorted(found)
    assert kept.size > 100 and stats.ks_2samp(found, kept).pvalue > 1e-3
    assert np.mean(found) == pytest.approx(kept.mean(), abs=5 * kept.std() / math.sqrt(kept.size))


def test_two_experts_share_out_the_whole() -> None:
    """[0, 0.875] and [0.875, 1] of Wan 2.2, each with its share of u, give the one distribution."""
    config, k = normal(0.0, 1.0), 5.0
    share = float(ndtr(logit(0.875) - math.log(k)))
    for u in LEVELS:
        edges, inner = ((0.0, 0.875), u / share) if u < share else ((0.875, 1.0), (u - share) / (1 - share))
        found = noise_level(FlowConfig(config, range=edges), float(inner), k)
        assert found == pytest.approx(noise_level(FlowConfig(config), float(u), k), rel=1e-9)
