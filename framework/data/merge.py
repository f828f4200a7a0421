"""The files at the top of a directory of shards: what its parts hold, or other directories, as one.

Nothing of a shard is copied for that: an index names the shards by their places. Samples are duplicates when uid,
shape and rate are equal (a video has one sample for each bucket and segment); the first is kept. A shard that holds a
later one is written again without it, as the index of MDS can't leave a row out.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import xxhash

from framework.data.index import INDEX_NAME, SampleIndex, SampleInfo, index_of, index_to_parquet, join_indexes
from framework.data.parts import RECORD
from framework.data.shards import MARKER, json_bytes, parse_json

THREADS = 8
REWRITTEN = "without-duplicates"


class Place(Protocol):
    """What is needed of a directory, local or in an object store."""

    def read(self, name: str) -> bytes:
        """A file. Raises FileNotFoundError."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; absent ones are fine."""
        ...


@dataclass(frozen=True)
class Contents:
    """shards: as in the index of MDS, with basenames below the directory. index: of their samples, in order."""

    shards: list[dict[str, Any]]
    index: SampleIndex


@dataclass(frozen=True)
class Duplicate:
    """A sample that is left out. kept, dropped: the shards of the one that stays and of this one."""

    uid: str
    kept: str
    dropped: str


def read_records(read: Callable[[str], bytes], parts: Sequence[str]) -> list[dict[str, Any]]:
    """The part.json of each part: the inputs it covers (name, fingerprint, uids) and its samples."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(read, [f"{part}/{RECORD}" for part in parts])
        return [parse_json(data, f"{part}/{RECORD}") for part, data in zip(parts, found, strict=True)]


def contents_of_parts(place: Place, parts: Sequence[str]) -> Contents:
    """What some parts hold."""
    shards: list[dict[str, Any]] = []
    infos = [SampleInfo(**info) for record in read_records(place.read, parts) for info in record["samples"]]
    with ThreadPoolExecutor(THREADS) as pool:
        for part, data in zip(parts, pool.map(place.read, [f"{part}/index.json" for part in parts]), strict=True):
            shards += moved(parse_json(data, f"{part}/index.json")["shards"], part)
    return Contents(shards, index_of(infos))


def moved(shards: Sequence[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """The same shards, seen from above their folder."""
    found = deepcopy(list(shards))
    for shard in found:
        shard["raw_data"]["basename"] = f"{folder}/{shard['raw_data']['basename']}"
    return found


def joined(contents: Sequence[Contents]) -> Contents:
    """One after the other."""
    shards = [shard for each in contents for shard in each.shards]
    return Contents(shards, join_indexes([each.index for each in contents]))


def write_top(place: Place, identity: Mapping[str, str | None], contents: Contents, files: Mapping[str, bytes]) -> None:
    """Write a directory's index and manifest, `cuboid.json` last. identity: schema, tokenizer, text. files: more of
    the top, which the manifest lists.
    """
    written = {
        **files,
        INDEX_NAME: index_to_parquet(contents.index),
        "index.json": json.dumps({"version": 2, "shards": contents.shards}, sort_keys=True).encode(),
    }
    sizes = {name: len(content) for name, content in written.items()}
    numbers = {"num_samples": len(contents.index), "num_shards": len(contents.shards), "files": sizes}
    manifest = {**identity, **numbers}
    try:
        if parse_json(place.read(MARKER), MARKER) != manifest:
            place.delete([MARKER])
    except FileNotFoundError:
        pass
    for name, content in written.items():
        place.put(name, content)
    place.put(MARKER, json_bytes(manifest))


def without_duplicates(place: Place, contents: Contents) -> tuple[Contents, list[Duplicate]]:
    """The contents with the first of each sample only, and what is left out.

    A shard that held one is written to the place again, in `without-duplicates/`, named by its hash.
    """
    index = contents.index
    shape = {"frames": index.frames, "height": index.heights, "width": index.widths, "fps": index.fps}
    columns = {"uid": index.uids, **shape}
    rows = np.empty(len(index), dtype=[(name, column.dtype) for name, column in columns.items()])
    for column_name, column in columns.items():
        rows[column_name] = column
    _, first, group = np.unique(rows, return_index=True, return_inverse=True)
    originals = first[group.reshape(-1)]
    kept = originals == np.arange(len(index))
    if kept.all():
        return contents, []
    edges = np.cumsum([0, *(shard["samples"] for shard in contents.shards)])
    place_of = np.repeat(np.arange(len(contents.shards)), np.diff(edges))

    def name(sample: int) -> str:
        return str(contents.shards[place_of[sample]]["raw_data"]["basename"])

    duplicates = [
        Duplicate(index.uid(sample), name(originals[sample]), name(sample)) for sample in np.flatnonzero(~kept).tolist()
    ]
    shards = []
    for shard, (begin, end) in zip(contents.shards, pairwise(edges.tolist()), strict=True):
        which = np.flatnonzero(kept[begin:end])
        if len(which) == end - begin:
            shards.append(shard)
        elif len(which):
            shards.append(_rewritten(place, shard, which))
    return Contents(shards, _select(index, kept)), duplicates


def _rewritten(place: Place, shard: dict[str, Any], which: np.ndarray) -> dict[str, Any]:
    """A shard of some rows of another. MDS: uint32 n, n + 1 uint32 offsets from the beginning, a header, the rows."""
    data = place.read(shard["raw_data"]["basename"])
    count = int(np.frombuffer(data, "<u4", 1)[0])
    offsets = np.frombuffer(data, "<u4", count + 1, offset=4)
    header = data[4 * (count + 2) : offsets[0]]
    rows = [data[offsets[row] : offsets[row + 1]] for row in which.tolist()]
    first = 4 * (len(rows) + 2) + len(header)
    ends = first + np.cumsum([0, *map(len, rows)])
    new = np.uint32(len(rows)).tobytes() + ends.astype("<u4").tobytes() + header + b"".join(rows)
    sha1 = hashlib.sha1(new).hexdigest()
    name = f"{REWRITTEN}/{sha1}.mds"
    place.put(name, new)
    raw = {"basename": name, "bytes": len(new), "hashes": {"sha1": sha1, "xxh64": xxhash.xxh64(new).hexdigest()}}
    return shard | {"raw_data": raw, "samples": len(rows)}


def _select(index: SampleIndex, which: np.ndarray) -> SampleIndex:
    """Some rows of an index. which: `n` bool."""
    return SampleIndex(
        uids=index.uids[which],
        frames=index.frames[which],
        heights=index.heights[which],
        widths=index.widths[which],
        fps=index.fps[which],
        scores={name: column[which] for name, column in index.scores.items()},
    )
