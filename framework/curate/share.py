"""Which of a work's pieces one of several jobs takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`, counted from 0 as ranks and the tasks of a job array are."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(
                f"there is no part {self.index}/{self.count}: parts are counted from 0, so the last of "
                f"{max(1, self.count)} is {max(1, self.count) - 1}/{max(1, self.count)}"
            )

    @property
    def folder(self) -> str:
        """Where this share's shards are, below the place of all."""
        return f"share-{self.index:04}-of-{self.count:04}"

    def takes(self, name: str) -> bool:
        """Whether an input is in this share, by a hash of its name: another input more moves none of the others."""
        return int.from_bytes(sha256(name.encode()).digest()[:8]) % self.count == self.index

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Every count-th item: shares of equal size, for a list that stays as it is."""
        return items[self.index :: self.count]


def read_share(text: str) -> Share:
    """`I/N`. Raises ValueError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--part {text} must be I/N, such as 0/8 to 7/8 for the 8 tasks of a job array")
    return Share(int(index), int(count))


def share_of_folder(name: str) -> Share | None:
    """The share whose folder has this name, None for another name."""
    words = name.split("-")
    if len(words) != 4 or (words[0], words[2]) != ("share", "of") or not (words[1] + words[3]).isdecimal():
        return None
    index, count = int(words[1]), int(words[3])
    return Share(index, count) if index < count else None
