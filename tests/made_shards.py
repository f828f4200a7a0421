"""Directories of MDS files with known rows, without the library: row i of shard s is a function of (s, i)."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from framework.data.shards import LATENT_SCHEMA, ShardDirectory


def row(shard: int, position: int, size: int) -> bytes:
    """A row's bytes."""
    return np.random.default_rng((shard, position)).bytes(size)


def shard_bytes(rows: Sequence[bytes]) -> bytes:
    """MDS: the number of rows, where each begins and the last one ends, and the rows."""
    begin = 4 * (2 + len(rows))
    ends = begin + np.cumsum([0, *map(len, rows)])
    return np.array([len(rows), *ends], "<u4").tobytes() + b"".join(rows)


class Remote:
    """Objects in memory that count as another machine's. streams: what was asked for: (name, offset)."""

    def __init__(self, url: str = "mem://bucket/videos") -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}
        self.streams: list[tuple[str, int]] = []

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = data

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        self.streams.append((name, offset))
        if name not in self.objects:
            raise FileNotFoundError(f"{self.url}/{name} isn't there")
        for start in range(offset, offset + size, 1 << 16):
            yield self.objects[name][start : min(start + (1 << 16), offset + size)]


def made(store: Any, *, shards: int, rows: int, size: int, seed: int = 0, upload: bool = True) -> ShardDirectory:
    """Write `shards` files of `rows` rows of `size` bytes each to a store."""
    files = []
    for shard in range(shards):
        data = shard_bytes([row(seed + shard, position, size) for position in range(rows)])
        name = f"part-{shard // 4:05}/shard.{shard % 4:05}.mds"
        if upload:
            store.put(name, data)
        hashes = {"sha1": hashlib.sha1(data).hexdigest(), "xxh64": xxhash.xxh64(data).hexdigest()}
        files.append({"raw_data": {"basename": name, "bytes": len(data), "hashes": hashes}, "samples": rows})
    return ShardDirectory(store, {"schema": LATENT_SCHEMA, "tokenizer": None}, files)


def cached(folder: Path) -> dict[str, int]:
    """What a cache holds besides its lock: name -> bytes."""
    return {path.name: path.stat().st_size for path in folder.glob("*/*")}
