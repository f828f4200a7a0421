"""What recomputed blocks keep for the backward, in the host's memory from forward to backward.

A block's tensors lie on its shelf. On a GPU they go out and come back on a stream of their own, through pinned memory,
while the blocks compute: when the backward takes something from a shelf, the shelf of the block before, which is next,
is on its way already. On the CPU the same lines make a copy each way.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; of a GPU's tensor pinned, and complete when the stream has come so far."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


class HostMemory:
    """The shelves of a model's blocks."""

    def __init__(self) -> None:
        self._last: Callable[[], Shelf | None] = lambda: None
        self._stream: torch.cuda.Stream | None = None

    def next_shelf(self) -> "Shelf":
        """For the next block of the forward."""
        if self._stream is None and torch.cuda.is_available():
            self._stream = torch.cuda.Stream()
        shelf = Shelf(self._last, self._stream)
        self._last = weakref.ref(shelf)
        return shelf


class Shelf:
    """What one block keeps. It lives as long as something refers to what lies there, which the backward's graph does.

    before: the shelf that the backward comes to next, if it is still there.
    """

    def __init__(self, before: Callable[[], "Shelf | None"], stream: torch.cuda.Stream | None) -> None:
        self._before, self.stream = before, stream
        self._parcels: weakref.WeakSet[Parcel] = weakref.WeakSet()

    def put(self, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        """Send tensors out; call what is returned to have them back. One that is there twice travels once."""
        places = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
        parcels = {place: Parcel(tensor, self) for place, tensor in dict(zip(places, tensors, strict=True)).items()}
        self._parcels.update(parcels.values())

        def bring() -> tuple[Tensor, ...]:
            self.send_back()
            brought = {place: parcel.take() for place, parcel in parcels.items()}
            if (before := self._before()) is not None:
                before.send_back()
            return tuple(brought[place] for place in places)

        return bring

    @contextmanager
    def holding(self, x_bsd: Tensor) -> Iterator[None]:
        """While inside, what autograd saves of x, the input of a recomputed block, is put here."""

        def pack(saved: Tensor) -> Tensor | Callable[[], tuple[Tensor, ...]]:
            is_x = saved.data_ptr() == x_bsd.data_ptr() and saved.shape == x_bsd.shape
            return self.put((saved.detach(),)) if is_x else saved

        def unpack(packed: Tensor | Callable[[], tuple[Tensor, ...]]) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed()[0]

        with saved_tensors_hooks(pack, unpack):
            yield

    def send_back(self) -> None:
        """Let what lies here be on its way."""
        for parcel in self._parcels:
            parcel.send_back()


class Parcel:
    """One tensor on the host."""

    def __init__(self, tensor: Tensor, shelf: Shelf) -> None:
        self._device, self._shelf = tensor.device, shelf
        self._back: tuple[Tensor, torch.cuda.Event | None] | None = None
        if (stream := self._stream()) is None:
            self._host = to_host(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._host = to_host(tensor)
        tensor.record_stream(stream)

    def send_back(self) -> None:
        """Start the way back."""
        if self._back is None:
            stream = self._stream()
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                back = torch.empty_like(self._host, device=self._device).copy_(self._host, non_blocking=True)
                self._back = back, None if stream is None else stream.record_event()

    def take(self) -> Tensor:
        """The tensor, on its device."""
        self.send_back()
        assert self._back is not None
        (back, arrived), self._back = self._back, None
        if arrived is not None:  # and not what is on its way behind it
            torch.cuda.current_stream().wait_event(arrived)
            back.record_stream(torch.cuda.current_stream())
        return back

    def _stream(self) -> torch.cuda.Stream | None:
        """What the copies of a GPU's tensor run on."""
        return self._shelf.stream if self._device.type == "cuda" else None
