"""Rows in the order of the visits, from directories and through the cache."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made_shards import Remote, made, row

from framework.data.cache import ShardCache
from framework.data.patience import BadShard
from framework.data.shards import ShardDirectory
from framework.data.stream import MOST_OPEN, ShardStore, Visit
from framework.storage.directory import Directory

pytestmark = pytest.mark.alone  # waits are timed

ROWS, SIZE = 4, 1000
FILE = 4 * (2 + ROWS) + ROWS * SIZE


def open_store(streams: list[ShardDirectory], folder: Path, files: float, *, threads: int = 3) -> ShardStore:
    return ShardStore(streams, ShardCache(folder / "cache", int(files * FILE), patience=0.5), threads=threads)


def drawn(seed: int, count: int, streams: int, shards: int) -> list[Visit]:
    rng = np.random.default_rng(seed)
    positions = [tuple(rng.integers(ROWS, size=rng.integers(1, 4)).tolist()) for _ in range(count)]
    return [Visit(int(rng.integers(streams)), int(rng.integers(shards)), p) for p in positions]


def expected(visit: Visit) -> list[bytes]:
    return [row(100 * visit.stream + visit.shard, position, SIZE) for position in visit.positions]


@pytest.mark.parametrize("files", [1, 2.5, 100])
def test_rows_come_in_the_order_of_the_visits(tmp_path: Path, files: float) -> None:
    """A directory and a remote one, mixed, within a small and a large cache."""
    streams = [
        made(Directory(str(tmp_path / "local")), shards=12, rows=ROWS, size=SIZE),
        made(Remote(), shards=12, rows=ROWS, size=SIZE, seed=100),
    ]
    visits = drawn(1, 300, 2, 12)
    store = open_store(streams, tmp_path, files)
    read = list(store.follow(iter(visits)))
    store.close()
    assert [visit for visit, _ in read] == visits
    assert all(rows == expected(visit) for visit, rows in read)
    assert len(list((tmp_path / "cache").glob("*/*"))) == min(12, int(files))


def test_a_directory_needs_no_cache_and_few_descriptors(tmp_path: Path) -> None:
    shards = made(Directory(str(tmp_path)), shards=MOST_OPEN + 20, rows=ROWS, size=SIZE)
    store = ShardStore([shards], None, threads=2)
    visits = [Visit(0, shard, (3, 0)) for shard in [*range(len(shards.files)), 0, 1]]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for visit, rows in store.follow(iter(visits)):
        assert rows == expected(visit)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + MOST_OPEN
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    store.close()
    with pytest.raises(ValueError, match="mem://bucket/videos is read through a cache"):
        ShardStore([made(Remote(), shards=1, rows=1, size=1)], None, threads=1)


@pytest.mark.parametrize(("files", "most"), [(3, 3), (50, 2 * 3)])
def test_downloads_are_ahead_of_the_rows_by_the_quota(tmp_path: Path, files: int, most: int) -> None:
    """No more than fit, and where there's much room no more at a time than the threads are busy with."""
    remote = Remote()
    store = open_store([made(remote, shards=50, rows=ROWS, size=SIZE)], tmp_path, files)
    rows = store.follow(Visit(0, shard % 50, (0,)) for shard in itertools.count())
    next(rows)
    deadline = time.monotonic() + 5
    while len(remote.streams) < min(most, files) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert min(most, files) - 1 <= len(remote.streams) <= most
    assert len(list((tmp_path / "cache").glob("*/*"))) <= files
    store.close()


def test_a_shard_of_consecutive_visits_is_held_once(tmp_path: Path) -> None:
    remote = Remote()
    store = open_store([made(remote, shards=4, rows=ROWS, size=SIZE)], tmp_path, 1)
    visits = [Visit(0, shard, (place,)) for shard in (0, 1, 2, 3, 0) for place in (0, 1, 2)]
    assert [rows for _, rows in store.follow(iter(visits))] == [expected(visit) for visit in visits]
    assert len(remote.streams) == 5
    store.close()


def test_a_bad_shard_is_a_value_and_is_tried_once(tmp_path: Path) -> None:
    remote = Remote()
    local = made(Directory(str(tmp_path / "local")), shards=2, rows=ROWS, size=SIZE)
    shards = made(remote, shards=3, rows=ROWS, size=SIZE, seed=100)
    del remote.objects[shards.files[1].name]
    (tmp_path / "local" / local.files[1].name).write_bytes(b"short")
    store = open_store([local, shards], tmp_path, 1)
    visits = [Visit(stream, shard, (0, 3)) for _ in range(3) for stream in (0, 1) for shard in (0, 1)]
    read = list(store.follow(iter(visits)))
    bad = [rows for visit, rows in read if visit.shard == 1]
    assert all(isinstance(error, BadShard) for error in bad)
    assert {str(error).removeprefix(str(tmp_path)) for error in bad} == {
        "mem://bucket/videos/part-00000/shard.00001.mds isn't there",
        "/local/part-00000/shard.00001.mds ends at byte 5, more was asked for: it is damaged",
    }
    assert all(rows == expected(visit) for visit, rows in read if visit.shard == 0)
    assert sum(name.endswith("1.mds") for name, _ in remote.streams) == 1
    store.close()


def test_what_is_no_shard_s_fault_is_raised_at_its_turn(tmp_path: Path) -> None:
    remote = Remote()
    shards = made(remote, shards=3, rows=ROWS, size=SIZE)
    stream = remote.stream

    def refuse(name: str, offset: int, size: int) -> Iterator[bytes]:
        if name.endswith("2.mds"):
            raise PermissionError("these credentials may not do that")
        return stream(name, offset, size)

    remote.stream = refuse  # type: ignore[method-assign]
    store = open_store([shards], tmp_path, 9)
    rows = store.follow(Visit(0, shard, (0,)) for shard in range(3))
    assert [next(rows)[1], next(rows)[1]] == [expected(Visit(0, shard, (0,))) for shard in (0, 1)]
    with pytest.raises(PermissionError, match="may not do that"):
        next(rows)

    def visits() -> Iterator[Visit]:
        yield Visit(0, 0, (0,))
        raise RuntimeError("the schedule is wrong")

    rows = store.follow(visits())
    next(rows)
    with pytest.raises(RuntimeError, match="the schedule is wrong"):
        next(rows)
    store.close()


def test_a_reader_that_leaves_lets_go(tmp_path: Path) -> None:
    shards = made(Remote(), shards=6, rows=ROWS, size=SIZE)
    store = open_store([shards], tmp_path, 3)
    for start in range(6):
        rows = store.follow(Visit(0, (start + shard) % 6, (0,)) for shard in itertools.count())
        next(rows)
        rows.close()  # type: ignore[attr-defined]
    visits = drawn(2, 30, 1, 6)
    assert [rows for _, rows in store.follow(iter(visits))] == [expected(visit) for visit in visits]
    store.close()


def test_closing_is_quick_while_a_server_says_nothing(tmp_path: Path) -> None:
    remote, thaw = Remote(), threading.Event()
    shards = made(remote, shards=6, rows=ROWS, size=SIZE)

    def freeze(name: str, offset: int, size: int) -> Iterator[bytes]:
        thaw.wait(20)
        yield b""

    remote.stream = freeze  # type: ignore[method-assign]
    store = open_store([shards], tmp_path, 9)
    read: list[object] = []
    thread = threading.Thread(target=lambda: read.extend(store.follow(Visit(0, i, (0,)) for i in range(6))))
    thread.start()
    time.sleep(0.2)
    begin = time.monotonic()
    store.close()
    thread.join(timeout=5)
    assert time.monotonic() - begin < 0.6 and not read and not thread.is_alive()
    thaw.set()
    for worker in [each for each in threading.enumerate() if each.name.startswith("download-")]:
        worker.join(timeout=5)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_cache_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small for 1 ranks x the 4024 bytes"):
        open_store([made(Remote(), shards=1, rows=ROWS, size=SIZE)], tmp_path, 0.9)
