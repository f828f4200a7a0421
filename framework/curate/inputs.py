"""An input of `prepare`: its name, how to get its bytes, what is said about it. The sources are folder.py, manifest.py
and tars.py: each yields its inputs, and what it can tell is none, in an order that stays the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Literal

from framework.curate.captions import CaptionLine
from framework.storage.storage import Source, open_source

Reason = Literal[
    "broken", "no caption", "too short", "duplicate", "too large", "not a video", "no such file", "can't be read"
]

# An image is a video of one frame.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", *IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Skip:
    """An input that isn't in the shards. file: its name. detail: what lies behind the reason."""

    file: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Input:
    """A video. name: the same on every run, for one source. line: what the source itself says of it, None where that
    is nothing. read: its bytes; raises OSError. size: in bytes, where it is known without reading. costly: whether
    reading it again, only to see that it is what it was, would take a download: it counts as the same by its name.
    """

    name: str
    line: CaptionLine | None
    read: Callable[[], bytes]
    size: int | None = None
    costly: bool = False


Found = Iterator[Input | Skip]


def is_video(name: str) -> bool:
    """Whether a name is that of a video or an image."""
    return name.lower().endswith(SUFFIXES)


class Reader:
    """Reads objects by URI, with one store for each bucket."""

    def __init__(self) -> None:
        self._stores: dict[str, Source] = {}

    def place(self, uri: str) -> tuple[Source, str]:
        """The store that holds an object, and its name there. Raises ValueError for a URI of no store."""
        scheme, found, rest = uri.partition("://")
        if found:
            bucket, _, name = rest.partition("/")
            root = f"{scheme}://{bucket}"
        else:
            root, name = str(Path(uri).parent), Path(uri).name
        if root not in self._stores or not found:
            self._stores[root] = open_source(root)
        return self._stores[root], name

    def read(self, uri: str) -> bytes:
        """All of an object. Raises OSError."""
        store, name = self.place(uri)
        return store.read(name)

    def open(self, uri: str) -> BufferedReader:
        """An object from its beginning to its end, read as it is needed. Raises OSError."""
        store, name = self.place(uri)
        size = store.list(name).get(name)
        if size is None:
            raise FileNotFoundError(f"{uri} isn't there")
        return BufferedReader(_Stream(store, name, size), 1 << 24)

    def is_zero(self, uri: str, offset: int, size: int) -> bool:
        """Whether an object has so many bytes from `offset`, all zero. Raises OSError."""
        store, name = self.place(uri)
        if store.list(name).get(name, 0) < offset + size:
            return False
        data = bytearray(size)
        store.read_into(name, offset, [memoryview(data)])
        return not any(data)

    def below(self, url: str) -> dict[str, int]:
        """The objects below a folder or prefix, relative to it -> size. Raises OSError."""
        return open_source(url).list()


class _Stream(RawIOBase):
    """An object as a file that is read once."""

    def __init__(self, store: Source, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._at)
        if count:
            self._store.read_into(self._name, self._at, [memoryview(buffer)[:count]])
        self._at += count
        return count
