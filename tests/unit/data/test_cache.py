"""The node's cache of data files: what it keeps, what it throws away, and what it says."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_shards import Remote, cached, made, row

from framework.data.cache import ShardCache
from framework.data.patience import BadShard, Closed
from framework.data.shards import ShardDirectory, read_row
from framework.storage.request import PassingError

pytestmark = pytest.mark.alone  # waits are timed

ROWS, SIZE = 4, 1000
FILE = 4 * (2 + ROWS) + ROWS * SIZE


@pytest.fixture
def shards() -> ShardDirectory:
    return made(Remote(), shards=8, rows=ROWS, size=SIZE)


def open_cache(folder: Path, files: float, *, ranks: int = 1, patience: float = 1.0) -> ShardCache:
    return ShardCache(folder / "cache", int(files * FILE), ranks=ranks, patience=patience)


def use(cache: ShardCache, shards: ShardDirectory, *numbers: int) -> None:
    for number in numbers:
        held = cache.hold(shards, number)
        assert [read_row(held.read, i) for i in range(ROWS)] == [row(number, i, SIZE) for i in range(ROWS)]
        held.close()
        time.sleep(0.01)  # a clock tick of the file system


def downloads(shards: ShardDirectory) -> list[str]:
    return [name for name, _ in shards.store.streams]  # type: ignore[attr-defined]


def test_a_file_is_downloaded_once_also_for_a_later_run(shards: ShardDirectory, tmp_path: Path) -> None:
    use(open_cache(tmp_path, 8), shards, 0, 1, 0, 0)
    use(open_cache(tmp_path, 8), shards, 1, 0)
    assert downloads(shards) == [shards.files[0].name, shards.files[1].name]
    assert sorted(cached(tmp_path / "cache").values()) == [FILE, FILE]


def test_what_was_used_longest_ago_makes_room(shards: ShardDirectory, tmp_path: Path) -> None:
    cache = open_cache(tmp_path, 3.5)
    use(cache, shards, 0, 1, 2, 0, 3)  # 1 is the oldest now
    assert {name.partition(".")[2] for name in cached(cache.folder)} == {f"0000{i}.mds" for i in (0, 2, 3)}
    use(cache, shards, 0, 2, 3)
    assert len(downloads(shards)) == 4


@pytest.mark.parametrize("there", [False, True])
def test_what_is_in_use_stays(shards: ShardDirectory, tmp_path: Path, there: bool) -> None:
    """Downloaded for this use, or found there."""
    cache = open_cache(tmp_path, 2)
    if there:
        use(cache, shards, 0)
    held = cache.hold(shards, 0)
    use(cache, shards, 1, 2, 3)
    assert len(cached(cache.folder)) == 2
    assert read_row(held.read, 1) == row(0, 1, SIZE)
    held.close()
    use(cache, shards, 0)
    assert len(downloads(shards)) == 4
    use(cache, shards, 4, 5)
    assert len(cached(cache.folder)) == 2


def test_a_file_that_is_deleted_while_it_is_opened(shards: ShardDirectory, tmp_path: Path) -> None:
    use(open_cache(tmp_path, 2), shards, 0)
    (file,) = (tmp_path / "cache").glob("*/*")
    with open(file) as evictor:
        fcntl.flock(evictor, fcntl.LOCK_EX)
        thread = threading.Thread(target=use, args=(open_cache(tmp_path, 2), shards, 0))
        thread.start()
        time.sleep(0.2)  # it has opened the file and waits for its lock
        file.unlink()
    thread.join()
    assert len(downloads(shards)) == 2 and list(cached(tmp_path / "cache")) == [file.name]


def test_other_runs_that_leave_no_room_are_told(shards: ShardDirectory, tmp_path: Path) -> None:
    held = [open_cache(tmp_path, 2).hold(shards, number) for number in (0, 1)]
    cache = open_cache(tmp_path, 2, patience=0.2)
    with pytest.raises(OSError, match=r"no room for 4024 bytes for 0.2 s: other runs use more.*data.cache.path"):
        cache.hold(shards, 2)
    held[0].close()
    use(cache, shards, 2)
    assert len(cached(cache.folder)) == 2


@pytest.mark.parametrize(
    ("files", "ranks", "least"), [(3.99, 4, "4 ranks x the 4024.*at least 1.6096e-05"), (4, 4, "")]
)
def test_a_limit_for_each_rank(shards: ShardDirectory, tmp_path: Path, files: float, ranks: int, least: str) -> None:
    cache = open_cache(tmp_path, files, ranks=ranks)
    if least:
        with pytest.raises(ValueError, match=least):
            cache.admit([shards])
    else:
        cache.admit([shards])
        assert cache.quota == FILE


def test_a_directory_that_was_written_anew_is_another_one(tmp_path: Path) -> None:
    store, cache = Remote(), open_cache(tmp_path, 8)
    use(cache, made(store, shards=1, rows=ROWS, size=SIZE), 0)
    again = made(store, shards=1, rows=ROWS, size=SIZE, seed=7)
    held = cache.hold(again, 0)
    assert read_row(held.read, 2) == row(7, 2, SIZE)
    held.close()
    assert made(Remote("mem://elsewhere"), shards=1, rows=ROWS, size=SIZE).identity != again.identity


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_file_is_downloaded_again(
    shards: ShardDirectory, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    use(open_cache(tmp_path, 8), shards, 0)
    (file,) = (tmp_path / "cache").glob("*/*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if damage == "flip" else data[:-1])
    use(open_cache(tmp_path, 8), shards, 0, 0)
    assert len(downloads(shards)) == 2 and "is damaged in the cache" in caplog.text
    assert len(cached(tmp_path / "cache")) == 1


def test_what_a_dead_process_left_is_removed(shards: ShardDirectory, tmp_path: Path) -> None:
    cache = open_cache(tmp_path, 8)
    folder = cache.folder / shards.identity
    folder.mkdir()
    for name in ("dead", "alive"):
        (folder / f"{name}.partial").write_bytes(b"x")
    with open(folder / "alive.partial") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_cache(tmp_path, 8)
        assert list(cached(cache.folder)) == ["alive.partial"]


def test_a_full_disk(shards: ShardDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = open_cache(tmp_path, 8)
    with pytest.raises(OSError, match=r"the disk of the cache .* is full: .* GB are free.*data.cache.path") as caught:
        cache.hold(shards, 0)
    assert not isinstance(caught.value, BadShard) and cached(cache.folder) == {}


class Trouble(Remote):
    """Whose streams fail. faults: of the next ones."""

    def __init__(self, *faults: str) -> None:
        super().__init__()
        self.faults = list(faults)

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        pieces = super().stream(name, offset, size)
        match self.faults.pop(0) if self.faults else "":
            case "away":
                next(pieces)
                raise PassingError("HTTP 503")
            case "flip":
                yield from (bytes([piece[0] ^ 1]) + piece[1:] for piece in pieces)
            case "half":
                yield next(pieces)
                raise PassingError("HTTP 500")
            case "short":
                yield next(pieces)
            case _:
                yield from pieces


@pytest.mark.parametrize(
    ("faults", "offsets"),
    [
        (["away", "away"], [0, 0, 0]),
        (["half", "short"], [0, 1 << 16, 2 << 16]),
        (["flip"], [0, 0]),
        (["half", "flip", "half"], [0, 1 << 16, 0, 1 << 16]),
    ],
)
def test_trouble_that_passes(tmp_path: Path, faults: list[str], offsets: list[int]) -> None:
    store = Trouble(*faults)
    shards = made(store, shards=1, rows=ROWS, size=100_000)
    held = ShardCache(tmp_path / "cache", 10**6, patience=5).hold(shards, 0)
    assert [read_row(held.read, i) for i in range(ROWS)] == [row(0, i, 100_000) for i in range(ROWS)]
    assert [offset for _, offset in store.streams] == offsets
    held.close()


@pytest.mark.parametrize(
    ("fault", "why"), [("away", "HTTP 503"), ("flip", "its index says"), ("short", "ends at byte")]
)
def test_trouble_that_stays(tmp_path: Path, fault: str, why: str) -> None:
    store = Trouble(*[fault] * 1000)
    shards = made(store, shards=1, rows=ROWS, size=SIZE)
    store.objects = {name: data[:99] if fault == "short" else data for name, data in store.objects.items()}
    cache, begin = open_cache(tmp_path, 8, patience=0.5), time.monotonic()
    with pytest.raises(BadShard, match=rf"mem://bucket/videos/part-00000/shard.00000.mds can't be had: .*{why}"):
        cache.hold(shards, 0)
    assert 0.2 < time.monotonic() - begin < 0.7 and 3 <= len(store.streams) <= 4
    assert cached(cache.folder) == {}


def test_a_file_that_is_not_there(shards: ShardDirectory, tmp_path: Path) -> None:
    shards.store.objects.clear()  # type: ignore[attr-defined]
    with pytest.raises(BadShard, match=r"mem://bucket/videos/part-00000/shard.00001.mds isn't there"):
        open_cache(tmp_path, 8).hold(shards, 1)


def test_several_want_the_same_file(shards: ShardDirectory, tmp_path: Path) -> None:
    """Caches of one process are like those of several: a lock belongs to an open file."""
    slow = threading.Event()
    stream = shards.store.stream

    def wait(name: str, offset: int, size: int) -> Iterator[bytes]:
        slow.wait(0.2)
        yield from stream(name, offset, size)

    shards.store.stream = wait  # type: ignore[method-assign]
    threads = [threading.Thread(target=use, args=(open_cache(tmp_path, 8), shards, 0)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads(shards)) == 1 and list(cached(tmp_path / "cache").values()) == [FILE]


def test_one_that_gives_up_lets_the_next_one_try_once(tmp_path: Path) -> None:
    store = Trouble(*["away"] * 1000)
    shards = made(store, shards=1, rows=ROWS, size=SIZE)
    begin, errors = time.monotonic(), []

    def hold() -> None:
        with pytest.raises(BadShard) as caught:
            open_cache(tmp_path, 8, patience=0.6).hold(shards, 0)
        errors.append(caught.value)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4 and time.monotonic() - begin < 1.2


def test_a_fork_keeps_no_lock(shards: ShardDirectory, tmp_path: Path) -> None:
    cache = open_cache(tmp_path, 1)
    held = cache.hold(shards, 0)
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    try:
        held.close()
        use(cache, shards, 1)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert len(cached(cache.folder)) == 1


def test_a_killed_process_holds_nothing(shards: ShardDirectory, tmp_path: Path) -> None:
    use(open_cache(tmp_path, 1), shards, 0)
    (file,) = (tmp_path / "cache").glob("*/*")
    program = (
        f"import fcntl, time; f = open({str(file)!r}); fcntl.flock(f, fcntl.LOCK_SH); print(1, flush=True); "
        f"time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        with pytest.raises(OSError, match="no room"):
            open_cache(tmp_path, 1, patience=0.1).hold(shards, 1)
        process.kill()
    use(open_cache(tmp_path, 1), shards, 1)


def test_closing_ends_a_try(tmp_path: Path) -> None:
    shards = made(Trouble(*["away"] * 1000), shards=1, rows=ROWS, size=SIZE)
    cache = open_cache(tmp_path, 8, patience=60)
    threading.Timer(0.3, cache.close).start()
    begin = time.monotonic()
    with pytest.raises(Closed):
        cache.hold(shards, 0)
    assert time.monotonic() - begin < 0.6 and cached(cache.folder) == {}
