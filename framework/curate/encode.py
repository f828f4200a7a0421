"""Shards of videos -> shards of latents, so that training decodes no video (measured: ten times faster to load).

Every video is cut, for each bucket it fits, into consecutive segments that don't overlap; each becomes one sample. A
video fits a bucket that is no larger, no faster and no longer than it: nothing is enlarged and no frame is made up.
Order: buckets first, so that a shard mostly holds one shape, and a bucket that comes later only adds parts.

Shapes: `T H W C` uint8 decoded, `B C T H W` float32 in [-1, 1] to the tokenizer, `c t h w` latents.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from framework.data.buckets import misfit
from framework.data.builder import encode_frames
from framework.data.config import BucketConfig
from framework.data.decode import decode_clip, frame_stride, num_source_frames
from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import (
    LATENT_SCHEMA,
    VIDEO_SCHEMA,
    LatentSample,
    ShardDirectory,
    VideoSample,
    write_json,
)
from framework.shapes import Strides, latent_shape


class Encoder(Protocol):
    """The part of a tokenizer that encoding needs."""

    @property
    def strides(self) -> Strides: ...

    @property
    def version(self) -> str: ...

    def encode(self, video: Tensor) -> Tensor:
        """`B C T H W` float32 in [-1, 1] -> `B c t h w`."""
        ...


@dataclass(frozen=True)
class Tail:
    """Source frames at the end of a video that no segment of a bucket covers."""

    uid: str
    bucket: str
    frames: int


@dataclass(frozen=True)
class Misfit:
    """A video that no bucket takes, or one that can't be decoded. detail: why."""

    uid: str
    reason: Literal["fits no bucket", "broken"]
    detail: str


@dataclass(frozen=True)
class EncodeReport:
    """What became of each video. num_samples: bucket -> latent samples in `out`, those of earlier runs included."""

    out: Path
    num_samples: dict[str, int]
    tails: tuple[Tail, ...]
    misfits: tuple[Misfit, ...]


def segment_starts(info: SampleInfo, bucket: BucketConfig) -> list[int]:
    """First source frames of the consecutive segments of a video for a bucket; none when the video doesn't fit."""
    span = num_source_frames(bucket.frames, info.fps, bucket.fps)
    return [] if misfit(info, bucket) else [k * span for k in range(info.frames // span)]


def encode_shards(
    source: ShardDirectory,
    buckets: Sequence[BucketConfig],
    tokenizer: Encoder,
    out: Path,
    *,
    dtype: Literal["float16", "float32"] = "float16",
    part_size: int = 256,
    shard_bytes: int = 1 << 26,
) -> EncodeReport:
    """Encode every video of a shard directory for every bucket it fits; a run that was stopped goes on.

    dtype: of the stored latents. part_size: samples of one part, which is what a stopped run does again at most.
    Raises ValueError: shards that aren't of videos, no bucket, one that the tokenizer doesn't take, `out` holding
    something else, latents that aren't finite in `dtype`, nothing usable.
    """
    if source.schema != VIDEO_SCHEMA:
        raise ValueError(f"{source.url} holds {source.schema}, not {VIDEO_SCHEMA}: latents can't be encoded again")
    if not buckets:
        raise ValueError("no bucket to encode for: give data.buckets at least one")
    for bucket in buckets:
        latent_shape(bucket.clip, tokenizer.strides)
    broken: dict[str, Misfit] = {}
    with ShardWriter(
        out, schema=LATENT_SCHEMA, tokenizer_version=tokenizer.version, part_size=part_size, shard_bytes=shard_bytes
    ) as writer:
        for bucket in buckets:
            for index, info in enumerate(source.index):
                name, fingerprint = f"{info.uid} {bucket.name}", _fingerprint(source, index, dtype)
                if info.uid in broken or not segment_starts(info, bucket) or writer.covers(name, fingerprint):
                    continue
                sample = source.read(index)
                assert isinstance(sample, VideoSample)
                result = _encode(sample, bucket, tokenizer, dtype)
                if isinstance(result, Misfit):
                    broken[info.uid] = result
                else:
                    writer.write(name, fingerprint, result)
        misfits = _unfit(source, buckets) + list(broken.values())
        if not writer.num_samples:
            raise ValueError(
                f"nothing to encode in {source.url}" + "".join(f"\n  {m.uid}: {m.detail}" for m in misfits)
            )
        writer.finish()
        counts = Counter[str]()
        for name, (_, uids) in writer.covered.items():
            counts[name.split(" ")[1]] += len(uids)
        tails = _tails(source, buckets, broken)
        report = EncodeReport(out, dict(sorted(counts.items())), tuple(tails), tuple(misfits))
        content = asdict(report)
        del content["out"]
        write_json(out / "report.json", content)
    return report


def _encode(
    sample: VideoSample, bucket: BucketConfig, tokenizer: Encoder, dtype: Literal["float16", "float32"]
) -> list[LatentSample] | Misfit:
    """The segments of one video as latents; or the video as broken."""
    info, latents = sample.info, []
    stride = frame_stride(info.fps, bucket.fps)
    fps = info.fps if bucket.fps is None else bucket.fps
    for start in segment_starts(info, bucket):
        try:
            clip = decode_clip(sample.video, start=start, clip=bucket.clip, stride=stride, name=info.uid)
        except ValueError as error:
            return Misfit(info.uid, "broken", str(error))
        uid = f"{info.uid}@{start}"
        encoded = _latents(clip, tokenizer, dtype)
        if not np.isfinite(encoded).all():
            raise ValueError(f"the latents of {uid} aren't finite in {dtype}; encode with dtype=float32")
        clip_info = SampleInfo(uid, bucket.frames, bucket.height, bucket.width, fps, info.scores)
        latents.append(LatentSample(clip_info, encoded, sample.captions, sample.source, sample.licence))
    return latents


@torch.inference_mode()
def _latents(clip: np.ndarray, tokenizer: Encoder, dtype: Literal["float16", "float32"]) -> np.ndarray:
    """`T H W C` uint8 -> `c t h w`."""
    return encode_frames(torch.from_numpy(clip), tokenizer).to("cpu", getattr(torch, dtype)).numpy()


def _unfit(source: ShardDirectory, buckets: Sequence[BucketConfig]) -> list[Misfit]:
    """The videos that fit no bucket, with the reason for each bucket."""
    found = []
    for info in source.index:
        reasons = [misfit(info, bucket) for bucket in buckets]
        if all(reasons):
            detail = "; ".join(f"{bucket.name}: {reason}" for bucket, reason in zip(buckets, reasons, strict=True))
            found.append(Misfit(info.uid, "fits no bucket", detail))
    return found


def _tails(source: ShardDirectory, buckets: Sequence[BucketConfig], broken: Container[str]) -> list[Tail]:
    """What the segments leave over at the end of each video, for each bucket that it fits."""
    found = []
    for bucket in buckets:
        for info in source.index:
            starts = segment_starts(info, bucket)
            rest = info.frames - len(starts) * num_source_frames(bucket.frames, info.fps, bucket.fps)
            if starts and rest and info.uid not in broken:
                found.append(Tail(info.uid, bucket.name, rest))
    return found


def _fingerprint(source: ShardDirectory, index: int, dtype: str) -> str:
    """Changes when the video, what is said about it, or the stored precision does; reads no shard."""
    text = json.dumps([asdict(source.index[index]), source.shard_sha1(index), dtype], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
