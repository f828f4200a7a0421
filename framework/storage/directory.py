"""Objects as files below a directory, local or shared.

What is written is flushed to the disk before it counts, with the directory entries that lead to it.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from framework.storage.request import PassingError, check_by_reading

# One write call takes at most 2 GiB on Linux, one read call at most 1,024 parts.
LARGEST_WRITE = 1 << 30
MOST_PARTS = 1024
PARTIAL = ".partial"
PIECE = 1 << 20  # bytes read at once
SOME = 20  # files that a check of a place to read looks at


class FileWriter:
    """`Writer` of a file. It gets its name when it is whole, so that what had the name before is there until then."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._path = path
        # No name that somebody looks for has a '~'; a listing shows what a killed process left, for it to be deleted.
        self._file, partial = tempfile.mkstemp(suffix=PARTIAL, prefix=path.name + "~", dir=path.parent)
        self.partial = Path(partial)

    def write(self, data: memoryview | bytes) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(self._file, rest[:LARGEST_WRITE]) :]

    def flush(self) -> None:
        """Make it durable, still without its name."""
        os.fchmod(self._file, 0o644)
        os.fsync(self._file)
        self._close_file()

    def close(self) -> None:
        self.flush()
        self.partial.replace(self._path)
        flush_directory(self._path.parent)

    def abort(self) -> None:
        with suppress(OSError):
            self._close_file()
        self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self._path.parent.rmdir()

    def _close_file(self) -> None:
        """Once: another thread may have been given the same number since."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)


class Directory:
    """`Storage` in a directory. It is made when something is written."""

    def __init__(self, path: str) -> None:
        self.url, self.gap = path, 0
        self._root = Path(path)

    def open_writer(self, name: str) -> FileWriter:
        return FileWriter(self._root / name)

    def put(self, name: str, data: bytes) -> None:
        writer = self.open_writer(name)
        try:
            writer.write(data)
            writer.close()
        except BaseException:
            writer.abort()
            raise

    def put_if_absent(self, name: str, data: bytes) -> bool:
        writer = self.open_writer(name)
        try:
            writer.write(data)
            writer.flush()
            os.link(writer.partial, self._root / name)
        except FileExistsError:
            return False
        finally:
            writer.abort()
        flush_directory((self._root / name).parent)
        return True

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def read_into(self, name: str, offset: int, parts: Sequence[memoryview]) -> None:
        path, left = self._root / name, [part for part in parts if len(part)]
        file = os.open(path, os.O_RDONLY)
        try:
            while left:
                count = os.preadv(file, left[:MOST_PARTS], offset)
                if not count:
                    raise OSError(f"{path} ends at byte {offset}, more was asked for")
                offset += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]
        finally:
            os.close(file)

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        path, end = self._root / name, offset + size
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while offset < end:
                piece = file.read(min(PIECE, end - offset))
                if not piece:
                    raise PassingError(f"it ends at byte {offset}, more was asked for")
                offset += len(piece)
                yield piece

    def list(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        start = self._root / prefix.rpartition("/")[0]
        for folder, _, files in os.walk(start, onerror=refuse):
            for file in files:
                path = Path(folder) / file
                name = path.relative_to(self._root).as_posix()
                if name.startswith(prefix):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        found[name] = path.stat().st_size
        return dict(sorted(found.items()))

    def check_readable(self) -> None:
        some: dict[str, int] = {}
        try:
            if not self._root.is_dir():
                raise ValueError(f"{self.url}: there is no such directory; is the name right?")
            # The first folder that holds a file: a walk over all of them may take minutes.
            for folder, _, files in os.walk(self._root, onerror=refuse):
                paths = [Path(folder) / file for file in files[:SOME]]
                some = {path.relative_to(self._root).as_posix(): path.stat().st_size for path in paths}
                if some:
                    break
        except OSError as error:
            raise ValueError(
                f"{self.url}: {error.strerror}: {error.filename}; change its mode or name another"
            ) from None
        check_by_reading(self.url, lambda: some, self.read_into)

    def delete(self, names: Iterable[str]) -> None:
        folders: set[Path] = set()
        for name in names:
            path = self._root / name
            path.unlink(missing_ok=True)
            folders.add(path.parent)
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            with suppress(OSError):  # not empty, or gone
                if folder != self._root:
                    folder.rmdir()

    def check(self) -> None:
        folder = self._root
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"{self.url}: {folder} is a file; name a directory")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"{self.url}: this user may not write in {folder}; change its mode or name another directory"
            )


def make_folder(path: Path) -> None:
    """A directory and those above it, with durable entries."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush_directory(path.parent)


def refuse(error: OSError) -> None:
    """Raises: a directory that can't be read isn't an empty one. One that is gone is."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def flush_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
