"""What a recipe will do with its data on a mesh, before a rank starts: `cuboid data report`. Imports no torch.

For each bucket: what fits it and what is cut off, its batch and degrees, its shares; what fits no bucket and why; how
often each stream is seen, what is read, and the goodput to expect (goodput.py). The numbers are those of the schedule
itself: the same functions cut its steps.

A sample that fits no bucket is counted once, by the first reason of its nearest bucket: the one that it misses for the
fewest reasons, of those the first in the recipe.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from framework.data.buckets import Stream, bucket_views, cropped_share, misfits, source_span
from framework.data.budget import plan_batches
from framework.data.goodput import (
    BucketWork,
    Disturbances,
    Factors,
    Shares,
    Spread,
    bucket_works,
    count_draws,
    drawn_buckets,
    shares_of,
    simulate,
    spread_of,
)
from framework.data.index import SampleIndex
from framework.data.order import View
from framework.data.schedule import Place, Schedule
from framework.data.shards import LATENT_SCHEMA
from framework.data.splits import resolve_degrees
from framework.parallel.config import MeshShape
from framework.recipe import Recipe, bucket_degrees
from framework.shapes import even_parts

# A view that is seen more often is warned of.
MOST_EPOCHS = 10
# Of the shares: they settle long before.
MOST_STEPS = 100_000
SPEED = 0.03


@dataclass(frozen=True)
class BucketReport:
    """A bucket on a mesh. samples: that fit it, of all streams; hours: their length. tokens: of a sample. batch:
    samples of a draw. replicas: samples done at once. micro_batches: samples of one replica in each of a draw's.

    share_samples, share_flops, share_gradient: over the run's steps; the gradient's by `loss.weight`. Means over its
    draws: cropped_pixels, what the crop to its aspect ratio cuts off a picture, and cropped_frames, the part of a video
    that one clip doesn't span. padded_tokens, empty_slots: shares of what the ranks compute that is filling.
    """

    name: str
    samples: int
    hours: float
    tokens: int
    batch: int
    ring: int
    ulysses: int
    replicas: int
    micro_batches: tuple[int, ...]
    share_samples: float
    share_flops: float
    share_gradient: float
    cropped_pixels: float
    cropped_frames: float
    padded_tokens: float
    empty_slots: float


@dataclass(frozen=True)
class StreamReport:
    """A stream. hours: of its videos, or encoded clips. dropped: samples that fit no bucket, by reason. epochs: that
    each bucket sees of it by the run's last step. cache_bytes: for one window of every bucket; 0 for a directory,
    which isn't cached.
    """

    path: str
    holds: str
    samples: int
    hours: float
    num_bytes: int
    dropped: Mapping[str, int]
    epochs: Mapping[str, float]
    cache_bytes: int


@dataclass(frozen=True)
class Report:
    """mesh: its degrees. steps: of the run. loss_weight: whose shares of the gradient these are. step_bytes, run_bytes:
    of the samples that are read, by all ranks together. samples_a_step: over the run. goodput, factors: expected, over
    simulated_steps, with ranks up to `speed` slower or faster and data always ready.
    """

    mesh: Mapping[str, int]
    ranks: int
    steps: int
    global_batch: int
    rounds: int
    loss_weight: str
    buckets: tuple[BucketReport, ...]
    streams: tuple[StreamReport, ...]
    step_bytes: float
    run_bytes: float
    samples_a_step: Spread
    goodput: float
    factors: Factors
    speed: float
    simulated_steps: int
    warnings: tuple[str, ...]


def report_of(recipe: Recipe, streams: list[Stream], shape: MeshShape, *, steps: int = 1000) -> Report:
    """steps: simulated at most. Raises ValueError where the schedule itself does: a bucket without a sample."""
    recipe = resolve_degrees(recipe, shape)
    views = bucket_views(streams, recipe.data.buckets)
    works = bucket_works(recipe, shape)
    run = min(recipe.train.steps, MOST_STEPS)
    drawn = drawn_buckets(plan_batches(recipe), steps=run, rounds=recipe.data.rounds, seed=recipe.seed)
    draws = count_draws(drawn, len(works))
    counts = draws * np.array([work.size for work in works])
    shares = shares_of(works, draws, counts)
    simulated = min(recipe.train.steps, steps)
    found = simulate(recipe, shape, steps=simulated, disturbances=Disturbances(speed=SPEED))
    epochs = epochs_of(recipe, streams, views, works, shape=shape)
    told = tuple(
        report_stream(recipe, stream, [row[i] for row in views], epochs[i]) for i, stream in enumerate(streams)
    )
    step_bytes = expected_bytes(recipe, streams, views)
    return Report(
        mesh=asdict(shape),
        ranks=shape.world_size,
        steps=recipe.train.steps,
        global_batch=recipe.data.global_batch,
        rounds=recipe.data.rounds,
        loss_weight=recipe.loss.weight,
        buckets=report_buckets(recipe, streams, views, works, shares, shape=shape),
        streams=told,
        step_bytes=step_bytes,
        run_bytes=step_bytes * recipe.train.steps,
        samples_a_step=spread_of(counts),
        goodput=found.goodput,
        factors=found.factors,
        speed=SPEED,
        simulated_steps=simulated,
        warnings=tuple(warnings_of(recipe, told)),
    )


def to_json(report: Report) -> dict[str, object]:
    """The report as plain values."""
    return dataclasses.asdict(report)


def report_buckets(
    recipe: Recipe,
    streams: list[Stream],
    views: list[list[View]],
    works: Sequence[BucketWork],
    shares: Shares,
    *,
    shape: MeshShape,
) -> tuple[BucketReport, ...]:
    """views[bucket][stream]."""
    gradient: tuple[float, ...] = getattr(shares, recipe.loss.weight)
    found = []
    for i, (bucket, work) in enumerate(zip(recipe.data.buckets, works, strict=True)):
        used = [(stream, view) for stream, view in zip(streams, views[i], strict=True) if view.num_samples]
        chosen = [columns(stream, view) for stream, view in used]
        pixels, frames = [], []
        for (stream, _), index in zip(used, chosen, strict=True):
            is_video = stream.shards.schema != LATENT_SCHEMA
            pixels.append(float(cropped_share(index, bucket).mean()) if is_video else 0.0)
            frames.append(float((1 - source_span(index, bucket) / index.frames).mean()) if is_video else 0.0)
        weights = [stream.config.weight for stream, _ in used]
        ring, ulysses = bucket_degrees(recipe, i)
        replicas = shape.world_size // work.parts
        rows = -(-work.size // replicas)
        found.append(
            BucketReport(
                name=bucket.name,
                samples=sum(len(index) for index in chosen),
                hours=sum(hours(index) for index in chosen),
                tokens=work.tokens,
                batch=work.size,
                ring=ring,
                ulysses=ulysses,
                replicas=replicas,
                micro_batches=tuple(even_parts(rows, -(-rows // work.micro))),
                share_samples=shares.samples[i],
                share_flops=shares.flops[i],
                share_gradient=gradient[i],
                cropped_pixels=float(np.average(pixels, weights=weights)),
                cropped_frames=float(np.average(frames, weights=weights)),
                padded_tokens=1 - work.tokens / (-(-work.tokens // work.parts) * work.parts),
                empty_slots=1 - work.size / (rows * replicas),
            )
        )
    return tuple(found)


def report_stream(recipe: Recipe, stream: Stream, views: list[View], epochs: Mapping[str, float]) -> StreamReport:
    """views: of each bucket."""
    files, index = stream.shards.files, stream.shards.index
    largest = recipe.data.window * max(file.num_bytes for file in files)
    total = sum(file.num_bytes for file in files)
    is_latent = stream.shards.schema == LATENT_SCHEMA
    return StreamReport(
        path=stream.config.path,
        holds="latents" if is_latent else "videos",
        samples=len(index),
        hours=hours(index),
        num_bytes=total,
        dropped=dropped(recipe, stream, views),
        epochs=epochs,
        cache_bytes=min(total, largest * len(epochs)) if "://" in stream.config.path else 0,
    )


def dropped(recipe: Recipe, stream: Stream, views: list[View]) -> dict[str, int]:
    """Reason -> samples that fit no bucket, each counted once; the most frequent first."""
    out = np.ones(len(stream.shards), dtype=bool)
    for view in views:
        out[slice(None) if view.indices is None else view.indices] = False
    index = pick_columns(stream.shards.index, np.flatnonzero(out))
    fewest = np.full(len(index), np.iinfo(np.int64).max)
    reason = np.zeros(len(index), dtype=np.int64)
    names: tuple[str, ...] = ()
    for bucket in recipe.data.buckets:
        found = misfits(index, bucket, latent=stream.shards.schema == LATENT_SCHEMA)
        names, which = tuple(found), np.stack(list(found.values()))
        nearer = which.sum(axis=0) < fewest
        fewest[nearer] = which.sum(axis=0)[nearer]
        reason[nearer] = which.argmax(axis=0)[nearer]
    return dict(Counter(names[i] for i in reason.tolist()).most_common())


def epochs_of(
    recipe: Recipe,
    streams: list[Stream],
    views: list[list[View]],
    works: Sequence[BucketWork],
    *,
    shape: MeshShape,
) -> list[dict[str, float]]:
    """For each stream: bucket -> passes over its view by the run's last step. views[bucket][stream]."""
    schedule = Schedule(
        recipe.data,
        streams,
        seed=recipe.seed,
        batches=plan_batches(recipe),
        places=[Place(0, shape.world_size // work.parts) for work in works],
        micro_sizes=[work.micro for work in works],
    )
    found: list[dict[str, float]] = [{} for _ in streams]
    for at in schedule.position(recipe.train.steps):
        size = views[at.bucket][at.stream].num_samples
        found[at.stream][recipe.data.buckets[at.bucket].name] = at.epoch + at.count / size
    return found


def expected_bytes(recipe: Recipe, streams: list[Stream], views: list[list[View]]) -> float:
    """Bytes of a step's samples, on average."""
    total = 0.0
    for row, expected in zip(views, plan_batches(recipe).expected(recipe.data.rounds), strict=True):
        used = [i for i, view in enumerate(row) if view.num_samples]
        weights = [streams[i].config.weight for i in used]
        total += expected * float(np.average([sample_bytes(streams[i], row[i]) for i in used], weights=weights))
    return total


def sample_bytes(stream: Stream, view: View) -> float:
    """Bytes of a view's sample on average, each taken as the mean of its shard."""
    mean = np.array([file.num_bytes / file.num_samples for file in stream.shards.files])
    return float(np.average(mean, weights=np.diff(view.edges)))


def warnings_of(recipe: Recipe, streams: Sequence[StreamReport]) -> list[str]:
    """What a person should look at before the run."""
    found = []
    for stream in streams:
        often = {name: epochs for name, epochs in stream.epochs.items() if epochs > MOST_EPOCHS}
        if often:
            most = max(often, key=lambda name: often[name])
            found.append(
                f"{stream.path} is repeated: {len(often)} of its {len(stream.epochs)} buckets see theirs more than "
                f"{MOST_EPOCHS} times by step {recipe.train.steps}, {most} {often[most]:,.1f} times; lower the weight "
                f"of the bucket or the stream, or add data"
            )
    needed, cache = sum(stream.cache_bytes for stream in streams), recipe.data.cache.gigabytes
    if needed > cache * 1e9:
        found.append(
            f"data.cache.gigabytes={cache:g} is below one window of every bucket, {needed / 1e9:.3g} GB on each node: "
            f"shards are fetched again and again; raise it, or lower data.window={recipe.data.window}"
        )
    return found


def columns(stream: Stream, view: View) -> SampleIndex:
    """The index of a view's samples."""
    index = stream.shards.index
    return index if view.indices is None else pick_columns(index, view.indices)


def pick_columns(index: SampleIndex, which: np.ndarray) -> SampleIndex:
    """Some samples of an index."""
    return SampleIndex(
        index.uids[which],
        index.frames[which],
        index.heights[which],
        index.widths[which],
        index.fps[which],
        {name: column[which] for name, column in index.scores.items()},
    )


def hours(index: SampleIndex) -> float:
    """Length of the samples together."""
    return float((index.frames / index.fps).sum() / 3600)
