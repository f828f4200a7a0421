"""Shards streamed from a real S3 server, through trouble: exact rows or an error with the file's name, in time."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import Fault, FaultyProxy
from made_shards import cached, made, row
from object_store import ObjectStore

from framework.data.cache import ShardCache
from framework.data.patience import BadShard
from framework.data.shards import ShardDirectory, open_shards
from framework.data.stream import ShardStore, Visit
from framework.storage.s3 import S3

SHARDS, ROWS, SIZE = 12, 8, 50_000
FILE = 4 * (2 + ROWS) + ROWS * SIZE


@pytest.fixture(scope="module")
def url(object_store: ObjectStore) -> str:
    """A directory of shards on the server."""
    made(S3("s3://vid/stream"), shards=SHARDS, rows=ROWS, size=SIZE)
    return "s3://vid/stream"


@pytest.fixture
def proxy(url: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy


def directory(url: str, read_timeout: float) -> ShardDirectory:
    """Opened anew, with a client of its own."""
    return made(S3(url, read_timeout=read_timeout), shards=SHARDS, rows=ROWS, size=SIZE, upload=False)


def open_store(
    folder: Path, url: str, *, files: float = 100, ranks: int = 1, patience: float = 10, read_timeout: float = 10
) -> ShardStore:
    cache = ShardCache(folder / "cache", int(files * FILE), ranks=ranks, patience=patience)
    return ShardStore([directory(url, read_timeout)], cache, threads=2)


def visits(count: int = 3 * SHARDS, start: int = 0) -> Iterator[Visit]:
    """Five is prime to the number of shards."""
    return (Visit(0, (start + 5 * i) % SHARDS, (i % ROWS, (i + 3) % ROWS)) for i in range(count))


def check(store: ShardStore, count: int = 3 * SHARDS, start: int = 0) -> int:
    """Read visits; every row must be right. The number of rows."""
    total = 0
    for visit, rows in store.follow(visits(count, start)):
        assert rows == [row(visit.shard, position, SIZE) for position in visit.positions], rows
        total += len(rows)
    return total


FAULTS: list[Fault] = ["refuse", "500", "503", "trickle", "truncate", "flip"]


@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_that_passes_is_survived(proxy: FaultyProxy, url: str, tmp_path: Path, fault: Fault) -> None:
    proxy.faults.extend([fault] * 3)
    store = open_store(tmp_path, url, patience=6)
    assert check(store) == 2 * 3 * SHARDS
    store.close()
    assert set(cached(tmp_path / "cache").values()) == {FILE} and len(cached(tmp_path / "cache")) == SHARDS
    assert not proxy.faults
    if fault == "truncate":
        assert any(first > 0 for _, first in proxy.requests), "it goes on from where it was"


@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_that_stays_names_the_file(proxy: FaultyProxy, url: str, tmp_path: Path, fault: Fault) -> None:
    proxy.always = fault
    store, begin = open_store(tmp_path, url, patience=1.0), time.monotonic()
    ((visit, error),) = store.follow(visits(1))
    assert isinstance(error, BadShard) and 0.3 < time.monotonic() - begin < 3.5
    assert f"s3://vid/stream/part-00000/shard.{visit.shard:05}.mds can't be had: " in str(error)
    assert not any(secret in str(error) for secret in ("trainerkey", "trainersecret"))
    store.close()
    assert cached(tmp_path / "cache") == {}


def test_a_server_that_freezes(object_store: ObjectStore, url: str, tmp_path: Path) -> None:
    store, begin = open_store(tmp_path, url, patience=20, read_timeout=1), time.monotonic()
    rows = store.follow(visits())
    next(rows)
    object_store.freeze()
    timer = threading.Timer(3.0, object_store.thaw)
    timer.start()
    try:
        assert sum(len(values) for _, values in rows) == 2 * (3 * SHARDS - 1)
    finally:
        timer.join()
    assert time.monotonic() - begin > 3
    store.close()


def test_a_server_that_starts_again(object_store: ObjectStore, url: str, tmp_path: Path) -> None:
    object_store.kill()
    thread = threading.Thread(target=object_store.start)
    store = open_store(tmp_path, url, patience=30)
    threading.Timer(0.5, thread.start).start()
    assert check(store) == 2 * 3 * SHARDS
    thread.join()
    store.close()


def test_closing_while_the_server_is_frozen(object_store: ObjectStore, url: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, url)
    object_store.freeze()
    try:
        thread = threading.Thread(target=lambda: list(store.follow(visits())))
        thread.start()
        time.sleep(0.3)
        begin = time.monotonic()
        store.close()
        thread.join(timeout=5)
        assert time.monotonic() - begin < 0.6
    finally:
        object_store.thaw()


def test_no_right_to_read_is_no_bad_shard(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecret")
    store = open_store(tmp_path, url)
    with pytest.raises(OSError, match="the secret key is wrong") as caught:
        next(store.follow(visits()))
    assert not isinstance(caught.value, BadShard) and "wrongsecret" not in str(caught.value)
    store.close()


def test_what_cuboid_writes_is_read(object_store: ObjectStore, tiny_shards: Path, tmp_path: Path) -> None:
    store = S3("s3://vid/tiny")
    for path in tiny_shards.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(tiny_shards).as_posix(), path.read_bytes())
    local, remote = open_shards(tiny_shards), open_shards("s3://vid/tiny")
    plan = [Visit(stream, *remote.locate(i)[:1], (remote.locate(i)[1],)) for i in range(8) for stream in (0, 1)]
    reader = ShardStore([local, remote], ShardCache(tmp_path / "cache", 10**7), threads=2)
    samples = [local.decode(rows[0]) for _, rows in reader.follow(iter(plan)) if not isinstance(rows, BadShard)]
    assert [sample.info.uid for sample in samples] == [f"clip{i}@0" for i in range(8) for _ in range(2)]
    reader.close()


def rank(folder: Path, url: str, files: float, ranks: int, number: int, results: Any) -> None:
    """A process of the next test."""
    os.setpgid(0, 0)
    store = open_store(folder, url, files=files, ranks=ranks, patience=60)
    results.put(check(store, 4 * SHARDS, start=2 * number))
    store.close()


def start_ranks(folder: Path, url: str, files: float, ranks: int) -> tuple[list[Any], Any]:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    started = [context.Process(target=rank, args=(folder, url, files, ranks, i, results)) for i in range(ranks)]
    for process in started:
        process.start()
    return started, results


@pytest.mark.parametrize("files", [4, 6.5, 100])
def test_ranks_share_a_cache_within_its_limit(proxy: FaultyProxy, url: str, tmp_path: Path, files: float) -> None:
    """Four ranks; four files are the least that works."""
    processes, results = start_ranks(tmp_path, url, files, 4)
    most = 0
    while any(process.is_alive() for process in processes):
        with os.scandir(tmp_path) as top:
            if any(entry.name == "cache" for entry in top):
                most = max(most, sum(cached_now(tmp_path / "cache")))
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [results.get() for _ in processes] == [2 * 4 * SHARDS] * 4
    assert 2 * FILE < most <= files * FILE
    assert set(cached(tmp_path / "cache").values()) == {FILE}
    assert all(name.endswith(".mds") for name in cached(tmp_path / "cache"))
    if files > SHARDS:
        assert len(proxy.requests) == len(set(proxy.requests)) == SHARDS


def cached_now(folder: Path) -> list[int]:
    """Sizes of all files of a cache that is being changed."""
    sizes = []
    for path in list(folder.glob("*/*")):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sizes


def test_a_killed_process_group_leaves_nothing_but_files(proxy: FaultyProxy, url: str, tmp_path: Path) -> None:
    memory = set(os.listdir("/dev/shm"))
    proxy.always = "trickle"
    processes, _ = start_ranks(tmp_path, url, 100, 3)
    deadline = time.monotonic() + 10
    while len(list((tmp_path / "cache").glob("*/*.partial"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert set(os.listdir("/dev/shm")) <= memory
    assert len(list((tmp_path / "cache").glob("*/*.partial"))) >= 3
    proxy.always = None
    store = open_store(tmp_path, url)
    assert cached(tmp_path / "cache") == {}
    assert check(store) == 2 * 3 * SHARDS
    store.close()


def test_a_process_that_ends_while_it_downloads_ends(proxy: FaultyProxy, url: str, tmp_path: Path) -> None:
    """Its threads hold it up no longer than its own end."""
    proxy.always = "trickle"
    program = (
        "from pathlib import Path; from test_stream import *; import sys\n"
        "store = open_store(Path(sys.argv[1]), sys.argv[2])\n"
        "rows = store.follow(visits()); threading.Thread(target=next, args=(rows,), daemon=True).start()\n"
        "time.sleep(0.5)"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), url], env=environment, timeout=30, check=False)
    assert done.returncode == 0 and time.monotonic() - begin < 15
