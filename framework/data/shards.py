"""Shards of videos or latents: mosaicml-streaming's MDS format (docs.mosaicml.com/projects/streaming) and a schema.

    DIR/cuboid.json       schema, tokenizer, number of samples; written last: a directory with it is complete
    DIR/index.json        MDS's own index of all shards, so that plain `streaming` reads the directory too
    DIR/empty_text.npy    where texts are stored: the empty caption's embedding
    DIR/samples.parquet   one row a sample, in the order of the index (index.py): what there is, without a shard
    DIR/part-00000/       a small complete MDS directory: index.json, shard.*.mds, and part.json: the inputs it covers
    DIR/share-0000-of-0002/   a directory like DIR, that one of several jobs wrote: DIR's index names its shards too

Opening a directory looks at names and sizes only and imports neither torch nor streaming, because the launcher does it
before a job waits in a queue. Writing is in shard_writer.py. Shapes: `c t h w` latents: channels, latent frames, rows,
columns.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import numpy as np

from framework.data.index import INDEX_NAME, SampleIndex, SampleInfo, index_from_parquet
from framework.shapes import ClipShape
from framework.storage.storage import Source, open_source

Schema = Literal["cuboid.video/1", "cuboid.latent/2"]

VIDEO_SCHEMA: Schema = "cuboid.video/1"
LATENT_SCHEMA: Schema = "cuboid.latent/2"
MARKER = "cuboid.json"
EMPTY_TEXT = "empty_text.npy"

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

    latents: `c t h w` float16 or float32. texts: each caption's embedding, `L D` float16 or float32, not padded; none
    where captions are embedded while training.
    """

    info: SampleInfo
    latents: np.ndarray
    captions: tuple[Caption, ...]
    source: str = ""
    licence: str = ""
    texts: tuple[np.ndarray, ...] = ()

    @property
    def clip(self) -> ClipShape:
        return ClipShape(self.info.frames, self.info.height, self.info.width)


@dataclass(frozen=True)
class ShardFile:
    """One data file. name: below the directory. num_bytes, hashes: of the whole file (sha1, and xxh64 where newer)."""

    name: str
    num_bytes: int
    num_samples: int
    hashes: Mapping[str, str]


class ShardDirectory:
    """A complete directory of shards. Opened by `open_shards`; reading never changes it.

    url: the place, a directory or an object store. files: of the samples, in the order of the index.
    """

    def __init__(self, store: Source, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        self.store = store
        self.schema: Schema = manifest["schema"]
        self.tokenizer_version: str | None = manifest["tokenizer"]
        self.text_version: str | None = manifest.get("text")
        self.files = [_shard_file(shard) for shard in shards]
        self._ends = list(accumulate(file.num_samples for file in self.files))
        self._first = shards[0]
        self._reader: Any = None

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [file.num_samples for file in self.files]

    @cached_property
    def identity(self) -> str:
        """A name of this place and of the bytes of all its data files: another one where it was written anew."""
        lines = [self.url, *(f"{f.name} {f.num_bytes} {sorted(f.hashes.items())}" for f in self.files)]
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=10).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def index(self) -> SampleIndex:
        """What there is, in the order of the files. Raises ValueError where it can't be read."""
        name = f"{self.url}/{INDEX_NAME}"
        index = index_from_parquet(_read(self.store, INDEX_NAME), name)
        if len(index) != len(self):
            raise ValueError(
                f"{name} lists {len(index)} samples, the shards hold {len(self)}: copy the directory again"
            )
        return index

    @cached_property
    def empty_text(self) -> np.ndarray | None:
        """The empty caption's embedding, `L D` in the dtype of the stored texts; None where no texts are stored.

        Raises ValueError where it can't be read.
        """
        return (
            None if self.text_version is None else np.load(BytesIO(_read(self.store, EMPTY_TEXT)), allow_pickle=False)
        )

    def locate(self, index: int) -> tuple[int, int]:
        """A sample's file and place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.url}, which has {len(self)}")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - self.files[shard].num_samples)

    def read(self, index: int) -> VideoSample | LatentSample:
        """The sample at an index straight from the store: two reads of a range, whatever the size of the directory."""
        shard, position = self.locate(index)
        name = self.files[shard].name

        def read(offset: int, size: int) -> bytes:
            data = bytearray(size)
            self.store.read_into(name, offset, [memoryview(data)])
            return bytes(data)

        return self.decode(read_row(read, position))

    def decode(self, row: bytes) -> VideoSample | LatentSample:
        """A sample from its row's bytes."""
        if self._reader is None:
            from streaming.base.format import reader_from_json

            self._reader = reader_from_json("", "", self._first)  # the columns of all shards are alike
        values = self._reader.decode_sample(row)
        return _video_from_row(values) if self.schema == VIDEO_SCHEMA else _latent_from_row(values)

    def shard_sha1(self, index: int) -> str:
        """The hash of the shard file that holds a sample: changes with the sample."""
        return self.files[self.locate(index)[0]].hashes["sha1"]

    def verify_hashes(self) -> None:
        """Read every shard. Raises ValueError naming the first file whose bytes aren't those that were written."""
        for file in self.files:
            if (found := hashlib.sha1(self.store.read(file.name)).hexdigest()) != file.hashes["sha1"]:
                raise ValueError(
                    f"{self.url}/{file.name} is damaged: its sha1 is {found}, its index says {file.hashes['sha1']}; "
                    f"copy or prepare it again"
                )


def read_row(read: Callable[[int, int], bytes], position: int) -> bytes:
    """A row of a shard. read(offset, size): bytes of its file.

    MDS: uint32 n, then n + 1 uint32 offsets of the rows from the file's beginning, then the header, then the rows.
    """
    begin, end = np.frombuffer(read(4 * (1 + position), 8), "<u4").tolist()
    return read(begin, end - begin)


def open_shards(url: str | Path) -> ShardDirectory:
    """Open a directory of shards, local or in an object store, looking at names and sizes only.

    Raises ValueError: nothing there, no shards in it, unfinished, another schema or columns, a file missing or of
    another size than was written (names it), no right to read.
    """
    store = open_source(str(url))
    try:
        sizes = store.list()
    except OSError as error:
        raise ValueError(str(error)) from None
    if MARKER not in sizes:
        raise ValueError(_no_shards(store.url, sizes))
    manifest = _load(store, MARKER)
    if manifest.get("schema") not in get_args(Schema):
        known = " and ".join(get_args(Schema))
        raise ValueError(
            f"{store.url}/{MARKER} has the schema {manifest.get('schema')!r}; this version of cuboid reads {known}"
        )
    for name, size in manifest["files"].items():
        _check_size(store.url, name, size, sizes)
    shards = _load(store, "index.json")["shards"]
    for shard in shards:
        _check_size(store.url, shard["raw_data"]["basename"], shard["raw_data"]["bytes"], sizes)
        found = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        # Also because a column may be a pickle ("pkl"): decoding that would run what it says.
        if found != columns(manifest["schema"]) or shard["format"] != "mds" or shard["compression"]:
            raise ValueError(
                f"{store.url}/{shard['raw_data']['basename']} has the columns {found}, not those of "
                f"{manifest['schema']}: {columns(manifest['schema'])}; nothing else is read"
            )
    return ShardDirectory(store, manifest, shards)


def _no_shards(url: str, sizes: Mapping[str, int]) -> str:
    """Why a place without a marker is no directory of shards."""
    make = f"make them with `cuboid prepare CLIPS --captions FILE --out {url}`"
    if not sizes:
        exists = "://" in url or Path(url).is_dir()
        return f"no shards in {url}: {make}" if exists else f"no shard directory {url}: {make}"
    parts = [name.split("/")[-2] for name in sizes if name.endswith("/part.json")]
    if finished := [part for part in parts if not part.endswith(".partial")]:
        return f"{url} is unfinished ({len(finished)} parts are): run the command that was making it again, it goes on"
    if "index.json" in sizes:
        return f"{url} has an index.json but no {MARKER}: these MDS shards weren't made by `cuboid prepare`"
    return f"no shards in {url}: {make}"


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
    write_bytes(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """A JSON file; equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it's there whole or not at all, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
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
    latent = {"latents": "ndarray", "texts": "ndarray", "text_lengths": "json"}
    return {**_COLUMNS} | ({"video": "bytes"} if schema == VIDEO_SCHEMA else latent)


def row_from_sample(sample: VideoSample | LatentSample) -> dict[str, Any]:
    """A sample as a row of MDS."""
    row = asdict(sample.info) | {"source": sample.source, "licence": sample.licence}
    if isinstance(sample, VideoSample):
        row["video"] = sample.video
    else:
        joined = np.concatenate(sample.texts) if sample.texts else np.zeros((1, 1), np.float16)
        row |= {"latents": sample.latents, "texts": joined, "text_lengths": [len(text) for text in sample.texts]}
    return row | {"captions": [asdict(caption) for caption in sample.captions]}


def _video_from_row(row: dict[str, Any]) -> VideoSample:
    return VideoSample(_info(row), row["video"], _captions(row), row["source"], row["licence"])


def _latent_from_row(row: dict[str, Any]) -> LatentSample:
    ends = np.cumsum(row["text_lengths"], dtype=int)
    texts = tuple(np.split(np.array(row["texts"])[: ends[-1]], ends[:-1])) if len(ends) else ()
    return LatentSample(_info(row), np.array(row["latents"]), _captions(row), row["source"], row["licence"], texts)


def _info(row: dict[str, Any]) -> SampleInfo:
    return SampleInfo(
        row["uid"], int(row["frames"]), int(row["height"]), int(row["width"]), float(row["fps"]), dict(row["scores"])
    )


def _captions(row: dict[str, Any]) -> tuple[Caption, ...]:
    return tuple(Caption(caption["text"], float(caption["weight"])) for caption in row["captions"])


def _shard_file(shard: dict[str, Any]) -> ShardFile:
    raw = shard["raw_data"]
    return ShardFile(raw["basename"], int(raw["bytes"]), int(shard["samples"]), raw["hashes"])


def _check_size(url: str, name: str, expected: int, sizes: Mapping[str, int]) -> None:
    if name not in sizes:
        raise ValueError(
            f"{url}/{name} is missing; it should have {expected} bytes. Copy the directory again, or prepare it again"
        )
    if sizes[name] != expected:
        raise ValueError(
            f"{url}/{name} has {sizes[name]} bytes instead of {expected}: truncated or overwritten. Copy or prepare it "
            f"again"
        )


def _read(store: Source, name: str) -> bytes:
    try:
        return store.read(name)
    except OSError as error:
        raise ValueError(f"{store.url}/{name} can't be read: {error}") from None


def _load(store: Source, name: str) -> dict[str, Any]:
    return parse_json(_read(store, name), f"{store.url}/{name}")


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError with its name."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} isn't a JSON object")
    return value
