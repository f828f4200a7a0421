"""Buckets as views: which samples of which stream can take a bucket's shape.

A video fits when it is no smaller, no slower and no shorter: nothing is enlarged and no frame made up; an image is a
video of one frame, and any frame of a video is an image. A latent fits when it was encoded at exactly the bucket's
shape. A bucket may also ask for the least value of a score, and for the most that is cropped away. A sample may fit
several buckets; a bucket without any is refused.
"""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from framework.data.config import BucketConfig, StreamConfig
from framework.data.decode import num_source_frames
from framework.data.index import SampleIndex, SampleInfo, index_of
from framework.data.order import View
from framework.data.shards import LATENT_SCHEMA, ShardDirectory, open_shards
from framework.recipe import Recipe
from framework.text.version import text_version
from framework.tokenizer.config import tokenizer_version

# How far below a bucket's rate a video may be: 23.976 and 29.97 (NTSC's 1000/1001) count as 24 and 30.
FPS_SLACK = 0.002


@dataclass(frozen=True)
class Stream:
    """An opened stream."""

    config: StreamConfig
    shards: ShardDirectory


def open_streams(configs: list[StreamConfig], *, tokenizer: str, text: str | None = None) -> list[Stream]:
    """Open every stream. Raises ValueError naming the directory or file, also when latents are another tokenizer's, or
    texts that are stored with them another encoder's. tokenizer, text: their versions; text None checks no text.
    """
    streams = [Stream(config, open_shards(config.path)) for config in configs]
    for stream in streams:
        version = stream.shards.tokenizer_version
        if stream.shards.schema == LATENT_SCHEMA and version != tokenizer:
            raise ValueError(
                f"{stream.config.path} holds latents of the tokenizer {version}, the recipe's is "
                f"{tokenizer or 'not named'}: encode it again with `cuboid encode`, or choose the recipe's tokenizer "
                f"to match (tokenizer.name=latents takes them by tokenizer.latents.version={version})"
            )
        stored = stream.shards.text_version
        if None not in (stored, text) and stored != text:
            raise ValueError(
                f"{stream.config.path} holds texts of the encoder {stored}, the recipe's is {text or 'not named'}: "
                f"encode it again with `cuboid encode` (--reuse {stream.config.path} keeps its latents), or choose the "
                f"recipe's text encoder to match (text.name=stored takes them by text.stored.version={stored})"
            )
    return streams


def streams_of(recipe: Recipe, configs: list[StreamConfig] | None = None) -> list[Stream]:
    """The recipe's streams, or others, opened and checked against its tokenizer and text encoder. Raises ValueError."""
    streams = open_streams(
        recipe.data.streams if configs is None else configs,
        tokenizer=tokenizer_version(recipe.tokenizer),
        text=text_version(recipe.text),
    )
    for stream in streams:
        check_encoded(stream, recipe)
    return streams


def check_encoded(stream: Stream, recipe: Recipe) -> None:
    """Raises ValueError for pixels or captions that the recipe has no encoder for."""
    path, shards = stream.config.path, stream.shards
    if recipe.tokenizer.name == "latents" and shards.schema != LATENT_SCHEMA:
        raise ValueError(f"{path} holds videos, and tokenizer.name=latents can't encode them: name shards of latents")
    if recipe.text.name == "stored" and shards.text_version is None:
        raise ValueError(
            f"{path} holds captions without embeddings, and text.name=stored can't embed them: name shards with them "
            "(`cuboid encode --text`), or another text.name"
        )


def identity_of(streams: list[Stream]) -> str:
    """A hash of what the streams' files hold, wherever they lie: the order of samples follows from it."""
    digest = blake2b(digest_size=8)
    for stream in streams:
        for file in stream.shards.files:
            digest.update(f"{file.name} {file.num_samples} {file.hashes['sha1']}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def fitting(index: SampleIndex, bucket: BucketConfig, *, latent: bool) -> np.ndarray:
    """Which samples can take the bucket's shape, `n` bool."""
    return ~np.logical_or.reduce(list(misfits(index, bucket, latent=latent).values()))


def misfits(index: SampleIndex, bucket: BucketConfig, *, latent: bool = False) -> dict[str, np.ndarray]:
    """Why samples don't fit a bucket: reason -> which, `n` bool."""
    low = np.zeros(len(index), dtype=bool)
    for name, least in bucket.scores.items():
        low |= ~(index.scores[name] >= least) if name in index.scores else True
    if latent:
        columns = zip((index.frames, index.heights, index.widths), bucket.size, strict=True)
        other = np.logical_or.reduce([column != size for column, size in columns])
        if bucket.fps is not None:
            other |= np.abs(index.fps - bucket.fps) >= 1e-3
        return {"another shape": other, "score too low": low}
    none = np.zeros(len(index), dtype=bool)
    timed = bucket.fps is not None and bucket.frames > 1
    return {
        "too few pixels": (index.heights < bucket.height) | (index.widths < bucket.width),
        "too slow": index.fps < bucket.fps * (1 - FPS_SLACK) if bucket.fps and timed else none,
        "too short": index.frames < source_span(index, bucket),
        "cropped too much": cropped_share(index, bucket) > bucket.max_crop,
        "score too low": low,
    }


def source_span(index: SampleIndex, bucket: BucketConfig) -> np.ndarray:
    """How many of each video's frames a clip of the bucket spans, `n`: `num_source_frames` of decode.py."""
    stride = index.fps / bucket.fps if bucket.fps and bucket.frames > 1 else 1.0
    return np.broadcast_to(np.floor((bucket.frames - 1) * stride + 0.5) + 1, len(index))


def cropped_share(index: SampleIndex, bucket: BucketConfig) -> np.ndarray:
    """Share of each video's picture that a crop to the bucket's aspect ratio cuts off, `n`."""
    ratio = index.widths * bucket.height / (index.heights * bucket.width)
    return 1 - np.minimum(ratio, 1 / ratio)


def misfit(info: SampleInfo, bucket: BucketConfig) -> str | None:
    """Why a video doesn't fit a bucket, with the numbers, or None when it does."""
    index = index_of([info])
    reason = next((reason for reason, which in misfits(index, bucket).items() if which[0]), None)
    match reason:
        case "too few pixels":
            return f"{info.height}x{info.width} pixels are fewer than {bucket.height}x{bucket.width}"
        case "too slow":
            return f"{info.fps:g} frames a second are fewer than {bucket.fps:g}"
        case "too short":
            span = num_source_frames(bucket.frames, info.fps, bucket.fps)
            return f"{info.frames} frames are fewer than the {span} that {bucket.name} takes"
        case "cropped too much":
            return f"{cropped_share(index, bucket)[0]:.0%} of the picture would be cropped, over {bucket.max_crop:.0%}"
        case "score too low":
            return f"its scores {info.scores} are below {dict(bucket.scores)}"
    return None


def bucket_views(streams: list[Stream], buckets: list[BucketConfig]) -> list[list[View]]:
    """views[bucket][stream]. Raises ValueError for a bucket that no sample fits, with the reasons counted."""
    views = [[view_of(stream, index, bucket) for index, stream in enumerate(streams)] for bucket in buckets]
    for bucket, row in zip(buckets, views, strict=True):
        if not any(view.num_samples for view in row):
            shapes = set[tuple[int, int, int]]()
            for stream in streams:
                index = stream.shards.index
                shapes |= set(map(tuple, np.unique(np.stack([index.frames, index.heights, index.widths], 1), axis=0)))
            largest = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes, reverse=True)[:3])
            count = sum(len(stream.shards) for stream in streams)
            raise ValueError(
                f"no sample fits the bucket {bucket.name}: the {count} samples of the streams are {largest}"
                f"{', ...' if len(shapes) > 3 else ''} (frames x height x width); {_reasons(streams, bucket)}"
            )
    return views


def _reasons(streams: list[Stream], bucket: BucketConfig) -> str:
    """How many samples don't fit for which reason."""
    counts = Counter[str]()
    for stream in streams:
        latent = stream.shards.schema == LATENT_SCHEMA
        for reason, which in misfits(stream.shards.index, bucket, latent=latent).items():
            words = f"{reason} (latents need exactly the bucket's)" if reason == "another shape" else reason
            counts[words] += int(which.sum())
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def view_of(stream: Stream, index: int, bucket: BucketConfig) -> View:
    """The bucket's view of one stream. Its name keys the order, so it holds neither path nor mesh."""
    kept = fitting(stream.shards.index, bucket, latent=stream.shards.schema == LATENT_SCHEMA)
    edges = np.cumsum([0, *stream.shards.shard_sizes])
    counts = np.concatenate([[0], np.cumsum(kept)])[edges]
    return View(f"{index}/{bucket.name}", None if kept.all() else np.flatnonzero(kept), counts)


def check_held_out(training: list[Stream], held_out: list[Stream]) -> None:
    """Raises ValueError naming a clip that is both trained on and validated on. Segments count as their video."""
    trained = [stream.shards.index.videos() for stream in training]
    for stream in held_out:
        shared = np.flatnonzero(np.isin(stream.shards.index.videos(), np.concatenate(trained)))
        if len(shared):
            raise ValueError(
                f"{len(shared)} of the validation clips are also trained on, {stream.shards.index.uid(shared[0])} for "
                f"one: hold them out, or set validation.held_out=false"
            )
