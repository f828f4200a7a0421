"""What there is to encode: every video for every bucket that it fits, each a unit of work with a key of its content.

A video is cut, for each bucket it fits, into consecutive segments that don't overlap; each becomes one sample. A video
fits a bucket that is no larger, no faster and no longer than it: nothing is enlarged and no frame is made up.

A sample's latents follow from the video's bytes (its uid), the segment's first frame (in the sample's uid), the crop,
frames x height x width, the rate, the tokenizer and the stored dtype: all but the first frame are hashed into
`latents`. What else is stored with them follows from what was said of the video and from the text encoder: `said`.
"""

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from framework.curate.config import EncodeConfig
from framework.data.buckets import fitting, misfit
from framework.data.config import BucketConfig
from framework.data.decode import num_source_frames
from framework.data.index import SampleInfo
from framework.data.merge import read_records
from framework.data.parts import RECORD
from framework.data.shards import ShardDirectory
from framework.storage.storage import Source

# The way from a frame to a clip's picture (data/decode.py); another number when that changes.
CROP = "cover-centre/1"


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
class Unit:
    """A video for a bucket. index: the video's in its directory. latents, said: see the module's docstring."""

    index: int
    uid: str
    bucket: BucketConfig
    latents: str
    said: str

    @property
    def name(self) -> str:
        return f"{self.uid} {self.bucket.name}"

    @property
    def fingerprint(self) -> str:
        return f"{self.latents}-{self.said}"


def segment_starts(info: SampleInfo, bucket: BucketConfig) -> list[int]:
    """First source frames of the consecutive segments of a video for a bucket; none when the video doesn't fit."""
    span = num_source_frames(bucket.frames, info.fps, bucket.fps)
    return [] if misfit(info, bucket) else [k * span for k in range(info.frames // span)]


def list_units(
    source: ShardDirectory,
    buckets: Sequence[BucketConfig],
    config: EncodeConfig,
    *,
    tokenizer_version: str,
    text_version: str | None,
) -> list[Unit]:
    """Every unit, buckets first, so that a shard mostly holds one shape; a video that is there twice counts once."""
    said = _said_of(source)
    units: dict[str, Unit] = {}
    for bucket in buckets:
        rule = [CROP, *bucket.size, bucket.fps, tokenizer_version, config.dtype]
        for index in np.flatnonzero(fitting(source.index, bucket, latent=False)).tolist():
            uid = source.index.uid(index)
            if uid not in said:
                raise ValueError(f"{source.url} has the video {uid}, but no {RECORD} names it: copy it again")
            unit = Unit(index, uid, bucket, _hash([uid, *rule]), _hash([said[uid], text_version, config.dtype]))
            units.setdefault(unit.name, unit)
    return list(units.values())


def digest_of(units: Sequence[Unit], count: int) -> str:
    """Names a whole piece of work in `count` shares: those that finish a share of the same work have the same."""
    return _hash([count, *(unit.name + unit.fingerprint for unit in units)])


def list_unfit(source: ShardDirectory, buckets: Sequence[BucketConfig]) -> list[Misfit]:
    """The videos that fit no bucket, with the reason for each bucket."""
    fits = np.logical_or.reduce([fitting(source.index, bucket, latent=False) for bucket in buckets])
    found = []
    for index in np.flatnonzero(~fits).tolist():
        info = source.index[index]
        detail = "; ".join(f"{bucket.name}: {misfit(info, bucket)}" for bucket in buckets)
        found.append(Misfit(info.uid, "fits no bucket", detail))
    return found


def list_tails(source: ShardDirectory, units: Sequence[Unit], broken: Container[str]) -> list[Tail]:
    """What the segments leave over at the end of each video, for each bucket that it fits. broken: units by name."""
    found = []
    for unit in units:
        fps, frames = float(source.index.fps[unit.index]), int(source.index.frames[unit.index])
        rest = frames % num_source_frames(unit.bucket.frames, fps, unit.bucket.fps)
        if rest and unit.name not in broken:
            found.append(Tail(unit.uid, unit.bucket.name, rest))
    return found


def parts_below(store: Source) -> list[str]:
    """The finished parts of a directory and of those in it, sorted. Raises OSError."""
    ends = [name.removesuffix("/" + RECORD) for name in store.list() if name.endswith("/" + RECORD)]
    return sorted(part for part in ends if not part.endswith(".partial"))


def inputs_of(records: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The inputs that parts cover: name, fingerprint, uids."""
    return (item for record in records for item in record["inputs"])


def _said_of(source: ShardDirectory) -> dict[str, str]:
    """uid -> what changes when the video, or what is said of it, does."""
    try:
        records = read_records(source.store.read, parts_below(source.store))
    except OSError as error:
        raise ValueError(str(error)) from None
    found: dict[str, set[str]] = {}
    for item in inputs_of(records):
        for uid in item["uids"]:
            found.setdefault(uid, set()).add(item["fingerprint"])
    said = {uid: fingerprints.pop() for uid, fingerprints in found.items() if len(fingerprints) == 1}
    # Merged of several that say different things: which of them the sample has, only its file tells.
    for index in range(len(source)):
        if (uid := source.index.uid(index)) in found and uid not in said:
            said[uid] = _hash([*sorted(found[uid]), source.shard_sha1(index)])
    return said


def _hash(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
