"""Which part of a global tensor a rank holds.

A tensor-parallel rank holds one axis-aligned box of the global tensor, a `ParameterShard`. ZeRO partitions the
row-major flattening of that box: a `Fragment` is a contiguous range [start, start + n) of it, as a 1-D view of the
engine's own buffer. Any such range falls into at most 2N - 1 contiguous axis-aligned boxes of an N-dimensional tensor:

    range = tail of the first row | whole rows | head of the last row, and the same inside the two partial rows.

Boxes are what torch's distributed checkpoint stores, so the same fragments serve saving, loading, initialisation, EMA
and verification, on any mesh and in any ZeRO stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """An axis-aligned box: offset and sizes in the surrounding tensor; start: its first element in the flattening."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def num_elements(self) -> int:
        return prod(self.sizes)


def range_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Split the flat range [start, stop) of a row-major tensor of `shape` into contiguous boxes, in order."""
    if stop <= start:
        return []
    if not shape:
        return [Box((), (), 0)]
    if len(shape) == 1:
        return [Box((start,), (stop - start,), start)]
    row = prod(shape[1:])

    def inside(index: int, first: int, last: int) -> list[Box]:
        return [
            Box((index, *box.offset), (1, *box.sizes), index * row + box.start)
            for box in range_boxes(shape[1:], first, last)
        ]

    first_row, first = divmod(start, row)
    last_row, last = divmod(stop, row)
    if first_row == last_row:
        return inside(first_row, first, last)
    boxes = []
    if first:
        boxes += inside(first_row, first, row)
        first_row += 1
    if last_row > first_row:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(Box((first_row, *zeros), (last_row - first_row, *shape[1:]), first_row * row))
    if last:
        boxes += inside(last_row, 0, last)
    return boxes


@dataclass(frozen=True)
class ParameterShard:
    """A tensor-parallel rank's box of a global tensor. owner: whether this rank writes it; others may hold the same.
    trainable: whether it is trained. A frozen one has the state "model" alone.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    owner: bool = True
    trainable: bool = True

    @staticmethod
    def whole(name: str, shape: tuple[int, ...]) -> "ParameterShard":
        """The shard of a tensor that tp doesn't split."""
        return ParameterShard(name, shape, (0,) * len(shape), shape)


@dataclass(frozen=True)
class Fragment:
    """A flat range of a parameter shard, in one state of the training.

    state: "model" (fp32 master weights; frozen ones as they are held), "exp_avg", "exp_avg_sq" or "ema". flat: 1-D view
    of the live buffer: writing to it writes the state.
    """

    state: str
    shard: ParameterShard
    start: int
    flat: Tensor

    @property
    def key(self) -> str:
        """The tensor's name in a checkpoint."""
        return f"{self.state}.{self.shard.name}"

    def local_boxes(self) -> list[Box]:
        """Boxes within the shard."""
        return range_boxes(self.shard.shape, self.start, self.start + self.flat.numel())

    def global_boxes(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offset in the global tensor, view of the live buffer in the box's shape) for every box."""
        for box in self.local_boxes():
            offset = tuple(a + b for a, b in zip(box.offset, self.shard.offset, strict=True))
            yield offset, self.flat.narrow(0, box.start - self.start, box.num_elements).view(box.sizes)

    def copy_from(self, full: Tensor) -> None:
        """Fill the fragment from the global tensor."""
        for offset, view in self.global_boxes():
            index = tuple(slice(o, o + s) for o, s in zip(offset, view.shape, strict=True))
            view.copy_(full[index])


def mark_split(parameter: Tensor) -> None:
    """Mark a parameter of which tp ranks hold different parts, by the attribute that DeepSpeed's norm looks for: its
    squares are summed over tp. Without it the norm is too small, and nothing says so.
    """
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def is_split(parameter: Tensor) -> bool:
    """Whether tp ranks hold different parts of a parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))
