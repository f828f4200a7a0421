"""Batches to the device, by pinned memory and a stream of their own, so that the copy overlaps with the step before."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framework.batch import Batch, Condition


@dataclass(frozen=True)
class OnItsWay:
    """A batch whose copy was begun; event: recorded behind the copy, None on the CPU."""

    batch: Batch
    event: torch.cuda.Event | None

    def arrive(self) -> Batch:
        """The batch, for the current stream: that waits for the copy, the host doesn't."""
        if self.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            for tensor in tensors_of(self.batch):
                tensor.record_stream(stream)
        return self.batch


class Mover:
    """Copies batches to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enter(self) -> None:
        """Make the device this thread's: what a new one has is the first of the machine."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def start(self, batch: Batch) -> OnItsWay:
        """Begin to copy a batch."""
        if self._stream is None:
            return OnItsWay(batch, None)
        with torch.cuda.stream(self._stream):
            there = self._copy(batch)
            event = torch.cuda.Event()
            event.record(self._stream)
        return OnItsWay(there, event)

    def _copy(self, batch: Batch) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(self._device, non_blocking=True)

        condition = batch.condition
        mask = None if condition.text_mask is None else move(condition.text_mask)
        return replace(
            batch,
            latents=move(batch.latents),
            weights=move(batch.weights),
            condition=Condition(move(condition.text), mask),
        )


def tensors_of(batch: Batch) -> list[Tensor]:
    """What of a batch lies on the device."""
    condition = batch.condition
    found = [batch.latents, batch.weights, condition.text]
    return found if condition.text_mask is None else [*found, condition.text_mask]
