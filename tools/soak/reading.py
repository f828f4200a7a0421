"""What a soak of streaming reads with: ranks that take batches as training does and tell what was in them, no model.

The data are two kinds of latents and short videos, in shards small enough for many of them. What is expected of a step
is what one process without a mesh gets of it from a directory, uninterrupted.
"""

import hashlib
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from framework.batch import Batch
from framework.data.buckets import streams_of
from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import LATENT_SCHEMA, VIDEO_SCHEMA, Caption, LatentSample, Schema, VideoSample
from framework.diffusion.video_file import write_mp4
from framework.environment import Environment
from framework.parallel.collectives import barrier
from framework.parallel.mesh import Mesh
from framework.programs import build
from framework.recipe import Recipe, load_recipe
from framework.shapes import ClipShape, latent_shape
from framework.tokenizer.config import DctConfig, TokenizerConfig, tokenizer_strides, tokenizer_version

TOKENIZER = TokenizerConfig("dct", DctConfig(8))
SHORT, LONG, VIDEO = ClipShape(5, 16, 16), ClipShape(9, 16, 32), ClipShape(5, 32, 32)
SHAPES = ((SHORT, 3.0), (LONG, 2.0), (VIDEO, 1.0))
SHARD_BYTES = 4096

# One sample of a step: its place among the step's, its draw, and the hash of its latents.
Seen = tuple[int, str, str]


@dataclass(frozen=True)
class Plan:
    """One attempt: a recipe with overrides, the step that it starts from, its ranks, and where the store is: a fork
    server that has been started earlier has an older environment.
    """

    recipe: Path
    overrides: tuple[str, ...]
    start: int
    num_ranks: int
    store: dict[str, str] = field(default_factory=lambda: {k: v for k, v in os.environ.items() if k.startswith("AWS_")})


def make_data(folder: Path, *, num_latents: int = 90, num_videos: int = 7) -> dict[str, Path]:
    """Shards by name of their stream."""
    for name, clip in (("short", SHORT), ("long", LONG)):
        write(folder / name, LATENT_SCHEMA, make_latents(name, clip, num_latents))
    write(folder / "videos", VIDEO_SCHEMA, make_videos(folder, num_videos))
    return {name: folder / name for name in ("short", "long", "videos")}


def make_latents(name: str, clip: ClipShape, num: int) -> list[LatentSample]:
    """Random latents of one shape."""
    rng, shape = np.random.default_rng(len(name)), latent_shape(clip, tokenizer_strides(TOKENIZER))
    size = (8, shape.frames, shape.height, shape.width)
    samples = []
    for number in range(num):
        info = SampleInfo(f"{name}{number}@0", clip.frames, clip.height, clip.width, 24.0)
        samples.append(LatentSample(info, rng.standard_normal(size).astype(np.float32), (Caption(f"{number}"),)))
    return samples


def make_videos(folder: Path, num: int) -> list[VideoSample]:
    """Short videos of noise."""
    videos: list[VideoSample] = []
    for number in range(num):
        frames = torch.randint(0, 255, (9 + number, 40, 40, 3), dtype=torch.uint8)
        write_mp4(folder / "video.mp4", frames, 8.0)
        info = SampleInfo(f"video{number}", 9 + number, 40, 40, 8.0)
        videos.append(VideoSample(info, (folder / "video.mp4").read_bytes(), (Caption(f"video {number}"),)))
    return videos


def write(out: Path, schema: Schema, samples: Sequence[LatentSample | VideoSample]) -> None:
    """A directory of shards."""
    version = tokenizer_version(TOKENIZER) if schema == LATENT_SCHEMA else None
    with ShardWriter(
        out, schema=schema, tokenizer_version=version, part_size=1000, shard_bytes=SHARD_BYTES * 2
    ) as writer:
        for sample in samples:
            writer.write(sample.info.uid, "made", [sample])
        writer.finish()


def write_recipe(path: Path, streams: Sequence[str], shapes: Sequence[tuple[ClipShape, float]] = SHAPES) -> Path:
    """A recipe on these streams. shapes: of its buckets, with their weights."""
    buckets = [
        {"frames": clip.frames, "height": clip.height, "width": clip.width, "weight": weight} for clip, weight in shapes
    ]
    model = {"in_channels": 8, "out_channels": 8, "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 12}
    tree = {
        "run": str(path.with_suffix(".run")),
        "mesh": {"dp": "auto"},
        "tokenizer": {"name": "dct", "dct": {"coefficients": 8}},
        "text": {"name": "bytes", "bytes": {"max_length": 8}},
        "model": {**model, "ffn_dim": 32, "freq_dim": 32, "text_dim": 256},
        "data": {
            "streams": [{"path": stream} for stream in streams],
            "buckets": buckets,
            "global_batch": 24,
            "rounds": 2,
            "window": 3,
            "micro_batch": 2,
        },
        "train": {"steps": 100000},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def read_steps(recipe: Recipe, mesh: Mesh, *, start: int) -> Iterator[tuple[int, list[Batch], list[Mesh]]]:
    """Step, this rank's batches of it, and the mesh of each bucket, from `start` on."""
    streams = streams_of(recipe)
    meshes = build.bucket_meshes(recipe, mesh)
    schedule = build.build_schedule(recipe, streams, meshes)
    builder = build.build_builder(recipe, streams, build.Encoders(recipe), dropout=0.0, workers=recipe.data.workers)
    loader = build.build_loader(recipe, streams, builder, schedule, meshes=meshes, start=start)
    try:
        while True:
            work = loader.next_work()
            yield work.step, list(loader.batches(work)), meshes
    finally:
        loader.close()


def seen_of(batch: Batch) -> list[Seen]:
    """What was in a batch."""
    hashes = [hashlib.sha256(latents.numpy().tobytes()).hexdigest()[:16] for latents in batch.latents]
    kept = zip(batch.positions, batch.draws, hashes, batch.weights.tolist(), strict=True)
    return [(position, draw, digest) for position, draw, digest, weight in kept if weight]


def rank_main(plan: Plan, rank: int, port: int, pipe: Connection) -> None:
    """A rank: tells (step, samples that it read for its replica, samples that it only received) after each step."""
    os.environ.update(plan.store)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)})
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(plan.num_ranks), "SOAK": str(plan.recipe)})
    try:
        torch.set_num_threads(1)
        env = Environment(rank=rank, world_size=plan.num_ranks, local_rank=rank, failures=None)
        recipe = build.settle(load_recipe(plan.recipe, list(plan.overrides)), env)
        mesh = build.open_mesh(recipe, env)
        for step, batches, meshes in read_steps(recipe, mesh, start=plan.start):
            own: list[Seen] = []
            received: list[Seen] = []
            for batch in batches:
                (own if meshes[batch.bucket].replica.index == 0 else received).extend(seen_of(batch))
            barrier(mesh.control)
            pipe.send((step, own, received))
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def expected_steps(recipe_path: Path, num_steps: int) -> list[list[Seen]]:
    """The samples of the first steps in order, by one process. In a process of its own: it joins a group."""
    env = Environment(rank=0, world_size=1, local_rank=0, failures=None)
    folder = Path(tempfile.mkdtemp())
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"})
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=0, world_size=1)
    recipe = build.settle(load_recipe(recipe_path, []), env)
    mesh = build.open_mesh(recipe, env)
    found = []
    for step, batches, _ in read_steps(recipe, mesh, start=0):
        if step == num_steps:
            break
        found.append(sorted(seen for batch in batches for seen in seen_of(batch)))
    return found


def expected_main(recipe_path: Path, num_steps: int, pipe: Connection) -> None:
    """`expected_steps`, told to another process."""
    result: Any
    try:
        result = expected_steps(recipe_path, num_steps)
    except BaseException:
        result = traceback.format_exc()
    pipe.send(result)
