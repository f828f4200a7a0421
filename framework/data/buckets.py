"""Buckets as views: which samples of which stream can take a bucket's shape.

A video fits when it is no smaller, no slower and no shorter: nothing is enlarged and no frame made up. A latent fits
when it was encoded at exactly the bucket's shape. A sample may fit several buckets; a bucket without any is refused.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from framework.data.config import BucketConfig, StreamConfig
from framework.data.decode import num_source_frames
from framework.data.order import View
from framework.data.shards import LATENT_SCHEMA, SampleInfo, ShardDirectory, open_shards

# How far below a bucket's rate a video may be: 23.976 and 29.97 (NTSC's 1000/1001) count as 24 and 30.
FPS_SLACK = 0.002


@dataclass(frozen=True)
class Stream:
    """An opened stream."""

    config: StreamConfig
    shards: ShardDirectory


def open_streams(configs: list[StreamConfig], *, tokenizer_version: str) -> list[Stream]:
    """Open every stream. Raises ValueError naming the directory or file, also when latents are another tokenizer's."""
    streams = [Stream(config, open_shards(config.path)) for config in configs]
    for stream in streams:
        version = stream.shards.tokenizer_version
        if stream.shards.schema == LATENT_SCHEMA and version != tokenizer_version:
            raise ValueError(
                f"{stream.config.path} holds latents of the tokenizer {version}, the recipe's is {tokenizer_version}: "
                f"encode it again with `cuboid encode`, or choose the recipe's tokenizer to match"
            )
    return streams


def fits(info: SampleInfo, bucket: BucketConfig, *, latent: bool) -> bool:
    """Whether a sample can take the bucket's shape."""
    if not latent:
        return misfit(info, bucket) is None
    same_rate = bucket.fps is None or abs(info.fps - bucket.fps) < 1e-3
    return (info.frames, info.height, info.width) == (bucket.frames, bucket.height, bucket.width) and same_rate


def misfit(info: SampleInfo, bucket: BucketConfig) -> str | None:
    """Why a video doesn't fit a bucket, or None when it does."""
    if info.height < bucket.height or info.width < bucket.width:
        return f"{info.height}x{info.width} pixels are fewer than {bucket.height}x{bucket.width}"
    if bucket.fps is not None and info.fps < bucket.fps * (1 - FPS_SLACK):
        return f"{info.fps:g} frames a second are fewer than {bucket.fps:g}"
    span = num_source_frames(bucket.frames, info.fps, bucket.fps)
    return None if info.frames >= span else f"{info.frames} frames are fewer than the {span} that {bucket.name} takes"


def bucket_views(streams: list[Stream], buckets: list[BucketConfig]) -> list[list[View]]:
    """views[bucket][stream]. Raises ValueError for a bucket that no sample fits, with the reasons counted."""
    views = [[view_of(stream, index, bucket) for index, stream in enumerate(streams)] for bucket in buckets]
    for bucket, row in zip(buckets, views, strict=True):
        if not any(view.num_samples for view in row):
            infos = [info for stream in streams for info in stream.shards.infos]
            shapes = sorted({(info.frames, info.height, info.width) for info in infos}, reverse=True)
            largest = ", ".join("x".join(map(str, shape)) for shape in shapes[:3])
            raise ValueError(
                f"no sample fits the bucket {bucket.clip}: the {len(infos)} samples of the streams are {largest}"
                f"{', ...' if len(shapes) > 3 else ''} (frames x height x width); latents need exactly the "
                f"bucket's shape"
            )
    return views


def view_of(stream: Stream, index: int, bucket: BucketConfig) -> View:
    """The bucket's view of one stream. Its name keys the order, so it holds neither path nor mesh."""
    latent = stream.shards.schema == LATENT_SCHEMA
    kept = np.array([fits(info, bucket, latent=latent) for info in stream.shards.infos], dtype=bool)
    edges = np.cumsum([0, *stream.shards.shard_sizes])
    by_shard = tuple(np.flatnonzero(kept[a:b]) + a for a, b in itertools.pairwise(edges))
    return View(f"{index}/{bucket.name}", by_shard)


def check_held_out(training: list[Stream], held_out: list[Stream]) -> None:
    """Raises ValueError naming a clip that is both trained on and validated on. Segments count as their video."""
    trained = {info.uid.split("@")[0] for stream in training for info in stream.shards.infos}
    shared = sorted(
        {info.uid for stream in held_out for info in stream.shards.infos if info.uid.split("@")[0] in trained}
    )
    if shared:
        raise ValueError(
            f"{len(shared)} of the validation clips are also trained on, {shared[0]} for one: hold them out, or set "
            f"validation.held_out=false"
        )
