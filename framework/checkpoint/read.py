"""Filling fragments from a checkpoint of whatever mesh, stage, engine and dtype.

What a rank needs is where the boxes of its fragments meet the boxes of the checkpoint. It reads those bytes and no
others. Every block of the files that any rank touched is checked by one of them: where it is read whole, else
afterwards.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from framework.checkpoint.find import Found
from framework.checkpoint.manifest import METADATA, DamagedCheckpoint, resolve
from framework.checkpoint.pieces import OpenFile, Piece, ReadStats, read_pieces
from framework.checkpoint.records import StoredBox, StoredTensor, check_cover, decode_metadata
from framework.checkpoint.write import as_bytes
from framework.parallel.fragments import Fragment, ParameterShard
from framework.storage.storage import Storage

Checked = dict[str, bytes]  # file -> its checked blocks as bits


@dataclass(frozen=True)
class Place:
    """A box of a tensor in memory: its offset in the global tensor, its sizes, and its first element in `flat`."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


@dataclass
class Boxes:
    """The stored boxes of a tensor as arrays, `n d` each, to find quickly which of them a box meets."""

    tensor: StoredTensor
    offsets: np.ndarray = field(init=False)
    ends: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        boxes = self.tensor.boxes
        shape = (len(boxes), len(self.tensor.shape))
        self.offsets = np.array([box.offset for box in boxes], dtype=np.int64).reshape(shape)
        self.ends = self.offsets + np.array([box.sizes for box in boxes], dtype=np.int64).reshape(shape)

    def meeting(self, place: Place) -> list[StoredBox]:
        """The stored boxes that share elements with a place."""
        low = np.array(place.offset, dtype=np.int64)
        high = low + np.array(place.sizes, dtype=np.int64)
        hits = ((self.offsets < high) & (self.ends > low)).all(axis=1)
        return [self.tensor.boxes[index] for index in np.flatnonzero(hits)]


class CheckpointReader:
    """A checkpoint to read from. near: a store that may hold copies of its files, and is quicker."""

    def __init__(self, storage: Storage, found: Found, *, near: Storage | None = None) -> None:
        self.storage, self.found, self.stats = storage, found, ReadStats()
        folder, manifest = found.entry.folder, found.manifest
        copies = {} if near is None else near.list(f"{folder}/")
        self._files: dict[str, OpenFile] = {}
        for file, stored in manifest.files.items():
            name = resolve(folder, file)
            place = near if near is not None and copies.get(name) == stored.size else storage
            self._files[file] = OpenFile(place, storage, name, stored, manifest.block)
        data = self._read_metadata()
        self.tensors = decode_metadata(data, f"{storage.url}/{folder}/{METADATA}")
        self._boxes: dict[str, Boxes] = {}

    def load(self, fragments: list[Fragment]) -> None:
        """Fill fragments in place, cast to what they are held in; one state after the other, as on a GPU each needs its
        size in host memory. Raises DamagedCheckpoint, and ValueError for a tensor that is absent or of another shape.
        """
        by_state: defaultdict[str, list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            by_state[fragment.state].append(fragment)
        for state in by_state.values():
            targets = [(fragment, self._target(fragment)) for fragment in state]
            pieces: defaultdict[str, list[Piece]] = defaultdict(list)
            for fragment, target in targets:
                for file, piece in self._pieces(fragment, target):
                    pieces[file].append(piece)
            for file, wanted in pieces.items():
                read_pieces(self._files[file], wanted, self.stats)
            for fragment, target in targets:
                if target is not fragment.flat:
                    fragment.flat.copy_(target)

    def whole(self, key: str) -> Tensor:
        """A whole tensor, in the dtype it is stored in."""
        stored = self.stored(key)
        out = torch.empty(stored.shape, dtype=stored.dtype)
        self.fill(key, (0,) * out.dim(), out)
        return out

    def fill(self, key: str, offset: tuple[int, ...], out: Tensor) -> None:
        """Fill `out` with the box of its shape at `offset` of the global tensor."""
        state, _, name = key.partition(".")
        shard = ParameterShard(name, self.stored(key).shape, offset, tuple(out.shape))
        if out.is_contiguous():
            self.load([Fragment(state, shard, 0, out.detach().view(-1))])
        else:
            held = torch.empty(out.shape, dtype=out.dtype)
            self.load([Fragment(state, shard, 0, held.view(-1))])
            out.copy_(held)

    def stored(self, key: str) -> StoredTensor:
        """Raises ValueError for a tensor that isn't there."""
        if key not in self.tensors:
            raise ValueError(f"{self.storage.url}/{self.found.entry.folder} has no tensor {key}")
        return self.tensors[key]

    def checked(self) -> Checked:
        """Of every file that was touched, which of its blocks were checked."""
        return {name: np.packbits(file.checked).tobytes() for name, file in self._files.items() if file.checked.any()}

    def check_rest(self, by_rank: list[Checked], *, touched: set[str], index: int) -> None:
        """Check this rank's share of what nobody has. by_rank: of every rank, by `checked`.

        Raises DamagedCheckpoint.
        """
        number = 0
        for name in sorted(touched):
            file = self._files[name]
            seen = np.zeros(len(file.checked), dtype=bool)
            for checked in by_rank:
                if name in checked:
                    bits = np.frombuffer(checked[name], dtype=np.uint8)
                    seen |= np.unpackbits(bits, count=len(seen)).astype(bool)
            for block in np.flatnonzero(~seen):
                if number % len(by_rank) == index:
                    file.check([int(block)], self.stats)
                number += 1

    def files_of(self, states: set[str]) -> set[str]:
        """The files that hold tensors of some states."""
        chosen = (tensor for key, tensor in self.tensors.items() if key.partition(".")[0] in states)
        return {box.file for tensor in chosen for box in tensor.boxes}

    def check(self, states: set[str] | None = None) -> int:
        """Check every block of the files of some states, None for all. Returns bytes. Raises DamagedCheckpoint."""
        before = self.stats.checked
        for name in sorted(self._files if states is None else self.files_of(states)):
            self._files[name].check(range(len(self._files[name].checked)), self.stats)
        return self.stats.checked - before

    def _read_metadata(self) -> bytes:
        file = self._files.get(METADATA)
        if file is None:
            raise DamagedCheckpoint(f"{self.storage.url}/{self.found.entry.folder}: the manifest names no {METADATA}")
        data = bytearray(file.stored.size)
        file.read_blocks(0, len(file.checked), [Piece(0, memoryview(data))])
        return bytes(data)

    def _target(self, fragment: Fragment) -> Tensor:
        """The memory that a fragment is read into: its own, where bytes can go there as they are stored."""
        flat, dtype = fragment.flat, self.stored(fragment.key).dtype
        direct = flat.device.type == "cpu" and flat.dtype == dtype and flat.is_contiguous()
        return flat if direct else torch.empty(flat.numel(), dtype=dtype)

    def _pieces(self, fragment: Fragment, target: Tensor) -> Iterator[tuple[str, Piece]]:
        """(file, piece) of everything a fragment needs; its elements are covered exactly once."""
        key, shard = fragment.key, fragment.shard
        stored = self.stored(key)
        if stored.shape != shard.global_shape:
            where = f"{self.storage.url}/{self.found.entry.folder}"
            raise ValueError(f"{key} has the shape {stored.shape} in {where}, {shard.global_shape} in the model")
        if key not in self._boxes:
            check_cover(key, stored)
            self._boxes[key] = Boxes(stored)
        boxes = self._boxes[key]
        data = as_bytes(target)
        size, covered = stored.dtype.itemsize, 0
        for box in fragment.local_boxes():
            offset = tuple(a + b for a, b in zip(box.offset, shard.offset, strict=True))
            place = Place(offset, box.sizes, box.start - fragment.start)
            meeting = boxes.meeting(place)
            for each in meeting:
                starts, places, run = common_runs(each, place)
                covered += run * len(starts)
                for start, position in zip(starts.tolist(), places.tolist(), strict=True):
                    out = data[position * size : (position + run) * size]
                    yield each.file, Piece(each.start + start * size, out)
        if covered != fragment.flat.numel():
            raise DamagedCheckpoint(
                f"{self.storage.url}/{self.found.entry.folder} covers {covered} of the {fragment.flat.numel()} "
                f"elements needed of {key}"
            )


def common_runs(stored: StoredBox, place: Place) -> tuple[np.ndarray, np.ndarray, int]:
    """Where a stored box and a place in memory meet, as runs contiguous in both: first element in the stored box, first
    element in memory, and how many elements each run has.
    """
    low = [max(a, b) for a, b in zip(stored.offset, place.offset, strict=True)]
    corners = zip(stored.offset, stored.sizes, place.offset, place.sizes, strict=True)
    sizes = [min(a + n, b + m) - start for (a, n, b, m), start in zip(corners, low, strict=True)]
    dim, run = len(sizes), 1
    while dim:
        dim -= 1
        run *= sizes[dim]
        if sizes[dim] != stored.sizes[dim] or sizes[dim] != place.sizes[dim]:
            break
    num_runs = prod(sizes[:dim])
    outer = np.indices(sizes[:dim], dtype=np.int64).reshape(dim, num_runs)
    starts, places = np.zeros(num_runs, dtype=np.int64), np.full(num_runs, place.start, dtype=np.int64)
    for axis in range(len(sizes)):
        index = outer[axis] if axis < dim else 0
        starts += (low[axis] - stored.offset[axis] + index) * prod(stored.sizes[axis + 1 :])
        places += (low[axis] - place.offset[axis] + index) * prod(place.sizes[axis + 1 :])
    return starts, places, run
