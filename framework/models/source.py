"""Where named tensors of a model can be read from, box by box: another library's files, or a checkpoint of ours.

What reads one asks for no more than it needs: a rank its own boxes, an export one part after the other. So neither
needs memory for the model.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Protocol

from torch import Tensor

Sizes = tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors of a model, wherever they are stored. name: what a message calls it, a path or a URL."""

    name: str

    def shapes(self) -> Mapping[str, Sizes]:
        """Global shapes by parameter name (diffusers' names), in the order in which an export writes them."""
        ...

    def read(self, name: str, offset: Sizes, out: Tensor) -> None:
        """Fill `out` with the box of its shape at `offset` of the global tensor, cast to its dtype."""
        ...


def parts_of(sizes: Sizes, max_elements: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Cut a tensor along its first dim into parts of at most `max_elements`, or of one row where that is larger:
    (offset, sizes) of each.
    """
    if not sizes:
        yield (), ()
        return
    rows = max(1, max_elements // max(1, prod(sizes[1:])))
    zeros = (0,) * (len(sizes) - 1)
    for first in range(0, sizes[0], rows):
        yield (first, *zeros), (min(rows, sizes[0] - first), *sizes[1:])
