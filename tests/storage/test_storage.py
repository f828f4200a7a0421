"""What every store promises, on a directory and on a real S3 server; and an S3 server that goes away."""

import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from object_store import ObjectStore

from framework.storage import s3
from framework.storage.directory import Directory
from framework.storage.s3 import S3
from framework.storage.storage import Storage, open_source, open_storage

SECRETS = ("trainerkey", "trainersecret", "readerkey", "readersecret", "wrongkey", "wrongsecret")


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        return open_storage(str(tmp_path / "store"))
    request.getfixturevalue("object_store")
    return open_storage(f"s3://vid/{tmp_path.name}")


def write(storage: Storage, name: str, data: bytes, step: int = 1 << 22) -> None:
    writer = storage.open_writer(name)
    for start in range(0, len(data), step):
        writer.write(memoryview(data)[start : start + step])
    writer.close()


@pytest.mark.parametrize("size", [0, 1, 1000, (16 << 20) + 5, 40 << 20])
def test_what_is_written_is_read(storage: Storage, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    write(storage, "a/b", data)
    assert storage.list() == {"a/b": size}
    assert storage.read("a/b") == data
    parts = [memoryview(bytearray(n)) for n in (size // 3, 0, size - size // 3)]
    storage.read_into("a/b", 0, parts)
    assert b"".join(parts) == data
    if size > 10:
        part = memoryview(bytearray(7))
        storage.read_into("a/b", size - 8, [part[:2], part[2:]])
        assert part == data[-8:-1]
        with pytest.raises(OSError, match="a/b"):
            storage.read_into("a/b", size - 3, [part])


def test_put_replaces_and_delete_forgets(storage: Storage) -> None:
    storage.put("x/1", b"one")
    storage.put("x/1", b"two")
    storage.put("xy", b"three")
    assert storage.read("x/1") == b"two" and storage.list("x/") == {"x/1": 3} and len(storage.list("x")) == 2
    storage.delete(["x/1", "absent"])
    assert storage.list() == {"xy": 5}
    with pytest.raises(FileNotFoundError):
        storage.read("x/1")
    storage.check()
    assert storage.list() == {"xy": 5}, "the check leaves nothing"


def test_one_of_many_puts_if_absent(storage: Storage) -> None:
    barrier = threading.Barrier(8)

    def claim(number: int) -> bool:
        barrier.wait()
        return storage.put_if_absent("fence", str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert won.count(True) == 1 and storage.read("fence") == str(won.index(True)).encode()


@pytest.mark.parametrize("size", [100, 20 << 20])
def test_an_aborted_object_is_not_there(storage: Storage, size: int) -> None:
    writer = storage.open_writer("a/b")
    writer.write(bytes(size))
    writer.abort()
    assert storage.list() == {}


def test_many_objects_are_listed_and_deleted(object_store: ObjectStore, tmp_path: Path) -> None:
    storage = S3(f"s3://vid/{tmp_path.name}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.put(f"n/{i:04}", b"x"), range(1005)))
    names = storage.list("n/")
    assert list(names) == [f"n/{i:04}" for i in range(1005)]
    storage.delete(names)
    assert storage.list() == {}


def while_writing(storage: Storage, trouble: Callable[[], None]) -> bytes:
    """Write 48 MiB, with trouble after the first 20."""
    data = np.random.default_rng(7).bytes(48 << 20)
    writer = storage.open_writer("big")
    writer.write(memoryview(data)[: 20 << 20])
    trouble()
    writer.write(memoryview(data)[20 << 20 :])
    writer.close()
    return data


def test_a_server_that_is_killed_while_it_is_written_to(object_store: ObjectStore, tmp_path: Path) -> None:
    storage = S3(f"s3://vid/{tmp_path.name}")

    def trouble() -> None:
        object_store.kill()
        threading.Thread(target=object_store.start).start()

    data = while_writing(storage, trouble)
    assert storage.read("big") == data


def test_a_server_that_is_frozen_while_it_is_written_to(object_store: ObjectStore, tmp_path: Path) -> None:
    storage = S3(f"s3://vid/{tmp_path.name}", read_timeout=2.0)

    def trouble() -> None:
        object_store.freeze()
        threading.Timer(6.0, object_store.thaw).start()

    begin = time.monotonic()
    data = while_writing(storage, trouble)
    assert time.monotonic() - begin > 6
    assert storage.read("big") == data


def test_a_server_that_stays_away(object_store: ObjectStore, tmp_path: Path) -> None:
    storage = S3(f"s3://vid/{tmp_path.name}", patience=1.0, read_timeout=0.5)
    object_store.freeze()
    try:
        with pytest.raises(OSError, match=r"s3://vid/.*/x at http://127.*no answer for 1 s .*AWS_ENDPOINT_URL"):
            storage.put("x", b"x")
    finally:
        object_store.thaw()


@pytest.mark.parametrize(
    ("url", "environment", "part"),
    [
        ("s3://nowhere/x", {}, "the bucket doesn't exist"),
        ("s3://vid/x", {"AWS_ACCESS_KEY_ID": "wrongkey"}, "the access key is unknown"),
        ("s3://vid/x", {"AWS_SECRET_ACCESS_KEY": "wrongsecret"}, "the secret key is wrong"),
        ("s3://vid/x", {"AWS_ACCESS_KEY_ID": "readerkey", "AWS_SECRET_ACCESS_KEY": "readersecret"}, "may not do that"),
        ("s3://vid/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "there are no credentials"),
    ],
)
def test_mistakes_are_told_at_once(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], part: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=part) as refusal:
        open_storage(url).check()
    assert time.monotonic() - begin < 10
    assert url in str(refusal.value) and not [word for word in SECRETS if word in str(refusal.value)]


@pytest.mark.parametrize(
    ("url", "environment", "part"),
    [
        ("s3://nowhere/x", {"ACCESS_KEY_ID": "trainerkey", "SECRET_ACCESS_KEY": "trainersecret"}, "doesn't exist"),
        ("s3://other/x", {}, "these credentials may not do that: ask for the right to list and read"),
        ("s3://vid/x", {"ACCESS_KEY_ID": "wrongkey"}, "the access key is unknown"),
        ("s3://vid/x", {"SECRET_ACCESS_KEY": "wrongsecret"}, "the secret key is wrong"),
        ("s3://vid/x", {"ACCESS_KEY_ID": "", "SECRET_ACCESS_KEY": ""}, "there are no credentials"),
        ("s3://vid/nothing", {}, "nothing is there"),
        ("s3://vid/x", {"ENDPOINT_URL": "http://me:hunter2@127.0.0.1:1"}, "at http://127.0.0.1:1: no answer for 3 s"),
    ],
)
def test_mistakes_of_one_who_reads_are_told_at_once(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], part: str
) -> None:
    reader = {"ACCESS_KEY_ID": "readerkey", "SECRET_ACCESS_KEY": "readersecret", "EC2_METADATA_DISABLED": "true"}
    for name, value in (reader | environment).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=part) as refusal:
        open_source(url).check_readable()
    assert time.monotonic() - begin < 10
    assert url in str(refusal.value)
    assert not [word for word in (*SECRETS, "hunter2") if word in str(refusal.value)]


@pytest.mark.parametrize(
    ("endpoint", "part"),
    [("not a url", "AWS_ENDPOINT_URL isn't the URL"), ("http://me:hunter2@127.0.0.1:1", "no answer")],
)
def test_odd_endpoints(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, endpoint: str, part: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ValueError, match=part) as refusal:
        S3("s3://vid/x", patience=0.5).check()
    assert "hunter2" not in str(refusal.value)


def test_urls_that_name_no_store() -> None:
    for url in ("s3://", "s3://key:secret@host/x", "gs://bucket/x"):
        with pytest.raises(ValueError, match="s3://bucket/prefix"):
            open_storage(url)


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        storage = Directory(str(disk))
        storage.put("kept", b"x" * 1000)
        writer = storage.open_writer("a/b")
        with pytest.raises(OSError, match="No space left"):
            writer.write(bytes(2 << 20))
        writer.abort()
        with pytest.raises(OSError, match="No space left"):
            storage.put("kept", bytes(2 << 20))
        assert storage.list() == {"kept": 1000} and [path.name for path in disk.iterdir()] == ["kept"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_without_permission(tmp_path: Path) -> None:
    """As another user, since root may write anywhere."""
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    locked = Path("/")  # every user may pass, none but root may write
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            Directory(str(locked / "store")).check()
        except ValueError as error:
            os._exit(0 if "may not write in /" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_parts_grow_so_that_an_upload_has_at_most_ten_thousand() -> None:
    sizes = [s3.PART << (number // s3.PARTS_OF_A_SIZE) for number in range(10_000)]
    assert sum(sizes) > 1e12
