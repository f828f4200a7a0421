"""The schedule: the same slots on every mesh, dealt evenly, and the waste that follows."""

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from framework.data import schedule
from framework.data.buckets import Stream
from framework.data.budget import Batches
from framework.data.config import BucketConfig, DataConfig, StreamConfig
from framework.data.index import SampleIndex, SampleInfo, index_of
from framework.data.order import Order, View
from framework.data.schedule import MicroBatch, Place, Position, Schedule, Slot, cut, pick
from framework.data.shards import LATENT_SCHEMA, Schema

pytestmark = pytest.mark.alone  # work is timed

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
    *,
    global_batch: int,
    lengths: tuple[int, ...] = (5,),
    weights: tuple[float, ...] = (),
    rounds: int = 1,
) -> DataConfig:
    buckets = [BucketConfig(f, 16, 16, w) for f, w in zip(lengths, weights or [1.0] * len(lengths), strict=True)]
    return DataConfig(streams=[], buckets=buckets, global_batch=global_batch, rounds=rounds)


def build(
    data: DataConfig,
    streams: list[Stream],
    place: Place = Place(0, 1),  # noqa: B008
    *,
    seed: int = 0,
    sizes: tuple[int, ...] = (),
    micro: int = 1,
) -> Schedule:
    weights = [bucket.weight for bucket in data.buckets]
    batches = Batches(
        sizes or (data.global_batch // data.rounds,) * len(weights), tuple(w / sum(weights) for w in weights)
    )
    places, micros = [place] * len(weights), [micro] * len(weights)
    return Schedule(data, streams, seed=seed, batches=batches, places=places, micro_sizes=micros)


MIXED = [stream("a", [5, 9] * 7, weight=3.0), stream("b", [5] * 10, weight=1.0)]


def members(micro_batches: tuple[MicroBatch, ...]) -> list[Slot]:
    return [slot for micro in micro_batches for slot in micro.slots if slot is not None]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("dp", DEGREES)
def test_every_mesh_deals_the_same_slots_evenly(dp: int, micro_batch: int) -> None:
    data = config(global_batch=21, lengths=(5, 9), weights=(2.0, 1.0), rounds=3)
    reference = build(data, MIXED, sizes=(7, 4))
    for step in (0, 1, 29, 100_000):
        works = [build(data, MIXED, Place(i, dp), sizes=(7, 4), micro=micro_batch)[step] for i in range(dp)]
        dealt = [slot for work in works for slot in members(work.micro_batches)]
        assert sorted(dealt, key=lambda slot: (slot.bucket, slot.position)) == reference.slots(step)
        shapes = {tuple((m.bucket, len(m.slots)) for m in work.micro_batches) for work in works}
        assert len(shapes) == 1, "as many micro-batches of the same bucket and size on every rank"
        assert all(1 <= size <= micro_batch for _, size in shapes.pop())
        assert {work.counts for work in works} == {tuple(Counter(s.bucket for s in dealt)[b] for b in (0, 1))}
        assert all(slot.bucket == m.bucket for w in works for m in w.micro_batches for slot in m.slots if slot)
        assert all(m.bucket_samples == w.counts[m.bucket] for w in works for m in w.micro_batches)
        assert (
            works[0].counts == reference.counts(step)
            and sum(n // s for n, s in zip(works[0].counts, (7, 4), strict=True)) == 3
        )
        assert [slot.position for slot in reference.slots(step)] == [i for n in works[0].counts for i in range(n)]


def test_deal_by_hand() -> None:
    slots = [Slot(i, 0, 0, i, str(i), str(i)) for i in range(7)]
    dealt = [pick(slots, Place(index, 2)) for index in (0, 1)]
    first, second = (cut(0, mine, 3, bucket_samples=7) for mine in dealt)
    assert [[slot and slot.position for slot in m.slots] for m in first] == [[0, 1], [2, 3]]
    assert [[slot and slot.position for slot in m.slots] for m in second] == [[4, 5], [6, None]]


def test_a_rank_reads_neighbours() -> None:
    """16 shards of 3, 24 samples a step over 4 ranks: a rank's six samples come from few shards, in order."""
    wide = stream("w", [5] * 48)
    data = config(global_batch=24)
    for rank in range(4):
        for step in range(4):
            (slots,) = [members(build(data, [wide], Place(rank, 4))[step].micro_batches)]
            samples = [slot.sample for slot in slots]
            assert samples == sorted(samples)
            everywhere = sorted(slot.sample for slot in build(data, [wide]).slots(step))
            assert samples == everywhere[6 * rank : 6 * rank + 6]


@pytest.mark.parametrize(
    ("global_batch", "dp", "empty"), [(8, 1, 0.0), (8, 2, 0.0), (8, 3, 1 / 9), (8, 5, 2 / 10), (1, 4, 3 / 4)]
)
def test_the_waste_by_hand(global_batch: int, dp: int, empty: float) -> None:
    assert build(config(global_batch=global_batch), MIXED, Place(0, dp)).waste() == pytest.approx(empty, abs=1e-12)


def test_no_sample_is_lost_or_repeated_over_steps() -> None:
    """One stream of 10 samples, 4 a step, over 5 steps: two epochs, the second starting inside a step."""
    schedule = build(config(global_batch=4), [MIXED[1]], seed=3)
    drawn = [slot for step in range(5) for slot in schedule.slots(step)]
    assert [Counter(slot.uid for slot in part) for part in (drawn[:10], drawn[10:])] == [
        Counter(f"b{i}" for i in range(10))
    ] * 2
    assert len({slot.draw for slot in drawn}) == 20, "a draw names the epoch too"
    assert schedule.position(3) == [Position(0, 0, 1, 2)], "after 12 samples of 10"


def test_streams_keep_their_shares_and_buckets_their_samples() -> None:
    """The batch of the second bucket is a quarter of the first one's: it is drawn four times as often for its share."""
    data = config(global_batch=50, lengths=(5, 9), weights=(4.0, 1.0))
    schedule = build(data, MIXED, sizes=(40, 10))
    drawn = [slot for step in range(160) for slot in schedule.slots(step)]
    buckets, sources = Counter(s.bucket for s in drawn), Counter(s.stream for s in drawn if s.bucket == 0)
    assert abs(buckets[0] / len(drawn) - 0.8) < 0.01 and abs(sources[0] / buckets[0] - 0.75) < 0.01
    assert {slot.stream for slot in drawn if slot.bucket == 1} == {0}, "only the first stream has clips of 9 frames"
    for slot in drawn:
        info = MIXED[slot.stream].shards.index[slot.sample]
        assert (info.uid, info.frames) == (slot.uid, (5, 9)[slot.bucket])


def test_the_seed_decides() -> None:
    data = config(global_batch=8, lengths=(5, 9))
    one, same, other = (build(data, MIXED, seed=seed).slots(3) for seed in (1, 1, 2))
    assert one == same and one != other


def test_draws_are_unique_within_a_step() -> None:
    """Noise is keyed by the draw: a clip that fits two buckets, both in their first epoch, is two draws."""
    videos = [stream("v", [9] * 4, schema="cuboid.video/1")]
    schedule = build(config(global_batch=8, lengths=(5, 9), rounds=2), videos)
    for step in range(4):
        draws = [slot.draw for slot in schedule.slots(step)]
        assert len(set(draws)) == len(draws)


def test_any_step_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 buckets over 10^8 samples in 10^6 shards: the first step after a resume at step 10^7 within a second."""
    edges = np.arange(0, 10**8 + 1, 100)
    views = [[View(f"0/{number}", None, edges)] for number in range(25)]
    monkeypatch.setattr(schedule, "bucket_views", lambda streams, buckets: views)
    data = config(global_batch=256, lengths=tuple(range(5, 105, 4)), rounds=4)
    streams = [stream("a", [5] * 3)]
    monkeypatch.setattr(SampleIndex, "uid", lambda self, index: f"sample{index}")
    begin = time.perf_counter()
    work = build(data, streams, Place(3, 16))[10**7]
    assert time.perf_counter() - begin < 3, "three times the second that it may take: machines are shared"
    found = members(work.micro_batches)
    assert len(found) == len({slot.sample for slot in found}) == 16 and work.num_samples == 256
    epochs, samples = Order(views[0][0], 7, 8).run(3 * 10**8 + 12345, 256)
    assert set(epochs.tolist()) == {3} and len({sample // 100 for sample in samples.tolist()}) <= 8


def test_positions_stratify_each_bucket() -> None:
    """Noise levels are stratified by position / bucket_samples: every bucket's places fill its own range."""
    data = config(global_batch=20, lengths=(5, 9), weights=(1.0, 4.0), rounds=4)
    for step in range(8):
        micros = build(data, MIXED, sizes=(2, 8), micro=3)[step].micro_batches
        for bucket in {micro.bucket for micro in micros}:
            mine = [micro for micro in micros if micro.bucket == bucket]
            (count,) = {micro.bucket_samples for micro in mine}
            assert sorted(slot.position for micro in mine for slot in micro.slots if slot) == list(range(count))
