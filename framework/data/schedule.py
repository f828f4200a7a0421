"""What happens in a step, as a pure function of (seed, step, the recipe's data keys): schedule[step] -> Work.

A step has `global_batch` slots. A low-discrepancy sequence gives each slot its bucket, another each draw of a bucket
its stream, and the order gives each draw of a stream's view its sample. Only then the mesh comes in: the slots of a
bucket are dealt to its replicas in turn (a bucket with its own degrees has more or fewer of them than dp) and cut into
micro-batches, the same number on every rank. A rank without a slot left gets an empty one, which weighs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from framework.data.buckets import Stream, bucket_views
from framework.data.config import DataConfig
from framework.data.order import Mixture, Order
from framework.keys import key

T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """One sample of a step. position: its place among the step's global_batch slots. draw: names the draw in keys."""

    position: int
    bucket: int
    stream: int
    sample: int
    uid: str
    draw: str


@dataclass(frozen=True)
class Draw:
    """position: of a slot among the step's. number: the how-many-th draw of its bucket since the run began."""

    position: int
    number: int


@dataclass(frozen=True)
class Place:
    """A rank's place among the replicas of a bucket: number `index` of `size`."""

    index: int
    size: int


@dataclass(frozen=True)
class MicroBatch:
    """One forward of one rank: slots of one bucket, None where it is empty."""

    bucket: int
    slots: tuple[Slot | None, ...]


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


class Schedule:
    """schedule[step] -> Work of the rank at `places`, one for each bucket."""

    def __init__(self, config: DataConfig, streams: list[Stream], *, seed: int, places: Sequence[Place]) -> None:
        self._config, self._streams, self._places = config, streams, places
        views = bucket_views(streams, config.buckets)
        self._used = [[i for i, view in enumerate(row) if view.num_samples] for row in views]
        self._orders = [[Order(view, seed, config.window) for view in row] for row in views]
        self._buckets = Mixture([bucket.weight for bucket in config.buckets], key(seed, "buckets"))
        self._sources = [
            Mixture([streams[i].config.weight for i in used], key(seed, "streams", uid=str(bucket)))
            for bucket, used in enumerate(self._used)
        ]

    def __getitem__(self, step: int) -> Work:
        by_bucket = self._draws(step)
        micro: list[MicroBatch] = []
        for bucket, draws in enumerate(by_bucket):
            # Only this rank's draws are looked up: finding a sample costs a permutation each.
            mine = [None if d is None else self._slot(bucket, d) for d in share(draws, self._places[bucket])]
            micro += cut(bucket, mine, self._config.micro_batch)
        return Work(step, tuple(micro), tuple(len(draws) for draws in by_bucket))

    def slots(self, step: int) -> list[Slot]:
        """The step's slots over all ranks, in order: the same on every mesh."""
        made = [self._slot(bucket, draw) for bucket, draws in enumerate(self._draws(step)) for draw in draws]
        return sorted(made, key=lambda slot: slot.position)

    def _draws(self, step: int) -> list[list[Draw]]:
        """Each bucket's draws of a step."""
        first, size = step * self._config.global_batch, self._config.global_batch
        numbers = self._buckets.before(first)
        by_bucket: list[list[Draw]] = [[] for _ in numbers]
        for position, bucket in enumerate(self._buckets.components(first, first + size).tolist()):
            by_bucket[bucket].append(Draw(position, numbers[bucket] + len(by_bucket[bucket])))
        return by_bucket

    def waste(self, steps: int = 64) -> float:
        """Share of the forward slots that are empty, over the first steps."""
        works = [self[step] for step in range(steps)]
        places = sum(len(m.slots) * self._places[m.bucket].size for work in works for m in work.micro_batches)
        return 1 - sum(work.num_samples for work in works) / places

    def _slot(self, bucket: int, draw: Draw) -> Slot:
        source = self._sources[bucket]
        place = int(source.components(draw.number, draw.number + 1)[0])
        stream = self._used[bucket][place]
        epoch, sample = self._orders[bucket][stream].at(source.before(draw.number)[place])
        uid = self._streams[stream].shards.index.uid(sample)
        name = f"{uid}#{self._config.buckets[bucket].name}#{stream}.{epoch}"
        return Slot(draw.position, bucket, stream, sample, uid, name)


def share(members: Sequence[T], place: Place) -> list[T | None]:
    """One replica's share of a bucket's members, dealt in turn; None fills up where they run out."""
    rows = -(-len(members) // place.size)
    padded = [*members, *[None] * (rows * place.size - len(members))]
    return padded[place.index :: place.size]


def cut(bucket: int, slots: list[Slot | None], size: int) -> list[MicroBatch]:
    """Micro-batches of at most `size`: as many, of the same sizes, on every rank."""
    return [MicroBatch(bucket, tuple(slots[i : i + size])) for i in range(0, len(slots), size)]
