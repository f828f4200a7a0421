"""Other libraries reading the rows that tools/bench/stream.py has put into an object store, each in its own process.

    python tools/bench/stream_peers.py write NAME FOLDER SHARDS ROWS SIZE     the same rows in the peer's own format
    python tools/bench/stream_peers.py read NAME CACHE WORKERS PLACE...       prints seconds and bytes

Seconds are from the beginning of its dataset to its last row, imports left out. PLACE is what the peer reads: a URL in
the store, or presigned URLs of its files.
"""

import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def lit_row(size: int, number: int) -> dict[str, bytes]:
    return {"latents": np.random.default_rng(number).bytes(size)}


def write(name: str, folder: Path, shards: int, rows: int, size: int) -> None:
    folder.mkdir(parents=True)
    if name == "webdataset":
        for shard in range(shards):
            with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
                for row in range(rows):
                    entry = tarfile.TarInfo(f"{shard * rows + row:08}.bin")
                    entry.size = size
                    tar.addfile(entry, io.BytesIO(np.random.default_rng(shard * rows + row).bytes(size)))
    else:
        import litdata

        litdata.optimize(
            fn=partial(lit_row, size),
            inputs=list(range(shards * rows)),
            output_dir=str(folder),
            chunk_size=rows,
            num_workers=1,
        )


def read_mosaic(cache: str, workers: int, places: list[str]) -> Callable[[], Iterable[Any]]:
    from streaming import StreamingDataset

    return lambda: StreamingDataset(remote=places[0], local=cache, shuffle=False, batch_size=1)


def read_webdataset(cache: str, workers: int, places: list[str]) -> Callable[[], Iterable[Any]]:
    import webdataset
    from torch.utils.data import DataLoader

    def rows() -> Iterator[Any]:
        commands = [f"pipe:curl -s '{place}'" for place in places]
        dataset = webdataset.WebDataset(commands, shardshuffle=False, workersplitter=webdataset.split_by_worker)
        yield from DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)

    return rows


def read_litdata(cache: str, workers: int, places: list[str]) -> Callable[[], Iterable[Any]]:
    import os

    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it speaks https only otherwise

    storage = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}

    def rows() -> Iterator[Any]:
        dataset = litdata.StreamingDataset(places[0], cache_dir=cache, storage_options=storage, max_cache_size="50GB")
        yield from litdata.StreamingDataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=first)

    return rows


def first(rows: list[Any]) -> Any:
    return rows[0]


def size_of(value: object) -> int:
    if isinstance(value, bytes):
        return len(value)
    return int(value.nbytes) if isinstance(value, np.ndarray) else 0


def main() -> None:
    verb, name, folder, *rest = sys.argv[1:]
    if verb == "write":
        shards, rows, size = map(int, rest)
        write(name, Path(folder), shards, rows, size)
        return
    readers = {"mosaicml": read_mosaic, "webdataset": read_webdataset, "litdata": read_litdata}
    make = readers[name](folder, int(rest[0]), rest[1:])
    begin, num_bytes = time.perf_counter(), 0
    for row in make():
        num_bytes += sum(map(size_of, row.values()))
    print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": num_bytes}), flush=True)


if __name__ == "__main__":
    main()
