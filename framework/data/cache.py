"""Data files of an object store, kept on a node for all its ranks and for later runs.

    FOLDER/lock                       held while files are named, made or deleted
    FOLDER/<directory>/<file>         whole and verified; <directory> is its place and what was written there, hashed
    FOLDER/<directory>/<file>.partial as long as the whole one, while one rank downloads it

All of what ranks must know of each other are locks of these files (flock), which the system lets go however a process
ends: an exclusive one on a partial file says who downloads it, a shared one on a whole file that it is in use. Nothing
stays behind but files, and what a dead process left half done the next one does again.

The limit holds because a file gets its full size when it is made, after the files that were used longest ago, and that
nobody uses, have made room for it. A rank uses at most its quota, limit / ranks, at a time: so there is always room for
its next file and it never waits for another rank, which might wait for it in a collective.
"""

import errno
import fcntl
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import xxhash

from framework.data.patience import BadShard, Closed, Patience
from framework.data.shards import ShardDirectory, ShardFile
from framework.storage.request import PassingError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
POLL = 0.02  # seconds between two looks at what another process does
FIRST_PAUSE = 0.1  # seconds between two tries
LONGEST_PAUSE = 5.0
STALL = 15.0  # seconds; a download that is slower than LEAST_RATE for so long is begun again
LEAST_RATE = 16 << 10  # bytes a second
PIECE = 4 << 20  # bytes hashed at once


class Held:
    """A data file that is open. One of a cache stays there until it's closed."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file. Raises BadShard where it is shorter or can't be read."""
        parts: list[bytes] = []
        try:
            while size and (part := os.pread(self._descriptor, size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError as error:
            raise BadShard(f"{self._name} can't be read: {error.strerror}") from None
        if size:
            raise BadShard(f"{self._name} ends at byte {offset}, more was asked for: it is damaged")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Let it go; once."""
        release(self._descriptor)


@dataclass(frozen=True)
class Place:
    """A file of a directory, and where it's kept."""

    shards: ShardDirectory
    file: ShardFile
    path: Path

    @property
    def name(self) -> str:
        """Where it comes from."""
        return f"{self.shards.url}/{self.file.name}"

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL)


class ShardCache:
    """Keeps data files in a local folder.

    limit: bytes of all files together. ranks: processes of the node that use the folder at a time with one limit, each
    with a cache of its own. patience: seconds for which a file's server may be away.
    """

    def __init__(self, folder: Path, limit: int, *, ranks: int = 1, patience: float = 180.0) -> None:
        self.folder, self.limit, self.quota = folder, limit, limit // ranks
        self._ranks, self._patience = ranks, patience
        self._closed = threading.Event()
        self._verified: dict[Path, int] = {}  # inodes of files that this process has checked
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            for path in folder.glob(f"*/*{PARTIAL}"):
                self._evict(path)

    def admit(self, streams: Sequence[ShardDirectory]) -> None:
        """Raises ValueError where the limit can't hold a file for each rank."""
        sizes = [(file.num_bytes, f"{shards.url}/{file.name}") for shards in streams for file in shards.files]
        largest, name = max(sizes, default=(0, ""))
        if largest > self.quota:
            raise ValueError(
                f"the cache {self.folder} of {self.limit / 1e9:g} GB is too small for {self._ranks} ranks x the "
                f"{largest} bytes of {name}: set data.cache.gigabytes to at least {self._ranks * largest / 1e9:.9g}"
            )

    def hold(self, shards: ShardDirectory, shard: int) -> Held:
        """A file, whole, downloaded where it isn't there; it stays until it's let go.

        Raises BadShard where it can't be had within the patience; OSError where another file couldn't be had either: no
        right to read, no room on the disk; Closed.
        """
        file = shards.files[shard]
        place = Place(shards, file, self.folder / shards.identity / quote(file.name, safe=""))
        patience = Patience(self._patience, self._closed, place.name)
        try:
            while True:
                if (descriptor := self._open(place.path)) is not None:
                    if self._is_whole(descriptor, place):
                        break
                    self._discard(descriptor, place)
                elif (descriptor := self._fetch(place, patience)) is not None:
                    break
        except FileNotFoundError as error:
            raise BadShard(str(error)) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = os.statvfs(self.folder)
            raise OSError(
                error.errno,
                f"the disk of the cache {self.folder} is full: {free.f_bavail * free.f_frsize / 1e9:.3g} GB are free, "
                f"data.cache.gigabytes allows {self.limit / 1e9:g}; lower it, or set data.cache.path to another disk",
            ) from None
        return Held(descriptor, place.name)

    def close(self) -> None:
        """Downloads end at the next byte that comes, or try."""
        self._closed.set()

    def _open(self, path: Path) -> int | None:
        """A whole file with a shared lock, used just now; None where there is none."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if is_at(descriptor, path):
                os.utime(descriptor)
                return descriptor
            release(descriptor)

    def _is_whole(self, descriptor: int, place: Place) -> bool:
        """Whether a file is what was written, checked the first time that this process uses it."""
        status = os.fstat(descriptor)
        if self._verified.get(place.path) == status.st_ino:
            return True
        hasher, expected = hasher_of(place.file)
        if status.st_size == place.file.num_bytes:
            for offset in range(0, status.st_size, PIECE):
                if self._closed.is_set():
                    raise Closed
                hasher.update(os.pread(descriptor, PIECE, offset))
            if hasher.hexdigest() == expected:
                self._verified[place.path] = status.st_ino
                return True
        logger.warning("%s is damaged in the cache (%s) and is downloaded again", place.name, place.path)
        return False

    def _discard(self, descriptor: int, place: Place) -> None:
        """Throw a damaged file away, unless somebody has put another one in its place."""
        with self._locked():
            if is_at(descriptor, place.path):
                place.path.unlink()
        release(descriptor)

    def _fetch(self, place: Place, patience: Patience) -> int | None:
        """Download a file; its descriptor with a shared lock. None where another process has done it."""
        descriptor = self._claim(place, patience)
        if descriptor is None:
            return None
        try:
            self._make_room(descriptor, place.file.num_bytes)
            self._download(descriptor, place, patience)
            self._verified[place.path] = os.fstat(descriptor).st_ino
            with self._locked():  # in which nobody deletes it between its two locks
                os.replace(place.partial, place.path)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            place.partial.unlink(missing_ok=True)
            release(descriptor)
            raise
        return descriptor

    def _claim(self, place: Place, patience: Patience) -> int | None:
        """The partial file with an exclusive lock, for which it waits; None where the whole one is there."""
        while not place.path.exists():
            place.path.parent.mkdir(exist_ok=True)
            descriptor = os.open(place.partial, os.O_RDWR | os.O_CREAT, 0o644)
            if try_lock(descriptor) and is_at(descriptor, place.partial):
                if not place.path.exists():
                    return descriptor
                place.partial.unlink()  # made in the moment in which the other one got its name
            release(descriptor)
            patience.start()
            if self._closed.wait(POLL):
                raise Closed
        return None

    def _make_room(self, descriptor: int, size: int) -> None:
        """Bring a new file to its size, once the others leave room for it."""
        deadline = time.monotonic() + self._patience
        while True:
            with self._locked():
                found = files_below(self.folder)
                total = size + sum(status.st_size for _, status in found)
                for path, status in sorted(found, key=lambda item: item[1].st_mtime_ns):
                    if total > self.limit and self._evict(path):
                        total -= status.st_size
                if total <= self.limit:
                    return allocate(descriptor, size)
            # Not among the ranks of one run, each of which keeps to its quota.
            if time.monotonic() > deadline:
                raise OSError(
                    f"the cache {self.folder} has had no room for {size} bytes for {self._patience:g} s: other runs "
                    f"use more of its {self.limit / 1e9:g} GB than they leave; give this run a data.cache.path of its "
                    f"own"
                )
            if self._closed.wait(POLL):
                raise Closed

    def _download(self, descriptor: int, place: Place, patience: Patience) -> None:
        """Fill a file and check it, going on where a request ended."""
        size = place.file.num_bytes
        done, (hasher, expected) = 0, hasher_of(place.file)
        while True:
            begin, before = (
                math.inf,
                done,
            )  # the clock runs from the first byte: until then the client's time-out counts
            try:
                for piece in place.shards.store.stream(place.file.name, done, size - done):
                    if self._closed.is_set():
                        raise Closed
                    write_at(descriptor, piece, done)
                    hasher.update(piece)
                    done += len(piece)
                    begin = min(begin, time.monotonic())
                    if (seconds := time.monotonic() - begin) > min(STALL, max(0.5, self._patience / 8)):
                        if (done - before) < LEAST_RATE * seconds and done < size:
                            raise PassingError(f"only {done - before} bytes came in {seconds:.0f} s")
                        begin, before = time.monotonic(), done
                if done < size:
                    raise PassingError(f"it ends at byte {done} of {size}")
            except PassingError as error:
                patience.spend(str(error), done, fix="is the server there? see AWS_ENDPOINT_URL and its like")
                continue
            if (found := hasher.hexdigest()) == expected:
                return
            done, (hasher, _) = 0, hasher_of(place.file)
            why = f"the {hasher.name} of its {size} bytes is {found}, its index says {expected}"
            patience.spend(why, None, fix="copy or prepare it again")

    def _evict(self, path: Path) -> bool:
        """Delete a file that nobody uses, with the cache's lock."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            if free := try_lock(descriptor):
                path.unlink(missing_ok=True)
            return free
        finally:
            release(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone of all processes."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            release(descriptor)


def hasher_of(file: ShardFile) -> tuple[Any, str]:
    """An empty hash of the fastest kind that a file has, and what it should come to."""
    if "xxh64" in file.hashes:
        return xxhash.xxh64(), file.hashes["xxh64"]
    return hashlib.sha1(), file.hashes["sha1"]


def release(descriptor: int) -> None:
    """Let the lock of an open file go and close it: a process that was forked meanwhile has the descriptor too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Whether this process has an exclusive lock of the file now."""
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file has this name still."""
    status = status_of(path)
    return status is not None and os.path.samestat(os.fstat(descriptor), status)


def files_below(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of a cache, with their status."""
    found = []
    for directory in [entry.path for entry in os.scandir(folder) if entry.is_dir()]:
        for entry in os.scandir(directory):
            with suppress(FileNotFoundError):
                found.append((Path(entry.path), entry.stat()))
    return found


def status_of(path: Path) -> os.stat_result | None:
    """None for a file that is gone."""
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def allocate(descriptor: int, size: int) -> None:
    """Give a file its size, and its blocks where the file system can. Raises OSError: the disk is full."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.truncate(descriptor, size)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of it."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)
