"""Where a ShardWriter puts its parts: a local directory, or an object store to which every finished part is uploaded.

A part is finished when its `part.json` is there: locally the whole part gets its name then, in an object store that
file is uploaded last. One process writes to a place at a time: locally by a lock that the system takes back, in an
object store by a claim, an object that its owner renews.
"""

import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from framework.data.index import INDEX_NAME
from framework.data.shards import EMPTY_TEXT, MARKER, finished_parts, part_name, sync, write_bytes
from framework.storage.storage import Storage, open_storage

REPORT = "report.json"
RECORD = "part.json"
CLAIM = ".writer"

# Seconds. A claim is renewed every BEAT and holds for HOLD after that, by the clocks of the machines.
BEAT = 20.0
HOLD = 120.0

_OWN = ("index.json", INDEX_NAME, MARKER, REPORT, EMPTY_TEXT)


class Parts(Protocol):
    """A place for parts, held by this process until `close`. finished: the parts that are complete, in order."""

    url: str
    finished: list[str]

    def stage(self, part: str) -> Path:
        """The empty local directory in which a part is to be made."""
        ...

    def publish(self, part: str) -> None:
        """Make a staged part complete: from now on it is there whatever happens."""
        ...

    def read(self, name: str) -> bytes:
        """A file of the place. Raises FileNotFoundError."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a file of the place, whole or not at all."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; absent ones are fine."""
        ...

    def close(self) -> None:
        """Let the place go."""
        ...


def open_parts(out: str | Path) -> Parts:
    """Hold a place. Raises ValueError: it has something else in it, a part is missing, another process writes there."""
    return StoredParts(str(out)) if "://" in str(out) else LocalParts(Path(out))


class LocalParts:
    """`Parts` in a directory. An unfinished part has a name in `.partial`; the next process throws it away."""

    def __init__(self, out: Path) -> None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; a directory of shards is to be written there")
        refuse_foreign(
            str(out), {entry.name.removesuffix(".partial") for entry in out.iterdir()} if out.exists() else ()
        )
        out.mkdir(parents=True, exist_ok=True)
        self.url, self._out = str(out), out
        self._lock = _lock(out)
        try:
            self.finished = [part.name for part in finished_parts(out)]
        except ValueError:
            os.close(self._lock)
            raise
        for leftover in out.glob("part-*.partial"):
            shutil.rmtree(leftover)

    def stage(self, part: str) -> Path:
        return self._out / f"{part}.partial"

    def publish(self, part: str) -> None:
        staged = self.stage(part)
        for file in [*staged.iterdir(), staged]:
            sync(file)
        os.replace(staged, self._out / part)
        sync(self._out)
        self.finished.append(part)

    def read(self, name: str) -> bytes:
        return (self._out / name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        write_bytes(self._out / name, data)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self._out / name).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._lock)


class StoredParts:
    """`Parts` in an object store. A part is made in a local directory for temporary files and uploaded when it is
    complete: a staged part takes as much room there.
    """

    def __init__(self, url: str) -> None:
        self._store = open_storage(url)
        self.url = self._store.url
        try:
            names = self._store.list()
        except OSError as error:
            raise ValueError(str(error)) from None
        refuse_foreign(self.url, {name.split("/")[0] for name in names})
        self._claim = Claim(self._store)
        try:
            # Again: the one who held it before may have finished a part since.
            names = self._store.list("part-")
            self.finished = sorted(name.split("/")[0] for name in names if name.endswith("/" + RECORD))
            for number, part in enumerate(self.finished):
                if part != part_name(number):
                    raise ValueError(
                        f"{self.url}/{part_name(number)} is missing, though there is {part}; prepare into a new place"
                    )
            self._store.delete([name for name in names if name.split("/")[0] not in self.finished])
            self._staging = tempfile.TemporaryDirectory(prefix="cuboid-part-")
        except BaseException:
            self._claim.release()
            raise

    def stage(self, part: str) -> Path:
        return Path(self._staging.name) / part

    def publish(self, part: str) -> None:
        self._claim.check()
        staged = self.stage(part)
        for file in sorted(staged.iterdir(), key=lambda file: (file.name == RECORD, file.name)):
            upload(file, self._store, f"{part}/{file.name}")
        shutil.rmtree(staged)
        self.finished.append(part)

    def read(self, name: str) -> bytes:
        return self._store.read(name)

    def put(self, name: str, data: bytes) -> None:
        self._claim.check()
        self._store.put(name, data)

    def delete(self, names: Iterable[str]) -> None:
        self._store.delete(names)

    def close(self) -> None:
        self._staging.cleanup()
        self._claim.release()


def upload(file: Path, store: Storage, name: str) -> None:
    """Write a local file as an object."""
    writer = store.open_writer(name)
    try:
        with file.open("rb") as source:
            while block := source.read(1 << 24):
                writer.write(block)
        writer.close()
    except BaseException:
        writer.abort()
        raise


class Claim:
    """The object by which one process says that it writes to a place of an object store.

    It holds while its time is younger than HOLD, and not where the process that it names is known to be dead, being of
    this machine. Who finds another's claim in its stead has lost the place, and stops before its next write: until
    then both write equal bytes for equal inputs.
    """

    def __init__(self, store: Storage) -> None:
        """Claim the place. Raises ValueError, with what to do, where another process holds it."""
        self._store, self._token = store, uuid.uuid4().hex
        self._lost = False
        if not store.put_if_absent(CLAIM, self._text()):
            self._refuse_held()
            store.delete([CLAIM])
            if not store.put_if_absent(CLAIM, self._text()):
                raise ValueError(f"another process has just begun to write to {store.url}: wait for it")
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises OSError when another process has taken the place over."""
        if self._lost or not self._is_mine():
            raise OSError(
                f"another process has taken {self._store.url} over, as this one gave no sign for {HOLD:.0f} s: this "
                f"one stops"
            )

    def release(self) -> None:
        """Let the place go."""
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_mine():
                self._store.delete([CLAIM])

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # a server that is away: the next beat tells
                self._lost = self._lost or not self._is_mine()
                if self._lost:
                    return
                self._store.put(CLAIM, self._text())

    def _is_mine(self) -> bool:
        found = _read_claim(self._store)
        return found is not None and found.get("token") == self._token

    def _refuse_held(self) -> None:
        found = _read_claim(self._store)
        if found is None or _is_dead(found):
            return
        age = time.time() - float(str(found["time"]))
        if age < HOLD:
            raise ValueError(
                f"another process is writing to {self._store.url} (host {found['host']}, process {found['pid']}, "
                f"{max(0, age):.0f} s ago): wait for it, or write to another place; if it is dead, try again in "
                f"{HOLD - age:.0f} s"
            )

    def _text(self) -> bytes:
        machine, start = _process(os.getpid())
        fields = {"host": os.uname().nodename, "pid": os.getpid(), "machine": machine, "start": start}
        return json.dumps(fields | {"token": self._token, "time": time.time()}).encode()


def _read_claim(store: Storage) -> dict[str, object] | None:
    """The claim in a place; None where there is none, or no claim that we write."""
    try:
        found = json.loads(store.read(CLAIM))
    except (FileNotFoundError, ValueError):
        return None
    keys = ("token", "time", "host", "pid", "machine", "start")
    return found if isinstance(found, dict) and all(key in found for key in keys) else None


def _is_dead(claim: Mapping[str, object]) -> bool:
    """Whether a claim is of a process that was on this machine and is there no more."""
    machine, start = _process(int(str(claim["pid"])))
    return claim["machine"] == machine != "" and claim["start"] != start


def _process(pid: int) -> tuple[str, str]:
    """This machine's boot and namespace of processes, and when a process began; empty where it can't be known."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""
    try:
        return machine, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return machine, ""


def refuse_foreign(url: str, names: Iterable[str]) -> None:
    """Raise ValueError when a place has something in it that no ShardWriter wrote. names: of its first level."""
    found = set(names)
    for name in sorted(found):
        if not (name in _OWN or name.startswith(("part-", "."))):
            raise ValueError(f"{url} has {name!r} in it, which isn't part of shards: write to an empty directory")
    if "index.json" in found and part_name(0) not in found:
        raise ValueError(f"{url} holds an MDS data set that cuboid didn't make: write to an empty directory")


def _lock(out: Path) -> int:
    """An advisory lock on the directory itself, which the system takes back when the process ends in any way."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"another process is writing to {out}: wait for it, or write to another directory") from error
    return descriptor
