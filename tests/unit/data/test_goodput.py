"""Goodput: small cases worked out on paper, each disturbance alone, and the goals on the mixed set of tools/bench."""

import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from framework.data.budget import plan_batches
from framework.data.goodput import (
    BucketWork,
    Clock,
    Disturbances,
    Factors,
    Goodput,
    Jitter,
    Micro,
    drawn_buckets,
    lockstep,
    simulate_draws,
)

pytestmark = pytest.mark.alone  # work is timed

BENCH = Path(__file__).parents[3] / "tools/bench/balance.py"

# Two ranks at 1 FLOP/s, a cost of tokens^2. A: a sample a rank. B: both ranks share a sample, 9 tokens padded to 10.
A = BucketWork(tokens=10, cost=100, padded=100, size=4, parts=1, micro=1)
B = BucketWork(tokens=9, cost=81, padded=100, size=3, parts=2, micro=2)
STILL = Disturbances(flops=1)
TWO_STEPS = np.array([[0], [1]])


def run(works: list[BucketWork], disturbances: Disturbances = STILL) -> Goodput:
    return simulate_draws(works, TWO_STEPS, ranks=2, disturbances=disturbances)


def test_two_ranks_two_steps_by_hand() -> None:
    """A: 4 samples in 2 rows of 2: 100 + 100 s. B: 3 rows of one sample, cut into 2 and 1: 100 + 50 s. Useful are 400
    and 243 of the 2 x 350 FLOPs; the rest is padding.
    """
    found = run([A, B])
    assert found.seconds == 350
    assert found.factors == Factors(slots=1, padding=pytest.approx(643 / 700), imbalance=1, speed=1, data=1)  # type: ignore[arg-type]
    assert found.goodput == pytest.approx(643 / 700)


def test_an_empty_slot_by_hand() -> None:
    """3 samples of A on 2 ranks leave one of 4 slots empty: 300 + 300 of 400 + 300 FLOPs with B's padding."""
    found = run([replace(A, size=3), B])
    assert found.factors.slots == pytest.approx((300 + 243) / (400 + 243))
    assert found.factors.padding == pytest.approx(643 / 700)
    assert found.goodput == pytest.approx(543 / 700)


def test_a_slow_rank_by_hand() -> None:
    disturbances = replace(STILL, speed=0.25)
    slowness = disturbances.slowness(2)
    assert (1 / slowness).mean() == pytest.approx(1) and slowness.min() < 1 < slowness.max() < 1.25 / 0.75
    assert disturbances.slowness(1).tolist() == [1], "alone, none is slower than the others"
    found = run([A, B], disturbances)
    assert found.seconds == pytest.approx(350 * slowness.max())
    assert found.factors.speed == pytest.approx(1 / slowness.max())
    assert found.goodput == pytest.approx(643 / 700 / slowness.max())


@pytest.mark.parametrize(
    ("frames", "seconds"),
    [
        (50, 50 + 350),  # the first batch is waited for, the others are ready in time
        (150, 150 + 150 + 100 + 150),  # A's are late, both times; B decodes nothing
    ],
)
def test_late_data_by_hand(frames: float, seconds: float) -> None:
    found = run([replace(A, frames=frames), B], replace(STILL, jitter=Jitter(seconds=1)))
    assert found.seconds == seconds
    assert found.factors.data == pytest.approx(350 / seconds)


@pytest.mark.parametrize(("prefetch", "waits"), [(1, 150), (2, 50), (3, 0)])
def test_the_queue_by_hand(prefetch: int, waits: float) -> None:
    """Four micro-batches of 100 s; the last one's data takes one rank 250 s. It is begun when that many batches before
    it has been taken: at 200, 100 or 0.
    """
    clock = Clock(2, Disturbances(jitter=Jitter(seconds=1), prefetch=prefetch, flops=1))
    for late in (0.0, 0.0, 0.0, 250.0):
        clock.advance(Micro(200, 200, 100.0, np.array([0.0, late])), 100.0)
    assert clock.end == 400 + waits


def test_uneven_ranks_by_hand() -> None:
    """Loads of 100 and 50, then 30 and 60: 160 s for 240 FLOPs on two ranks."""
    stream = [Micro(150, 150, np.array([100.0, 50.0])), Micro(90, 90, np.array([30.0, 60.0]))]
    factors, seconds = lockstep(stream, ranks=2, disturbances=STILL)
    assert (seconds, factors.imbalance, factors.goodput) == (160, 240 / 320, 240 / 320)


def test_shares_by_hand() -> None:
    """4 samples of 10 tokens and cost 100 in a step, 3 of 9 and 81 in the other; the third row has both at once."""
    shares = run([A, B]).shares
    assert shares.samples == shares.per_sample == (4 / 7, 3 / 7)
    assert shares.draws == shares.per_step == (1 / 2, 1 / 2)
    assert shares.flops == pytest.approx((400 / 643, 243 / 643))
    assert shares.per_token == pytest.approx((40 / 67, 27 / 67))
    mixed = simulate_draws([A, B], np.array([[0, 1], [0, 0]]), ranks=2, disturbances=STILL)
    assert mixed.shares.draws == (3 / 4, 1 / 4)
    assert mixed.shares.per_step == pytest.approx(((4 / 7 + 1) / 2, 3 / 7 / 2))
    assert (mixed.samples.mean, mixed.samples.ratio) == (7.5, 8 / 7)


def test_a_log_normal_has_its_mean_and_percentile() -> None:
    factors = Jitter(seconds=1, p99=3).factors(np.random.default_rng(0))
    assert factors.mean() == pytest.approx(1, abs=0.01)
    assert np.percentile(factors, 99) == pytest.approx(3, abs=0.05)
    measured = Jitter(seconds=1, measured=(2.0, 6.0)).factors(np.random.default_rng(0))
    assert set(measured.tolist()) == {0.5, 1.5}
    with pytest.raises(ValueError, match="p99"):
        Jitter(seconds=1, p99=20)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_balance", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ranks", "global_batch", "least"),
    [(64, 256, 0.95), (96, 192, 0.95), (96, 256, 0.95), (768, 1536, 0.92), (1024, 1024, 0.92), (1024, 2048, 0.92)],
)
def test_the_goal_on_the_mixed_set(bench: ModuleType, ranks: int, global_batch: int, least: float) -> None:
    shape = bench.mesh_of(ranks)
    found = bench.ours(bench.mixed_recipe(global_batch), shape, 1000, bench.DISTURBED)
    assert found.goodput >= least
    assert found.factors.imbalance == 1
    assert found.samples.mean == pytest.approx(global_batch, rel=0.05)


def test_the_rules_that_balance_tokens_do_worse(bench: ModuleType) -> None:
    found = bench.contest(64, 256, 300, bench.DISTURBED)
    best = found.pop("ours")
    assert max(other.goodput for name, other in found.items() if "rounds" not in name) < best.goodput
    assert found["equal tokens"].factors.imbalance < 0.7
    assert [found["equal tokens"].factors.slots, found["one cp"].factors.imbalance] == [1, 1]


@pytest.mark.parametrize("global_batch", [256, 1024, 2048])
def test_samples_keep_the_mixture_of_25_buckets(bench: ModuleType, global_batch: int) -> None:
    """Within 0.5 points after 10,000 steps; per_sample weighs the gradient alike."""
    recipe = bench.mixed_recipe(global_batch)
    weights = np.array([bucket.weight for bucket in recipe.data.buckets])
    assert len(weights) == 25
    batches = plan_batches(recipe)
    drawn = drawn_buckets(batches, steps=10_000, rounds=1, seed=0)
    counts = np.bincount(drawn.ravel(), minlength=25) * np.array(batches.sizes)
    assert np.abs(counts / counts.sum() - weights / weights.sum()).max() < 0.005


def test_10_000_steps_of_1024_ranks_are_quick(bench: ModuleType) -> None:
    """A tenth of them, in a tenth of a generous time."""
    begin = time.perf_counter()
    bench.ours(bench.mixed_recipe(1024), bench.mesh_of(1024), 1000, bench.DISTURBED)
    assert time.perf_counter() - begin < 3
