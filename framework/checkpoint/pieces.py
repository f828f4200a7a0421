"""Reading many ranges of a file, each into its own place, with as few reads as that takes and nothing much besides.

Blocks of which nearly all is needed are read whole, in windows of several, and checked against the manifest; of other
blocks only what is needed is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import xxhash

from framework.checkpoint.manifest import DamagedCheckpoint, StoredFile
from framework.storage.storage import Storage

# A block is read whole when at least this part of it is needed.
NEARLY_ALL = 1 / 1.05
WINDOW = 16  # blocks read at once


@dataclass(frozen=True)
class Piece:
    """Bytes from `start` of a file, and the memory that they fill."""

    start: int
    out: memoryview

    @property
    def stop(self) -> int:
        return self.start + len(self.out)


@dataclass
class ReadStats:
    """Bytes: needed: that were asked for. read: from the store, for that. checked: read again, only to be checked."""

    needed: int = 0
    read: int = 0
    checked: int = 0

    @property
    def amplification(self) -> float:
        """Bytes read for each one that was needed."""
        return self.read / self.needed if self.needed else 1.0


@dataclass(frozen=True)
class OpenFile:
    """A file of a checkpoint: where it lies, what its manifest says, and which of its blocks were checked.

    storage: where whole blocks are read, which may be a node's copy. origin: the store, for what is read unchecked.
    """

    storage: Storage
    origin: Storage
    name: str
    stored: StoredFile
    block: int
    checked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "checked", np.zeros(len(self.stored.checksums), dtype=bool))

    def read_blocks(self, first: int, last: int, pieces: Sequence[Piece] = ()) -> int:
        """Read the blocks first to last - 1 and fill the pieces inside them; returns the bytes read. Raises
        DamagedCheckpoint when a block isn't what was written.
        """
        parts = self.fetch(first, last, pieces)
        self.judge(first, last, parts)
        return sum(len(part) for part in parts)

    def fetch(self, first: int, last: int, pieces: Sequence[Piece]) -> list[memoryview]:
        """Read the blocks first to last - 1, unchecked: their bytes in order, the pieces' in the pieces' places."""
        start, stop = first * self.block, min(last * self.block, self.stored.size)
        parts = fill_gaps(start, stop, pieces)
        self.storage.read_into(self.name, start, parts)
        return parts

    def judge(self, first: int, last: int, parts: Sequence[memoryview]) -> None:
        """Compare the bytes of the blocks first to last - 1 with their checksums. Raises DamagedCheckpoint."""
        digest, index, left = xxhash.xxh3_64(), first, self.block
        for part in parts:
            rest = part
            while rest:
                digest.update(rest[:left])
                taken = min(left, len(rest))
                rest, left = rest[taken:], left - taken
                if not left:
                    self._judge(index, digest.hexdigest())
                    digest.reset()
                    index, left = index + 1, self.block
        if index < last:
            self._judge(index, digest.hexdigest())

    def _judge(self, index: int, checksum: str) -> None:
        if checksum != self.stored.checksums[index]:
            start, stop = index * self.block, min((index + 1) * self.block, self.stored.size)
            raise DamagedCheckpoint(
                f"{self.storage.url}/{self.name} is damaged between the bytes {start} and {stop}: they don't have the "
                "checksum that its manifest says"
            )
        self.checked[index] = True

    def check(self, blocks: Iterable[int], stats: ReadStats) -> None:
        """Read blocks only to check them. Raises DamagedCheckpoint."""
        for index in blocks:
            stats.checked += self.read_blocks(index, index + 1)


def read_pieces(file: OpenFile, pieces: list[Piece], stats: ReadStats) -> None:
    """Fill the pieces. Raises DamagedCheckpoint, and OSError."""
    pieces = sorted((piece for piece in pieces if len(piece.out)), key=lambda piece: piece.start)
    stats.needed += sum(len(piece.out) for piece in pieces)
    whole = blocks_to_read(file, pieces)
    with ThreadPoolExecutor(1) as ahead:  # reads a window while the one before is checked
        coming = [
            (first, last, ahead.submit(file.fetch, first, last, clip(pieces, first * file.block, last * file.block)))
            for first, last in windows(whole)
        ]
        for first, last, parts in coming:
            file.judge(first, last, parts.result())
            stats.read += sum(len(part) for part in parts.result())
    for start, stop in gaps(whole, file.block):
        for group in neighbours(clip(pieces, start, stop), file.origin.gap):
            stats.read += read_group(file, group)


def blocks_to_read(file: OpenFile, pieces: list[Piece]) -> np.ndarray:
    """Of every block, whether it is read whole."""
    needed = np.zeros(len(file.checked) + 1, dtype=np.int64)  # as steps between neighbours, then summed
    partial = np.zeros(len(file.checked), dtype=np.int64)
    for piece in pieces:
        first, last = piece.start // file.block, (piece.stop - 1) // file.block
        if first == last:
            partial[first] += len(piece.out)
            continue
        partial[first] += (first + 1) * file.block - piece.start
        partial[last] += piece.stop - last * file.block
        needed[first + 1] += file.block
        needed[last] -= file.block
    sizes = np.full(len(file.checked), file.block)
    sizes[-1:] = file.stored.size - file.block * (len(file.checked) - 1)
    return partial + np.cumsum(needed)[:-1] >= sizes * NEARLY_ALL


def windows(whole: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of blocks to read whole, at most WINDOW each: [first, last)."""
    index = 0
    while index < len(whole):
        last = index
        while last < len(whole) and whole[last] and last - index < WINDOW:
            last += 1
        if last > index:
            yield index, last
        index = max(last, index + 1)


def gaps(whole: np.ndarray, block: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of runs of the other blocks."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], whole, [True]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        yield int(first) * block, int(last) * block


def clip(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """The parts of the pieces that lie within a byte range. Pieces are in order and don't overlap."""
    low = bisect(pieces, start)
    found = []
    for piece in pieces[low:]:
        if piece.start >= stop:
            break
        begin, end = max(piece.start, start), min(piece.stop, stop)
        found.append(Piece(begin, piece.out[begin - piece.start : end - piece.start]))
    return found


def bisect(pieces: list[Piece], start: int) -> int:
    """Index of the first piece that ends beyond `start`."""
    low, high = 0, len(pieces)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pieces[middle].stop > start else (middle + 1, high)
    return low


def neighbours(pieces: list[Piece], gap: int) -> Iterator[list[Piece]]:
    """Pieces in groups that are read at once, as no more than `gap` bytes lie between them."""
    group: list[Piece] = []
    for piece in pieces:
        if group and piece.start - group[-1].stop > gap:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def read_group(file: OpenFile, group: list[Piece]) -> int:
    """Fill neighbouring pieces with one read. Returns the bytes read."""
    start, stop = group[0].start, group[-1].stop
    file.origin.read_into(file.name, start, fill_gaps(start, stop, group))
    return stop - start


def fill_gaps(start: int, stop: int, pieces: Sequence[Piece]) -> list[memoryview]:
    """Memory for the bytes [start, stop): the pieces', and some more for what lies before, between and behind them."""
    spare = memoryview(bytearray(stop - start - sum(len(piece.out) for piece in pieces)))
    parts: list[memoryview] = []
    position = start
    for piece in pieces:
        gap = piece.start - position
        parts += [spare[:gap], piece.out]
        spare, position = spare[gap:], piece.stop
    return [part for part in (*parts, spare) if len(part)]
