"""What happens in a step, as a pure function of (seed, step, the recipe's data keys): schedule[step] -> Work.

A step has `global_batch` slots. A low-discrepancy sequence gives each slot its bucket, another each draw of a bucket
its stream, and the order gives each draw of a stream's view its sample. Only then the mesh comes in: the slots of a
bucket are dealt to the dp ranks in turn and cut into micro-batches, the same number on every rank. A rank without a
slot left gets an empty one, which weighs nothing.
"""

from dataclasses import dataclass

from framework.data.buckets import Stream, bucket_views
from framework.data.config import DataConfig
from framework.data.order import Mixture, Order
from framework.keys import key


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
    """schedule[step] -> Work of the dp rank `dp_index` of `dp`."""

    def __init__(self, config: DataConfig, streams: list[Stream], *, seed: int, dp: int, dp_index: int) -> None:
        self._config, self._streams = config, streams
        self._dp, self._dp_index = dp, dp_index
        views = bucket_views(streams, config.buckets)
        self._used = [[i for i, view in enumerate(row) if view.num_samples] for row in views]
        self._orders = [[Order(view, seed, config.window) for view in row] for row in views]
        self._buckets = Mixture([bucket.weight for bucket in config.buckets], key(seed, "buckets"))
        self._sources = [
            Mixture([streams[i].config.weight for i in used], key(seed, "streams", uid=str(bucket)))
            for bucket, used in enumerate(self._used)
        ]

    def slots(self, step: int) -> list[Slot]:
        """The step's slots over all ranks: the same on every mesh."""
        first = step * self._config.global_batch
        draws = self._buckets.before(first)
        made = []
        for position, bucket in enumerate(self._buckets.components(first, first + self._config.global_batch)):
            made.append(self._slot(position, int(bucket), int(draws[bucket])))
            draws[bucket] += 1
        return made

    def __getitem__(self, step: int) -> Work:
        slots = self.slots(step)
        by_bucket = [[slot for slot in slots if slot.bucket == b] for b in range(len(self._config.buckets))]
        micro = [
            m
            for bucket, members in enumerate(by_bucket)
            for m in deal(bucket, members, dp=self._dp, dp_index=self._dp_index, size=self._config.micro_batch)
        ]
        return Work(step, tuple(micro), tuple(len(members) for members in by_bucket))

    def waste(self, steps: int = 64) -> float:
        """Share of the forward slots that are empty, over the first steps."""
        works = [self[step] for step in range(steps)]
        places = sum(len(m.slots) for work in works for m in work.micro_batches) * self._dp
        return 1 - sum(work.num_samples for work in works) / places

    def _slot(self, position: int, bucket: int, draw: int) -> Slot:
        source = self._sources[bucket]
        place = int(source.components(draw, draw + 1)[0])
        stream = self._used[bucket][place]
        epoch, sample = self._orders[bucket][stream].at(int(source.before(draw)[place]))
        uid = self._streams[stream].shards.infos[sample].uid
        return Slot(
            position, bucket, stream, sample, uid, f"{uid}#{self._config.buckets[bucket].name}#{stream}.{epoch}"
        )


def deal(bucket: int, members: list[Slot], *, dp: int, dp_index: int, size: int) -> list[MicroBatch]:
    """One dp rank's share of a bucket's slots, in micro-batches of at most `size`: as many, of the same sizes, on
    every rank.
    """
    rows = -(-len(members) // dp)
    padded = [*members, *[None] * (rows * dp - len(members))]
    mine = padded[dp_index::dp]
    return [MicroBatch(bucket, tuple(mine[i : i + size])) for i in range(0, rows, size)]
