"""The schedule: the same slots on every mesh, dealt evenly, and the waste that follows."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

from framework.data.buckets import Stream
from framework.data.config import BucketConfig, DataConfig, StreamConfig
from framework.data.index import SampleIndex, SampleInfo, index_of
from framework.data.schedule import MicroBatch, Place, Schedule, Slot, cut, share
from framework.data.shards import LATENT_SCHEMA, Schema

DEGREES = [1, 2, 3, 4, 5, 8]


@dataclass
class Shards:
    """What the schedule reads of a ShardDirectory."""

    index: SampleIndex
    shard_sizes: list[int]
    schema: Schema = LATENT_SCHEMA
    tokenizer_version: str = "t"
    url: str = field(default="d")

    def __len__(self) -> int:
        return len(self.index)


def stream(prefix: str, frames: list[int], *, weight: float = 1.0, schema: Schema = LATENT_SCHEMA) -> Stream:
    """Samples of these lengths at 16x16, three a shard."""
    infos = [SampleInfo(f"{prefix}{i}", f, 16, 16, 24.0) for i, f in enumerate(frames)]
    sizes = [3] * (len(infos) // 3) + ([len(infos) % 3] if len(infos) % 3 else [])
    return Stream(StreamConfig(prefix, weight), Shards(index_of(infos), sizes, schema))  # type: ignore[arg-type]


def config(
    *, global_batch: int, micro_batch: int = 1, lengths: tuple[int, ...] = (5,), weights: tuple[float, ...] = ()
) -> DataConfig:
    buckets = [BucketConfig(f, 16, 16, w) for f, w in zip(lengths, weights or [1.0] * len(lengths), strict=True)]
    return DataConfig(streams=[], buckets=buckets, global_batch=global_batch, micro_batch=micro_batch)


MIXED = [stream("a", [5, 9] * 7, weight=3.0), stream("b", [5] * 10, weight=1.0)]


def ranks(config_: DataConfig, streams: list[Stream], dp: int, seed: int = 0) -> list[Schedule]:
    return [Schedule(config_, streams, seed=seed, places=[Place(i, dp)] * 2) for i in range(dp)]


def members(micro_batches: tuple[MicroBatch, ...]) -> list[Slot]:
    return [slot for micro in micro_batches for slot in micro.slots if slot is not None]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("dp", DEGREES)
def test_every_mesh_deals_the_same_slots_evenly(dp: int, micro_batch: int) -> None:
    data = config(global_batch=7, micro_batch=micro_batch, lengths=(5, 9), weights=(2.0, 1.0))
    reference = Schedule(data, MIXED, seed=0, places=[Place(0, 1)] * 2)
    for step in (0, 1, 29, 100_000):
        works = [schedule[step] for schedule in ranks(data, MIXED, dp)]
        dealt = [slot for work in works for slot in members(work.micro_batches)]
        assert sorted(dealt, key=lambda slot: slot.position) == reference.slots(step)
        shapes = {tuple((m.bucket, len(m.slots)) for m in work.micro_batches) for work in works}
        assert len(shapes) == 1, "as many micro-batches of the same bucket and size on every rank"
        assert all(1 <= size <= micro_batch for _, size in shapes.pop())
        assert {work.counts for work in works} == {tuple(Counter(s.bucket for s in dealt)[b] for b in (0, 1))}
        assert all(slot.bucket == m.bucket for w in works for m in w.micro_batches for slot in m.slots if slot)
        assert works[0].num_samples == 7 and [slot.position for slot in reference.slots(step)] == list(range(7))


def test_deal_by_hand() -> None:
    slots = [Slot(i, 0, 0, i, str(i), str(i)) for i in range(7)]
    first, second = (cut(0, share(slots, Place(index, 2)), 3) for index in (0, 1))
    assert [[slot and slot.position for slot in m.slots] for m in first] == [[0, 2, 4], [6]]
    assert [[slot and slot.position for slot in m.slots] for m in second] == [[1, 3, 5], [None]]
    assert cut(0, share([], Place(0, 2)), 3) == []


@pytest.mark.parametrize(
    ("global_batch", "dp", "micro_batch", "empty"),
    [
        (8, 1, 1, 0.0),
        (8, 2, 2, 0.0),
        (8, 3, 1, 1 / 9),  # 3 rows of 3 places
        (8, 3, 2, 1 / 9),  # a row of 2 and a row of 1: no place more
        (8, 5, 1, 2 / 10),
        (1, 4, 1, 3 / 4),
    ],
)
def test_the_waste_by_hand(global_batch: int, dp: int, micro_batch: int, empty: float) -> None:
    data = config(global_batch=global_batch, micro_batch=micro_batch)
    assert Schedule(data, MIXED, seed=0, places=[Place(0, dp)] * 2).waste() == pytest.approx(empty, abs=1e-12)


def test_the_waste_of_two_buckets_counts_both() -> None:
    """Two buckets by half, two slots a step, two ranks: whether they fall on one bucket or on two decides."""
    data = config(global_batch=2, lengths=(5, 9))
    schedule = Schedule(data, MIXED, seed=0, places=[Place(0, 2)] * 2)
    split = [len({slot.bucket for slot in schedule.slots(step)}) for step in range(64)]
    assert set(split) == {1, 2}
    assert schedule.waste() == pytest.approx(1 - 64 * 2 / sum(2 * n for n in split))


def test_no_sample_is_lost_or_repeated_over_steps() -> None:
    """One stream of 10 samples, 4 a step, over 5 steps: two epochs, the second starting inside a step."""
    schedule = Schedule(config(global_batch=4), [MIXED[1]], seed=3, places=[Place(0, 1)] * 2)
    drawn = [slot for step in range(5) for slot in schedule.slots(step)]
    assert [Counter(slot.uid for slot in part) for part in (drawn[:10], drawn[10:])] == [
        Counter(f"b{i}" for i in range(10))
    ] * 2
    assert len({slot.draw for slot in drawn}) == 20, "a draw names the epoch too"


def test_streams_keep_their_shares_and_buckets_their_samples() -> None:
    data = config(global_batch=50, lengths=(5, 9), weights=(4.0, 1.0))
    schedule = Schedule(data, MIXED, seed=0, places=[Place(0, 1)] * 2)
    drawn = [slot for step in range(40) for slot in schedule.slots(step)]
    buckets, sources = Counter(s.bucket for s in drawn), Counter(s.stream for s in drawn if s.bucket == 0)
    assert abs(buckets[0] / 2000 - 0.8) < 0.005 and abs(sources[0] / buckets[0] - 0.75) < 0.01
    assert {slot.stream for slot in drawn if slot.bucket == 1} == {0}, "only the first stream has clips of 9 frames"
    for slot in drawn:
        info = MIXED[slot.stream].shards.index[slot.sample]
        assert (info.uid, info.frames) == (slot.uid, (5, 9)[slot.bucket])


def test_the_seed_decides() -> None:
    data = config(global_batch=8, lengths=(5, 9))
    one, same, other = (Schedule(data, MIXED, seed=seed, places=[Place(0, 1)] * 2).slots(3) for seed in (1, 1, 2))
    assert one == same and one != other


def test_draws_are_unique_within_a_step() -> None:
    """Noise is keyed by the draw: a clip that fits two buckets, both in their first epoch, is two draws."""
    videos = [stream("v", [9] * 4, schema="cuboid.video/1")]
    schedule = Schedule(config(global_batch=8, lengths=(5, 9)), videos, seed=0, places=[Place(0, 1)] * 2)
    for step in range(4):
        draws = [slot.draw for slot in schedule.slots(step)]
        assert len(set(draws)) == len(draws)
