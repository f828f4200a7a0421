"""The average against its closed form, and the exchange with the live weights, bit for bit."""

import pytest
import torch

from framework.config import EmaConfig
from framework.ema import Ema
from framework.parallel.fragments import Fragment, ParameterShard


class Engine:
    """Notes its refreshes."""

    def __init__(self) -> None:
        self.refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1


def fragments(dtype: torch.dtype = torch.float64) -> list[Fragment]:
    """Two parameters' parts and a moment, as views of one buffer."""
    buffer = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    first, second = ParameterShard.whole("a", (3, 2)), ParameterShard.whole("b", (5,))
    return [
        Fragment("model", first, 1, buffer[:4]),
        Fragment("exp_avg", first, 1, buffer[4:8]),
        Fragment("model", second, 0, buffer[8:]),
    ]


@pytest.mark.parametrize("decay", [0.9999, 0.15])
def test_three_steps_in_closed_form(decay: float) -> None:
    """e_3 = w_0 d0 d1 d2 + w_1 (1-d0) d1 d2 + w_2 (1-d1) d2 + w_3 (1-d2), d_n = min(decay, (1+n) / (10+n))."""
    d0, d1, d2 = min(decay, 1 / 10), min(decay, 2 / 11), min(decay, 3 / 12)
    live = fragments()
    ema, history = Ema(live, EmaConfig(decay)), [[f.flat.clone() for f in live]]
    for step in range(3):
        for fragment in live:
            fragment.flat.normal_(generator=torch.Generator().manual_seed(step + 1))
        ema.update(step=step)
        history.append([f.flat.clone() for f in live])
    factors = (d0 * d1 * d2, (1 - d0) * d1 * d2, (1 - d1) * d2, 1 - d2)
    assert sum(factors) == pytest.approx(1)
    for average, index in zip(ema.fragments(), (0, 2), strict=True):
        expected = sum(c * w[index] for c, w in zip(factors, history, strict=True))
        torch.testing.assert_close(average.flat, expected, rtol=1e-14, atol=1e-14)


def test_the_warmup_ends_at_the_decay() -> None:
    """(1 + n) / (10 + n) passes 0.99 at n = 890: from there a step of 1 moves the average by 0.01."""
    for step, share in ((0, 0.9), (8, 0.5), (889, 9 / 899), (890, 0.01), (10**6, 0.01)):
        live = fragments()
        ema = Ema(live, EmaConfig(0.99))
        for fragment in live:
            fragment.flat.add_(1)
        before = [f.flat.clone() for f in ema.fragments()]
        ema.update(step=step)
        for average, old in zip(ema.fragments(), before, strict=True):
            torch.testing.assert_close(average.flat - old, torch.full_like(old, share), rtol=1e-9, atol=1e-12)


def test_only_weights_are_averaged_where_they_lie() -> None:
    live = fragments()
    averages = Ema(live, EmaConfig()).fragments()
    assert [(f.key, f.start, f.flat.numel()) for f in averages] == [("ema.a", 1, 4), ("ema.b", 0, 4)]
    assert [torch.equal(a.flat, f.flat) for a, f in zip(averages, (live[0], live[2]), strict=True)] == [True, True]
    assert averages[0].flat.data_ptr() != live[0].flat.data_ptr()


def test_fragments_are_live_views_and_restart_takes_the_weights() -> None:
    live = fragments()
    ema = Ema(live, EmaConfig())
    ema.fragments()[0].flat.fill_(7.0)
    assert (ema.fragments()[0].flat == 7).all()
    ema.restart()
    assert torch.equal(ema.fragments()[0].flat, live[0].flat)


@pytest.mark.parametrize("raises", [False, True])
def test_the_exchange_is_undone_bit_for_bit(raises: bool) -> None:
    live = fragments(torch.float32)
    ema, engine = Ema(live, EmaConfig()), Engine()
    for fragment in live:
        fragment.flat.mul_(1.1)
    ema.update(step=5)
    weights, averages = [f.flat.clone() for f in live], [f.flat.clone() for f in ema.fragments()]
    try:
        with ema.in_place_of_weights(engine):
            assert torch.equal(live[0].flat, averages[0]) and torch.equal(live[2].flat, averages[1])
            assert torch.equal(live[1].flat, weights[1]), "moments stay"
            assert engine.refreshed == 1
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    assert all(torch.equal(f.flat, w) for f, w in zip(live, weights, strict=True))
    assert all(torch.equal(f.flat, a) for f, a in zip(ema.fragments(), averages, strict=True))
    assert engine.refreshed == 2
