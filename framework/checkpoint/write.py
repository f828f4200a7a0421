"""One rank's files of a checkpoint: for each state one, laid out before anything is written.

A file holds flat ranges of parameter shards, each cut into boxes of its global tensor (fragments.py). They lie one
behind the other in a staging buffer, so a box is a slice of the buffer and is written as it lies there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from framework.checkpoint.manifest import BLOCK, StoredFile, block_checksum
from framework.checkpoint.records import StoredBox, record_head
from framework.parallel.fragments import ParameterShard, range_boxes
from framework.storage.storage import Storage, Writer

ALIGNMENT = 64  # bytes; a copy into the page cache to odd addresses takes twice as long
SMALL = 1 << 16  # bytes below which writes are gathered


@dataclass(frozen=True)
class Range:
    """Elements [start, start + num_elements) of the row-major flattening of a parameter shard."""

    shard: ParameterShard
    start: int
    num_elements: int


@dataclass(frozen=True)
class KeyedBox:
    """A box and the tensor it belongs to, by its key and global shape."""

    key: str
    shape: tuple[int, ...]
    box: StoredBox


@dataclass(frozen=True)
class FileLayout:
    """A file of records. boxes, heads: in order, one of each a record (a head with zeros before it, so that the
    elements begin at a multiple of ALIGNMENT); their elements follow each other in the staging buffer. num_bytes: of
    the whole file.
    """

    name: str
    dtype: torch.dtype
    boxes: tuple[KeyedBox, ...]
    heads: tuple[bytes, ...]
    num_bytes: int


def lay_out(name: str, state: str, ranges: Sequence[Range], dtype: torch.dtype) -> FileLayout:
    """The file of one state."""
    boxes, heads, position = [], [], 0
    for each in ranges:
        shard = each.shard
        for box in range_boxes(shard.shape, each.start, each.start + each.num_elements):
            head = record_head(box.sizes, dtype)
            start = -(-(position + len(head)) // ALIGNMENT) * ALIGNMENT
            head = bytes(start - len(head) - position) + head
            position = start
            offset = tuple(a + b for a, b in zip(box.offset, shard.offset, strict=True))
            stored = StoredBox(offset, box.sizes, name, position)
            boxes.append(KeyedBox(f"{state}.{shard.name}", shard.global_shape, stored))
            heads.append(head)
            position += box.num_elements * dtype.itemsize
    return FileLayout(name, dtype, tuple(boxes), tuple(heads), position)


class BlockWriter:
    """Hands bytes on to a writer and takes the checksum of every block of them."""

    def __init__(self, writer: Writer) -> None:
        self._writer, self._hash = writer, xxhash.xxh3_64()
        self._gathered = bytearray()
        self._in_block = self._size = 0
        self._checksums: list[str] = []

    def write(self, data: memoryview | bytes) -> None:
        """Append."""
        self._count(memoryview(data))
        if len(data) < SMALL:
            self._gathered += data
        if len(self._gathered) >= SMALL or (self._gathered and len(data) >= SMALL):
            self._writer.write(bytes(self._gathered))
            self._gathered.clear()
        if len(data) >= SMALL:
            self._writer.write(data)

    def close(self) -> StoredFile:
        """Make it durable."""
        if self._gathered:
            self._writer.write(bytes(self._gathered))
        self._writer.close()
        if self._in_block:
            self._checksums.append(self._hash.hexdigest())
        return StoredFile(self._size, tuple(self._checksums))

    def _count(self, data: memoryview) -> None:
        self._size += len(data)
        while data:
            part = data[: BLOCK - self._in_block]
            self._hash.update(part)
            self._in_block += len(part)
            if self._in_block == BLOCK:
                self._checksums.append(self._hash.hexdigest())
                self._hash.reset()
                self._in_block = 0
            data = data[len(part) :]


def as_bytes(flat: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return flat.detach().view(torch.uint8).numpy().data


def write_file(storage: Storage, name: str, layout: FileLayout, staged: Tensor) -> StoredFile:
    """Write a file from its staging buffer. Raises OSError, and leaves nothing then."""
    return write_boxes(storage, name, layout, staged.split([keyed.box.num_elements for keyed in layout.boxes]))


def write_boxes(storage: Storage, name: str, layout: FileLayout, parts: Iterable[Tensor]) -> StoredFile:
    """Write a file from the elements of its boxes in order, 1-D each. Raises OSError, and leaves nothing then."""
    inner = storage.open_writer(name)
    try:
        writer = BlockWriter(inner)
        for head, part in zip(layout.heads, parts, strict=True):
            writer.write(head)
            writer.write(as_bytes(part))
        return writer.close()
    except BaseException:
        inner.abort()
        raise


def put_checksummed(storage: Storage, name: str, data: bytes) -> StoredFile:
    """Write a small object."""
    storage.put(name, data)
    return StoredFile(len(data), tuple(block_checksum(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)))


def copy_file(source: Storage, target: Storage, name: str, stored: StoredFile) -> None:
    """Copy a file from one store to another. Raises OSError, also where it isn't what was written."""
    inner, buffer = target.open_writer(name), memoryview(bytearray(16 * BLOCK))
    try:
        writer = BlockWriter(inner)
        for start in range(0, stored.size, len(buffer)):
            part = buffer[: min(len(buffer), stored.size - start)]
            source.read_into(name, start, [part])
            writer.write(bytes(part))
        if writer.close() != stored:
            raise OSError(f"{source.url}/{name} isn't what was written there")
    except BaseException:
        inner.abort()
        raise
