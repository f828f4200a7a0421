"""How much of the ranks' time is useful work: the schedule played through on simulated ranks. Imports no torch.

    goodput = useful FLOPs / (ranks x FLOP/s of a rank x time)

ZeRO makes the ranks wait for each other in every micro-batch, so they run in lockstep. Rank r begins micro-batch i when
all have ended the one before and its own batch is ready, and works on it for load / FLOP/s x its slowness:

    end_i     = max over r of  begin_ri + load_ri slowness_r / FLOP/s,    begin_ri = max(end_{i-1}, ready_ri)
    ready_ri  = max(ready_r{i-1}, begin_r{i-prefetch}) + data time

The loader of a rank prepares one micro-batch after the other, at most `prefetch` of them ahead, so a rank waits only
when its queue is empty. The goodput is the product of five factors, each the ratio of two such times, one cause more in
the second:

    slots      samples that don't deal out evenly over the ranks: empty slots
    padding    tokens filled up to a multiple of the ranks that share a sample
    imbalance  ranks with different loads in one micro-batch; 1 by construction where all work on one bucket
    speed      the slowest rank is waited for
    data       batches that aren't ready

A load is a S^2 + b S FLOPs for each sample (`training_cost`); an empty slot and a padded token cost what a full one
does. Under an attention pattern the pairs that attend take the place of S^2, and the ranks that share a sample wait for
the one with the most of them: what that costs is counted as padding. What ranks send, the update and saving are not in
it: it is the share that the order of the data leaves.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from framework.data.budget import Batches, micro_sizes, plan_batches
from framework.data.order import Mixture
from framework.kernels.pattern import attended_pairs
from framework.keys import key
from framework.models.config import training_cost
from framework.parallel.config import MeshShape, split_shape
from framework.plan.bucket import bucket_pairs, bucket_pattern
from framework.recipe import Recipe, bucket_degrees, bucket_tokens
from framework.shapes import even_parts
from framework.text.config import text_length

# Data times are drawn once and taken from a random place of this many: a draw for each rank and micro-batch would take
# most of the simulation's time.
BANK = 1 << 20


@dataclass(frozen=True)
class Jitter:
    """Data time. seconds: of a rank for one frame that it decodes, on average. p99: the 99th percentile of a
    micro-batch's time over its mean, of a log-normal distribution. measured: times to draw from instead, in any unit.
    """

    seconds: float
    p99: float = 1.0
    measured: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.p99 < 14.9:
            raise ValueError(f"p99={self.p99} over the mean must lie in [1, 14.9): no log-normal has more")

    def factors(self, rng: np.random.Generator) -> np.ndarray:
        """Times over their mean, `BANK`. ln p99 = z sigma - sigma^2 / 2 with the normal's z = 2.326."""
        if self.measured:
            times = np.array(self.measured)
            return rng.choice(times / times.mean(), BANK)
        if self.p99 == 1:
            return np.ones(BANK)
        z = 2.3263478740408408
        sigma = z - math.sqrt(z * z - 2 * math.log(self.p99))
        return np.exp(sigma * rng.standard_normal(BANK) - sigma * sigma / 2)


@dataclass(frozen=True)
class Disturbances:
    """speed: ranks are up to this share faster or slower than their mean, uniformly, each the same all through the run.
    jitter: data time, None = always ready. prefetch: micro-batches prepared ahead. flops: FLOP/s of a rank, on average
    over the ranks. seed: of the draws.
    """

    speed: float = 0.0
    jitter: Jitter | None = None
    prefetch: int = 2
    flops: float = 4e14
    seed: int = 0

    def slowness(self, ranks: int) -> np.ndarray:
        """Time of each rank for what one of mean speed does in 1, `ranks`."""
        speeds = 1 + self.speed * np.random.default_rng([self.seed, 1]).uniform(-1, 1, ranks)
        return speeds.mean() / speeds


@dataclass(frozen=True)
class BucketWork:
    """A bucket on a mesh. tokens: of a sample. cost: FLOPs of training on it. padded: the same with its padded tokens.
    size: samples of a draw. parts: ranks that share a sample. micro: samples of one forward. frames: decoded for one
    sample, those that are thrown away included.
    """

    tokens: int
    cost: float
    padded: float
    size: int
    parts: int
    micro: int
    frames: float = 0.0


@dataclass(frozen=True)
class Micro:
    """One micro-batch of all ranks. useful: FLOPs of its samples. filled: with empty slots. loads: FLOPs of each rank
    with padding, `ranks`, or one number for all. frames: that each rank decodes, likewise.
    """

    useful: float
    filled: float
    loads: np.ndarray | float
    frames: np.ndarray | float = 0.0


@dataclass(frozen=True)
class Factors:
    """What each cause leaves of the time; their product is the goodput."""

    slots: float
    padding: float
    imbalance: float
    speed: float
    data: float

    @property
    def goodput(self) -> float:
        return self.slots * self.padding * self.imbalance * self.speed * self.data


@dataclass(frozen=True)
class Shares:
    """Each bucket's part of the samples, the draws and the FLOPs, and of the gradient by `loss.weight`."""

    samples: tuple[float, ...]
    draws: tuple[float, ...]
    flops: tuple[float, ...]
    per_sample: tuple[float, ...]
    per_token: tuple[float, ...]
    per_step: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """Samples a step: 5th percentile, mean, 95th percentile, and the most over the least."""

    p5: float
    mean: float
    p95: float
    ratio: float


@dataclass(frozen=True)
class Goodput:
    """What a simulation found. seconds: of all its steps."""

    factors: Factors
    shares: Shares
    samples: Spread
    seconds: float
    steps: int
    ranks: int

    @property
    def goodput(self) -> float:
        return self.factors.goodput


def bucket_works(recipe: Recipe, shape: MeshShape, *, frames: Sequence[float] = ()) -> list[BucketWork]:
    """Each bucket's work on a mesh, its degrees resolved (splits.py). frames: decoded for a sample of each bucket."""
    a, b = training_cost(recipe.model, text=text_length(recipe.text))
    num = len(recipe.data.buckets)
    tokens = [bucket_tokens(recipe, index).num_tokens for index in range(num)]
    splits = [split_shape(shape, *bucket_degrees(recipe, index)) for index in range(num)]
    micros = micro_sizes(
        recipe.data.micro_batch,
        [n / split.cp + text_length(recipe.text) for n, split in zip(tokens, splits, strict=True)],
    )
    works = []
    for index, size in enumerate(plan_batches(recipe).sizes):
        count, parts = tokens[index], splits[index].replica
        padded = -(-count // parts) * parts
        cost = a * bucket_pairs(recipe, index) + b * count
        filled = a * busiest_pairs(recipe, index, splits[index]) + b * padded
        decoded = frames[index] if frames else 0.0
        works.append(BucketWork(count, cost, filled, size, parts, micros[index], decoded))
    return works


def busiest_pairs(recipe: Recipe, index: int, split: MeshShape) -> int:
    """Pairs of tokens of a bucket's clip that attend, if all ranks of the ring had as many as the one with the most;
    where all tokens attend to each other, padding included.
    """
    count, pattern = bucket_tokens(recipe, index).num_tokens, bucket_pattern(recipe, index)
    part = -(-count // split.replica) * (split.replica // split.ring)
    if pattern.config.name == "full":
        return (part * split.ring) ** 2
    spans = [(min(count, rank * part), min(count, (rank + 1) * part)) for rank in range(split.ring)]
    return split.ring * max(attended_pairs(pattern, count, span) for span in spans)


def simulate(
    recipe: Recipe,
    shape: MeshShape,
    *,
    steps: int,
    disturbances: Disturbances,
    frames: Sequence[float] = (),
) -> Goodput:
    """The first steps of a recipe's schedule on a mesh. The recipe's degrees are resolved (splits.py)."""
    works = bucket_works(recipe, shape, frames=frames)
    drawn = drawn_buckets(plan_batches(recipe), steps=steps, rounds=recipe.data.rounds, seed=recipe.seed)
    return simulate_draws(works, drawn, ranks=shape.world_size, disturbances=disturbances)


def drawn_buckets(batches: Batches, *, steps: int, rounds: int, seed: int) -> np.ndarray:
    """The bucket of every draw of the schedule, `steps rounds`."""
    return Mixture(list(batches.shares), key(seed, "buckets")).components(0, steps * rounds).reshape(steps, rounds)


def simulate_draws(
    works: Sequence[BucketWork], drawn: np.ndarray, *, ranks: int, disturbances: Disturbances
) -> Goodput:
    """Given draws, `steps rounds`, of one bucket for all ranks each."""
    draws = count_draws(drawn, len(works))
    counts = draws * np.array([work.size for work in works])
    factors, seconds = lockstep(schedule_micros(works, draws, ranks=ranks), ranks=ranks, disturbances=disturbances)
    return Goodput(factors, shares_of(works, draws, counts), spread_of(counts), seconds, len(drawn), ranks)


def count_draws(drawn: np.ndarray, buckets: int) -> np.ndarray:
    """How often each step draws each bucket, `steps buckets`."""
    return np.stack([(drawn == bucket).sum(axis=1) for bucket in range(buckets)], axis=1)


def schedule_micros(works: Sequence[BucketWork], draws: np.ndarray, *, ranks: int) -> Iterator[Micro]:
    """The micro-batches of steps that draw each bucket so many times, `steps buckets`: as `Schedule` cuts them."""
    made: dict[tuple[int, int], list[Micro]] = {}
    for step, bucket in zip(*np.nonzero(draws), strict=True):
        what = int(bucket), int(draws[step, bucket])
        if what not in made:
            made[what] = _cut(works[bucket], works[bucket].size * what[1], ranks)
        yield from made[what]


def _cut(work: BucketWork, count: int, ranks: int) -> list[Micro]:
    """The micro-batches of some samples of a bucket. Its replicas' first ranks decode."""
    replicas = ranks // work.parts
    rows = -(-count // replicas)
    leads = np.arange(ranks) % work.parts == 0
    return [
        Micro(
            useful=count * work.cost * slots / rows,
            filled=replicas * slots * work.cost,
            loads=slots * work.padded / work.parts,
            frames=leads * slots * work.frames,
        )
        for slots in even_parts(rows, -(-rows // work.micro))
    ]


def lockstep(micros: Iterable[Micro], *, ranks: int, disturbances: Disturbances) -> tuple[Factors, float]:
    """What each cause leaves, and the seconds that the micro-batches take."""
    useful = filled = padded = equal = nominal = uneven = 0.0
    clock = Clock(ranks, disturbances)
    slowest = float(clock.slowness.max())
    for micro in micros:
        useful += micro.useful
        filled += micro.filled
        if isinstance(micro.loads, np.ndarray):
            padded += float(micro.loads.sum())
            equal += float(micro.loads.max())
            uneven = float((micro.loads * clock.slowness).max())
        else:
            padded += micro.loads * ranks
            equal += micro.loads
            uneven = micro.loads * slowest
        nominal += uneven
        clock.advance(micro, uneven)
    equal_all = equal * ranks
    factors = Factors(useful / filled, filled / padded, padded / equal_all, equal / nominal, nominal / clock.end)
    return factors, clock.end / disturbances.flops


class Clock:
    """When the ranks have ended a micro-batch. end: in FLOPs of a rank of mean speed, so that without late data it is
    the sum of the loads and nothing is rounded.
    """

    def __init__(self, ranks: int, disturbances: Disturbances) -> None:
        self.slowness = disturbances.slowness(ranks)
        self.end = 0.0
        self._jitter = disturbances.jitter
        self._frame = 0.0 if self._jitter is None else self._jitter.seconds * disturbances.flops
        self._rng = np.random.default_rng([disturbances.seed, 2])
        self._factors = np.ones(1) if self._jitter is None else self._jitter.factors(self._rng)
        self._ready = np.zeros(ranks)
        # When the last batches were taken from each rank's queue, the oldest first.
        self._begins = deque([np.zeros(ranks)] * disturbances.prefetch, maxlen=disturbances.prefetch)

    def advance(self, micro: Micro, slowest: float) -> None:
        """slowest: FLOPs of the slowest rank times its slowness."""
        if self._jitter is None:
            self.end += slowest
            return
        ranks = len(self.slowness)
        first = int(self._rng.integers(len(self._factors) - ranks + 1))
        data = self._factors[first : first + ranks] * (self._frame * micro.frames)
        self._ready = np.maximum(self._ready, self._begins[0]) + data
        begin = np.maximum(self._ready, self.end)
        self._begins.append(begin)
        self.end = float((begin + micro.loads * self.slowness).max())


def shares_of(works: Sequence[BucketWork], draws: np.ndarray, counts: np.ndarray) -> Shares:
    """draws, counts: of each bucket in each step, `steps buckets`. Weights as in diffusion/flow.py: a clip weighs the
    same with per_sample, as its tokens with per_token, and one over the clips of its step with per_step.
    """
    samples = counts.sum(axis=0)
    tokens = samples * np.array([work.tokens for work in works])
    flops = samples * np.array([work.cost for work in works])
    by_step = (counts / counts.sum(axis=1, keepdims=True)).sum(axis=0)
    sums = (samples, draws.sum(axis=0), flops, samples, tokens, by_step)
    return Shares(*(tuple((part / part.sum()).tolist()) for part in sums))


def spread_of(counts: np.ndarray) -> Spread:
    """Samples a step, from those of each bucket, `steps buckets`."""
    totals = counts.sum(axis=1)
    low, high = np.percentile(totals, [5, 95])
    return Spread(float(low), float(totals.mean()), float(high), float(totals.max() / totals.min()))
