"""What happens in a step, as a pure function of (seed, step, the recipe's data keys): schedule[step] -> Work.

A step is `rounds` draws of a bucket. A low-discrepancy sequence gives each draw its bucket, budget.py how many samples
it takes; another sequence gives each of these its stream, and the order gives each draw of a stream's view its sample.
Only then the mesh comes in: the samples of a bucket are dealt to its replicas (a bucket with its own degrees has more
or fewer of them than dp) and cut into micro-batches, the same number on every rank. A rank without a sample left gets
an empty slot, which weighs nothing.

Samples are dealt in the order of the shards that they lie in, in runs: so a node reads the same few shards of a window
step after step, and not all of them.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from framework.data.buckets import Stream, bucket_views
from framework.data.budget import Batches
from framework.data.config import DataConfig
from framework.data.order import Mixture, Order
from framework.keys import key
from framework.shapes import even_parts

T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """One sample of a step. position: its place among those of its bucket in the step. draw: names the draw in keys."""

    position: int
    bucket: int
    stream: int
    sample: int
    uid: str
    draw: str


@dataclass(frozen=True)
class Draws:
    """A bucket's samples in a step, `n` each, in the order of streams and shards. positions: in the order of the draws.
    samples: in their streams.
    """

    bucket: int
    positions: np.ndarray
    streams: np.ndarray
    epochs: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Place:
    """A rank's place among the replicas of a bucket: number `index` of `size`."""

    index: int
    size: int


@dataclass(frozen=True)
class MicroBatch:
    """One forward of one rank: slots of one bucket, None where it is empty. bucket_samples: of its bucket in its step,
    over all ranks.
    """

    bucket: int
    slots: tuple[Slot | None, ...]
    bucket_samples: int


@dataclass(frozen=True)
class Work:
    """A step of one rank. counts: samples a bucket over all ranks."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    counts: tuple[int, ...]

    @property
    def num_micro(self) -> int:
        return len(self.micro_batches)

    @property
    def num_samples(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Position:
    """Where a stream's view stands: whole passes over it, and samples of the one that has begun."""

    bucket: int
    stream: int
    epoch: int
    count: int


class Schedule:
    """schedule[step] -> Work of the rank at `places`, one a bucket. micro_sizes: samples of a forward, likewise. first:
    the data step at which a stage of the run begins; all but schedule[step] and Work count from there.
    """

    def __init__(
        self,
        config: DataConfig,
        streams: list[Stream],
        *,
        seed: int,
        batches: Batches,
        places: Sequence[Place],
        micro_sizes: Sequence[int],
        first: int = 0,
    ) -> None:
        self._config, self._streams, self._first = config, streams, first
        self.batches = batches
        self._places, self._micro_sizes = places, micro_sizes
        self._views = bucket_views(streams, config.buckets)
        self._used = [[i for i, view in enumerate(row) if view.num_samples] for row in self._views]
        self._orders = [[Order(view, seed, config.window) for view in row] for row in self._views]
        self._buckets = Mixture(list(batches.shares), key(seed, "buckets"))
        self._sources = [
            Mixture([streams[i].config.weight for i in used], key(seed, "streams", uid=str(bucket)))
            for bucket, used in enumerate(self._used)
        ]

    def __getitem__(self, step: int) -> Work:
        by_bucket = self.draws(step - self._first)
        micro: list[MicroBatch] = []
        for draws in by_bucket:
            place, size = self._places[draws.bucket], self._micro_sizes[draws.bucket]
            mine = [None if i is None else self._slot(draws, i) for i in share(len(draws), place)]
            micro += cut(draws.bucket, mine, size, bucket_samples=len(draws))
        counts = {draws.bucket: len(draws) for draws in by_bucket}
        return Work(step, tuple(micro), tuple(counts.get(bucket, 0) for bucket in range(len(self._config.buckets))))

    def slots(self, step: int) -> list[Slot]:
        """The step's slots over all ranks, in order: the same on every mesh."""
        made = [self._slot(draws, i) for draws in self.draws(step) for i in range(len(draws))]
        return sorted(made, key=lambda slot: (slot.bucket, slot.position))

    def counts(self, step: int) -> tuple[int, ...]:
        """Samples of each bucket in a step."""
        drawn = self._drawn(step).tolist()
        return tuple(size * drawn.count(bucket) for bucket, size in enumerate(self.batches.sizes))

    def position(self, step: int) -> list[Position]:
        """Where each view stands before a step."""
        found = []
        for bucket, numbers in enumerate(self._buckets.before(step * self._config.rounds)):
            taken = self._sources[bucket].before(numbers * self.batches.sizes[bucket])
            for stream, count in zip(self._used[bucket], taken, strict=True):
                found.append(Position(bucket, stream, *divmod(count, self._views[bucket][stream].num_samples)))
        return found

    def samples(self, step: int) -> int:
        """Samples of all steps before one, over all ranks."""
        numbers = self._buckets.before(step * self._config.rounds)
        return sum(number * size for number, size in zip(numbers, self.batches.sizes, strict=True))

    def steps_for(self, samples: int, step: int) -> int:
        """How many steps from `step` on it takes to have so many samples: at least one."""
        wanted = self.samples(step) + samples
        return 1 + bisect_left(range(step + 1, step + samples), wanted, key=self.samples)

    def draws(self, step: int) -> list[Draws]:
        """Each bucket's samples of a step, for the buckets that have any."""
        drawn = self._drawn(step)
        before = self._buckets.before(step * self._config.rounds)
        found = []
        for bucket in sorted(set(drawn.tolist())):
            size = self.batches.sizes[bucket]
            found.append(self._look_up(bucket, before[bucket] * size, size * int((drawn == bucket).sum())))
        return found

    def waste(self, steps: int = 64) -> float:
        """Share of the forward slots that are empty, over the first steps."""
        counts = np.sum([self.counts(step) for step in range(steps)], axis=0)
        places = 0
        for step in range(steps):
            for place, count in zip(self._places, self.counts(step), strict=True):
                places += -(-count // place.size) * place.size
        return float(1 - counts.sum() / places)

    def _drawn(self, step: int) -> np.ndarray:
        """The buckets of a step's rounds."""
        return self._buckets.components(step * self._config.rounds, (step + 1) * self._config.rounds)

    def _look_up(self, bucket: int, first: int, count: int) -> Draws:
        """`count` samples of a bucket, from number `first`."""
        source, used = self._sources[bucket], self._used[bucket]
        components = source.components(first, first + count)
        streams, epochs, samples = (np.empty(count, dtype=np.int64) for _ in range(3))
        for place, start in enumerate(source.before(first)):
            where = components == place
            streams[where] = used[place]
            epochs[where], samples[where] = self._orders[bucket][used[place]].run(start, int(where.sum()))
        order = np.lexsort((samples, streams))
        return Draws(bucket, order, streams[order], epochs[order], samples[order])

    def _slot(self, draws: Draws, i: int) -> Slot:
        stream, sample = int(draws.streams[i]), int(draws.samples[i])
        uid = self._streams[stream].shards.index.uid(sample)
        name = f"{uid}#{self._config.buckets[draws.bucket].name}#{stream}.{draws.epochs[i]}"
        return Slot(int(draws.positions[i]), draws.bucket, stream, sample, uid, name)


def share(num: int, place: Place) -> list[int | None]:
    """One replica's run of `num` things; None fills up to the longest run."""
    sizes = even_parts(num, place.size)
    first = sum(sizes[: place.index])
    return [*range(first, first + sizes[place.index]), *[None] * (sizes[0] - sizes[place.index])]


def pick(things: Sequence[T], place: Place) -> list[T | None]:
    """One replica's run of some things."""
    return [None if i is None else things[i] for i in share(len(things), place)]


def cut(bucket: int, slots: Sequence[Slot | None], size: int, *, bucket_samples: int) -> list[MicroBatch]:
    """As few micro-batches of at most `size` as there can be, of about equal sizes: the same on every rank."""
    found, first = [], 0
    for part in even_parts(len(slots), -(-len(slots) // size)):
        found.append(MicroBatch(bucket, tuple(slots[first : first + part]), bucket_samples))
        first += part
    return found
