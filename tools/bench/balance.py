"""Goodput of the schedule on a mixed set, beside other rules, on the same simulated ranks (framework/data/goodput.py).

    python tools/bench/balance.py [--steps 10000] [--ranks 64 96 768 1024] [--still] [--video FILE]

The set: 256x448, 480x832 and 720x1280 at 16 frames a second, 1 to 10 s in eight steps, and images: 25 buckets, for a
14B Wan. Weights fall with duration and resolution, a fifth of the samples are images. Ranks are up to 3 % slower or
faster and do 400 TFLOP/s. A rank's eight workers decode a frame in 2 ms, p99 three times the mean (measured on
the test clip, 720p, one core: 14.5 ms, 2.6 times; `--video` measures again). They decode half as many frames again as
are used (24 frames a second) and a second of video before them (keyframes every two). The rules:

    ours         a draw of one bucket for all ranks, its batch from a cost budget, its degrees `auto`
    rounds=N     the same, N draws a step: the samples of a step vary less
    one cp       ours with the mesh's degrees for every bucket
    equal tokens every replica draws its own bucket, and as many samples as the longest clip has tokens: the usual
                 default of token-bucketed loaders
    double bound AdaptiveLoad (arXiv 2605.17923), read as: a replica draws its own bucket and takes as many samples as
                 stay below M tokens and below the S^2 of the longest clip, min(M / S, S_max^2 / S^2), at least one. M
                 is the best for it of 1, 2, 4 and 8 times S_max; whether that fits into memory isn't asked

In the last two a bucket is drawn in proportion to weight / samples of a draw, which keeps the mixture, and a step has
as many micro-batches as come nearest to the global batch. The replica there is the mesh's, 8 ranks. What ranks send
each other is in none of them: the last line of a mesh says how finely ours splits samples for its even deal.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from framework.data.config import BucketConfig, DataConfig, StreamConfig
from framework.data.goodput import (
    BucketWork,
    Disturbances,
    Factors,
    Goodput,
    Jitter,
    Micro,
    bucket_works,
    lockstep,
    shares_of,
    simulate,
    spread_of,
)
from framework.data.splits import resolve_degrees
from framework.models.config import ModelConfig
from framework.parallel.config import MeshConfig, MeshShape
from framework.recipe import Recipe
from framework.text.config import BytesConfig, TextConfig
from framework.tokenizer.config import DctConfig, TokenizerConfig

RESOLUTIONS = ((256, 448, 0.40), (480, 832, 0.30), (720, 1280, 0.10))
# Seconds and their part of a resolution's samples.
DURATIONS = ((1, 0.20), (2, 0.22), (3, 0.18), (4, 0.13), (5, 0.12), (6, 0.07), (8, 0.05), (10, 0.03))
IMAGES = BucketConfig(1, 480, 832, 0.20)
FPS, CP = 16, 8
NATIVE_FPS, KEYFRAMES = 24.0, 48
BATCHES = ((64, 256), (64, 512), (96, 192), (96, 256), (96, 384), (768, 768), (768, 1536), (1024, 1024), (1024, 2048))
DISTURBED = Disturbances(speed=0.03, jitter=Jitter(seconds=0.002, p99=3.0))


def mixed_recipe(global_batch: int, *, rounds: int = 1, degrees: Literal["mesh", "auto"] = "auto") -> Recipe:
    """The mixed set and the model."""
    buckets = [IMAGES] + [
        BucketConfig(FPS * seconds + 1, height, width, share * part, fps=FPS)
        for height, width, share in RESOLUTIONS
        for seconds, part in DURATIONS
    ]
    return Recipe(
        model=ModelConfig(in_channels=16, out_channels=16, text_dim=256),
        tokenizer=TokenizerConfig("dct", DctConfig(16)),
        text=TextConfig("bytes", BytesConfig(512)),
        mesh=MeshConfig(ulysses=CP),
        data=DataConfig(
            [StreamConfig("none")], buckets, global_batch, rounds, degrees="auto" if degrees == "auto" else "mesh"
        ),
    )


def mesh_of(ranks: int) -> MeshShape:
    return MeshShape(ranks // CP, 1, CP, 1)


def decoded_frames(recipe: Recipe) -> list[float]:
    """Frames decoded for a sample: from the keyframe before it, at the native rate."""
    return [(bucket.frames - 1) * NATIVE_FPS / FPS + 1 + KEYFRAMES / 2 for bucket in recipe.data.buckets]


def ours(recipe: Recipe, shape: MeshShape, steps: int, disturbances: Disturbances) -> Goodput:
    recipe = resolve_degrees(recipe, shape)
    return simulate(recipe, shape, steps=steps, disturbances=disturbances, frames=decoded_frames(recipe))


def independent(
    recipe: Recipe, shape: MeshShape, steps: int, disturbances: Disturbances, *, bounds: tuple[float, float]
) -> Goodput:
    """Every replica draws its own bucket. bounds: tokens, and tokens squared, of a micro-batch, over the longest's."""
    works = bucket_works(recipe, shape, frames=decoded_frames(recipe))
    weights = np.array([bucket.weight for bucket in recipe.data.buckets])
    tokens = np.array([work.tokens for work in works], dtype=float)
    longest = tokens.max() / tokens
    sizes = np.maximum(1, np.floor(np.minimum(bounds[0] * longest, bounds[1] * longest**2))).astype(int)
    odds = weights / sizes / (weights / sizes).sum()
    per_draw = float((odds * sizes).sum())
    micros = max(1, round(recipe.data.global_batch / (shape.dp * per_draw)))
    drawn = np.random.default_rng([disturbances.seed, 3]).choice(len(works), (steps, micros, shape.dp), p=odds)
    draws = np.stack([(drawn == bucket).sum(axis=(1, 2)) for bucket in range(len(works))], axis=1)
    stream = replica_micros(works, sizes, drawn.reshape(-1, shape.dp), shape)
    factors, seconds = lockstep(stream, ranks=shape.world_size, disturbances=disturbances)
    counts = draws * sizes
    return Goodput(factors, shares_of(works, draws, counts), spread_of(counts), seconds, steps, shape.world_size)


def replica_micros(
    works: Sequence[BucketWork], sizes: np.ndarray, drawn: np.ndarray, shape: MeshShape
) -> Iterator[Micro]:
    """drawn: each replica's bucket in each micro-batch, `micro-batches replicas`."""
    cost = sizes * np.array([work.cost for work in works])
    load = sizes * np.array([work.padded / work.parts for work in works])
    frames = sizes * np.array([work.frames for work in works])
    leads = np.arange(shape.world_size) % shape.replica == 0
    for row in drawn:
        useful = float(cost[row].sum())
        yield Micro(useful, useful, np.repeat(load[row], shape.replica), np.repeat(frames[row], shape.replica) * leads)


def contest(ranks: int, global_batch: int, steps: int, disturbances: Disturbances) -> dict[str, Goodput]:
    """The four rules on a mesh."""
    shape = mesh_of(ranks)
    recipe, fixed = mixed_recipe(global_batch), mixed_recipe(global_batch, degrees="mesh")
    short = min(steps, 300)
    bound = max(
        (1.0, 2.0, 4.0, 8.0),
        key=lambda m: independent(fixed, shape, short, disturbances, bounds=(m, 1.0)).goodput,
    )
    mixing = {
        f"ours, rounds={rounds}": ours(mixed_recipe(global_batch, rounds=rounds), shape, steps, disturbances)
        for rounds in (2, 4)
    }
    return {
        "ours": ours(recipe, shape, steps, disturbances),
        **mixing,
        "one cp": ours(fixed, shape, steps, disturbances),
        "equal tokens": independent(fixed, shape, steps, disturbances, bounds=(1.0, np.inf)),
        f"double bound, M={bound:g}": independent(fixed, shape, steps, disturbances, bounds=(bound, 1.0)),
    }


def measured(video: Path) -> Jitter:
    """Data time of 60 clips of 33 frames from anywhere in a video, shared out to eight workers."""
    from framework.data.decode import decode_clip, probe
    from framework.shapes import ClipShape

    data, times = video.read_bytes(), []
    starts = np.random.default_rng(0).integers(0, probe(video).frames - 33, 60)
    for start in starts.tolist():
        begin = time.perf_counter()
        decode_clip(data, start=start, clip=ClipShape(33, 256, 448))
        times.append(time.perf_counter() - begin)
    print(f"decoding: {1e3 * np.mean(times) / 33:.1f} ms a frame, p99 {np.percentile(times, 99) / np.mean(times):.2f}")
    return Jitter(float(np.mean(times)) / 33 / 8, measured=tuple(times))


def split_line(ranks: int, global_batch: int) -> str:
    """How many ranks share a sample in ours."""
    shape = mesh_of(ranks)
    works = bucket_works(resolve_degrees(mixed_recipe(global_batch), shape), shape)
    widest, finest = max(works, key=lambda work: work.parts), min(works, key=lambda work: work.tokens / work.parts)
    return (
        f"  ours: up to {widest.parts} ranks share a sample ({widest.tokens} tokens); fewest tokens a rank "
        f"{finest.tokens // finest.parts} ({finest.parts} ranks)"
    )


def row_of(name: str, found: Goodput, weights: np.ndarray) -> str:
    factors, samples = found.factors, found.samples
    causes = " ".join(f"{100 * (1 - getattr(factors, cause)):9.2f}" for cause in Factors.__dataclass_fields__)
    off = 100 * np.abs(np.array(found.shares.samples) - weights / weights.sum()).max()
    return (
        f"  {name:20} {100 * found.goodput:7.2f} {causes}   {samples.p5:6.0f} {samples.mean:7.1f} {samples.p95:6.0f} "
        f"{samples.ratio:6.1f} {off:7.2f}"
    )


def main() -> None:
    from machine import machine  # imports torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 96, 768, 1024])
    parser.add_argument("--still", action="store_true", help="no disturbance")
    parser.add_argument("--video", type=Path, help="measure data times on this file")
    words = parser.parse_args()
    print(" ".join(f"{name}={value}" for name, value in machine().items()))
    disturbances = replace(DISTURBED, speed=0.0, jitter=None) if words.still else DISTURBED
    if words.video is not None:
        disturbances = replace(disturbances, jitter=measured(words.video))
    noise = (
        "data always ready" if disturbances.jitter is None else f"{1e3 * disturbances.jitter.seconds:.2f} ms a frame"
    )
    print(f"{words.steps} steps, ranks within {disturbances.speed:.0%}, {noise}; goodput and losses in %")
    for ranks, global_batch in BATCHES:
        if ranks not in words.ranks:
            continue
        begin = time.perf_counter()
        weights = np.array([bucket.weight for bucket in mixed_recipe(global_batch).data.buckets])
        print(f"\n{ranks} ranks, {mesh_of(ranks)}, global batch {global_batch}")
        print(
            f"  {'':20} goodput {' '.join(f'{cause:>9}' for cause in Factors.__dataclass_fields__)}   samples/step p5, "
            f"mean, p95, max/min; mixture off by (points)"
        )
        for name, found in contest(ranks, global_batch, words.steps, disturbances).items():
            print(row_of(name, found, weights))
        print(f"{split_line(ranks, global_batch)}; all took {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
