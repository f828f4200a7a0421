"""Objects as files below a directory, local or shared.

What is written is flushed to the disk before it counts, with the directory entries that lead to it.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

# One write call takes at most 2 GiB on Linux, one read call at most 1,024 parts.
LARGEST_WRITE = 1 << 30
MOST_PARTS = 1024
PARTIAL = ".partial"


class FileWriter:
    """`Writer` of a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, data: memoryview | bytes) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(self._file, rest[:LARGEST_WRITE]) :]

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)
        flush_directory(self._path.parent)

    def abort(self) -> None:
        with suppress(OSError):
            os.close(self._file)
        self._path.unlink(missing_ok=True)


class Directory:
    """`Storage` in a directory. It is made when something is written."""

    def __init__(self, path: str) -> None:
        self.url, self.gap = path, 0
        self._root = Path(path)

    def open_writer(self, name: str) -> FileWriter:
        return FileWriter(self._root / name)

    def put(self, name: str, data: bytes) -> None:
        path = self._root / name
        partial = self._write_aside(path, data)
        try:
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        flush_directory(path.parent)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._root / name
        partial = self._write_aside(path, data)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        flush_directory(path.parent)
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

    def list(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        start = self._root / prefix.rpartition("/")[0]
        for folder, _, files in os.walk(start):
            for file in files:
                path = Path(folder) / file
                name = path.relative_to(self._root).as_posix()
                if name.startswith(prefix) and not file.endswith(PARTIAL):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        found[name] = path.stat().st_size
        return dict(sorted(found.items()))

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

    def _write_aside(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(suffix=PARTIAL, prefix=path.name + ".", dir=path.parent)
        try:
            with os.fdopen(file, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)


def flush_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
