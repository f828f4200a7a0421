"""Shards of videos or latents: mosaicml-streaming's MDS format (docs.mosaicml.com/projects/streaming) and a schema.

    DIR/cuboid.json       schema, tokenizer, number of samples; written last: a directory with it is complete
    DIR/index.json        MDS's own index of all shards, so that plain `streaming` reads the directory too
    DIR/samples.jsonl     one SampleInfo a line, in the order of the index: what there is, without opening a shard
    DIR/part-00000/       a small complete MDS directory: index.json, shard.*.mds, and part.json: the inputs it covers

Opening a directory looks at names and sizes only and imports neither torch nor streaming, because the launcher does it
before a job waits in a queue. Writing is in shard_writer.py. Shapes: `c t h w` latents: channels, latent frames, rows,
columns.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import numpy as np

from framework.shapes import ClipShape

Schema = Literal["cuboid.video/1", "cuboid.latent/1"]

VIDEO_SCHEMA: Schema = "cuboid.video/1"
LATENT_SCHEMA: Schema = "cuboid.latent/1"

# MDS keeps the offsets within a shard in 32 bits; what is left out is the shard's header and the other columns.
MAX_SAMPLE_BYTES = 2**32 - 2**24

_COLUMNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "uid": "str",
        "frames": "int",
        "height": "int",
        "width": "int",
        "fps": "float64",
        "scores": "json",
        "captions": "json",
        "source": "str",
        "licence": "str",
    }
)


@dataclass(frozen=True)
class Caption:
    """One caption of a sample. weight: how often it is drawn, relative to the sample's others."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class SampleInfo:
    """What buckets choose by. height, width: in pixels. fps: frames a second. scores: any numbers of the curation."""

    uid: str
    frames: int
    height: int
    width: int
    fps: float
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoSample:
    """A whole video file and its captions."""

    info: SampleInfo
    video: bytes
    captions: tuple[Caption, ...]
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class LatentSample:
    """An encoded clip. info describes the clip that was encoded, its uid is "<uid of the video>@<first frame>".

    latents: `c t h w` float16 or float32.
    """

    info: SampleInfo
    latents: np.ndarray
    captions: tuple[Caption, ...]
    source: str = ""
    licence: str = ""

    @property
    def clip(self) -> ClipShape:
        return ClipShape(self.info.frames, self.info.height, self.info.width)


class ShardDirectory:
    """A complete directory of shards. Opened by `open_shards`; reading never changes it.

    infos: what there is, in the order of the index. shard_sizes: samples of each shard, in the same order.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        self.path = path
        self.schema: Schema = manifest["schema"]
        self.tokenizer_version: str | None = manifest["tokenizer"]
        self.shard_sizes: list[int] = [shard["samples"] for shard in shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._shards = shards
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def infos(self) -> list[SampleInfo]:
        with open(self.path / "samples.jsonl", encoding="utf-8") as lines:
            return [SampleInfo(**json.loads(line)) for line in lines]

    def read(self, index: int) -> VideoSample | LatentSample:
        """The sample at an index, by random access: one open, seek and read, whatever the size of the directory."""
        shard, position = self._locate(index)
        if shard not in self._readers:
            from streaming.base.format import reader_from_json

            self._readers[shard] = reader_from_json(str(self.path), "", self._shards[shard])
        row = self._readers[shard][position]
        return _video_from_row(row) if self.schema == VIDEO_SCHEMA else _latent_from_row(row)

    def shard_sha1(self, index: int) -> str:
        """The hash of the shard file that holds a sample: changes with the sample."""
        return self._shards[self._locate(index)[0]]["raw_data"]["hashes"]["sha1"]

    def verify_hashes(self) -> None:
        """Read every shard. Raises ValueError naming the first file whose bytes aren't those that were written."""
        for shard in self._shards:
            file, expected = self.path / shard["raw_data"]["basename"], shard["raw_data"]["hashes"]["sha1"]
            with open(file, "rb") as data:
                found = hashlib.file_digest(data, "sha1").hexdigest()
            if found != expected:
                raise ValueError(
                    f"{file} is damaged: its sha1 is {found}, its index says {expected}; copy or prepare it again"
                )

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.path}, which has {len(self)}")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - self.shard_sizes[shard])


def open_shards(path: str | Path) -> ShardDirectory:
    """Open a directory of shards, looking at names and sizes only.

    Raises ValueError: no such directory, no shards in it, unfinished, another schema, a file missing or of another
    size than was written (names it).
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no shard directory {path}: make it with `cuboid prepare CLIPS --captions FILE --out {path}`")
    if not (path / "cuboid.json").exists():
        if parts := len(finished_parts(path)):
            raise ValueError(
                f"{path} is unfinished ({parts} parts are): run the command that was making it again, it goes on"
            )
        if (path / "index.json").exists():
            raise ValueError(
                f"{path} has an index.json but no cuboid.json: these MDS shards weren't made by `cuboid prepare`"
            )
        raise ValueError(f"no shards in {path}: make some with `cuboid prepare CLIPS --captions FILE --out {path}`")
    manifest = load_json(path / "cuboid.json")
    if manifest.get("schema") not in get_args(Schema):
        known = " and ".join(get_args(Schema))
        raise ValueError(
            f"{path / 'cuboid.json'} has the schema {manifest.get('schema')!r}; this version of cuboid reads {known}"
        )
    for name, size in manifest["files"].items():
        _check_size(path / name, size)
    shards = load_json(path / "index.json")["shards"]
    for shard in shards:
        _check_size(path / shard["raw_data"]["basename"], shard["raw_data"]["bytes"])
    return ShardDirectory(path, manifest, shards)


def finished_parts(path: Path) -> list[Path]:
    """The parts of a directory that are complete, in order. Raises ValueError naming the first that is missing."""
    parts = sorted(part for part in path.glob("part-*") if not part.name.endswith(".partial"))
    for number, part in enumerate(parts):
        if part.name != part_name(number):
            raise ValueError(
                f"{path / part_name(number)} is missing, though there is {part.name}; prepare into a new directory"
            )
    return parts


def part_name(number: int) -> str:
    return f"part-{number:05}"


def write_json(path: Path, value: object) -> None:
    """Write a file so that it's there whole or not at all, also after a power cut; equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it's there whole or not at all, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def columns(schema: Schema) -> dict[str, str]:
    """The MDS columns of a schema, name -> encoding."""
    return {**_COLUMNS} | ({"video": "bytes"} if schema == VIDEO_SCHEMA else {"latents": "ndarray"})


def row_from_sample(sample: VideoSample | LatentSample) -> dict[str, Any]:
    """A sample as a row of MDS."""
    content = {"video": sample.video} if isinstance(sample, VideoSample) else {"latents": sample.latents}
    row = asdict(sample.info) | {"source": sample.source, "licence": sample.licence} | content
    return row | {"captions": [asdict(caption) for caption in sample.captions]}


def _video_from_row(row: dict[str, Any]) -> VideoSample:
    return VideoSample(_info(row), row["video"], _captions(row), row["source"], row["licence"])


def _latent_from_row(row: dict[str, Any]) -> LatentSample:
    return LatentSample(_info(row), np.array(row["latents"]), _captions(row), row["source"], row["licence"])


def _info(row: dict[str, Any]) -> SampleInfo:
    return SampleInfo(
        row["uid"], int(row["frames"]), int(row["height"]), int(row["width"]), float(row["fps"]), dict(row["scores"])
    )


def _captions(row: dict[str, Any]) -> tuple[Caption, ...]:
    return tuple(Caption(caption["text"], float(caption["weight"])) for caption in row["captions"])


def _check_size(file: Path, expected: int) -> None:
    if not file.exists():
        raise ValueError(
            f"{file} is missing; it should have {expected} bytes. Copy the directory again, or prepare it again"
        )
    if (size := file.stat().st_size) != expected:
        raise ValueError(
            f"{file} has {size} bytes instead of {expected}: truncated or overwritten. Copy or prepare it again"
        )


def load_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} isn't a JSON object")
    return value
