"""An exponential moving average of the fp32 master weights that are trained, partitioned exactly as they are.

    e <- e + (1 - d_n)(w - e),    d_n = min(decay, (1 + n) / (10 + n))

Each rank averages the fragments it holds; nothing is gathered. To evaluate with the average, its values and the live
ones are exchanged in place and exchanged back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from framework.config import EmaConfig
from framework.parallel.fragments import Fragment


class Refreshable(Protocol):
    """What an engine offers after its master weights were written from outside."""

    def refresh(self) -> None: ...


class Ema:
    """The average of the trained `model` fragments among those given."""

    def __init__(self, fragments: list[Fragment], config: EmaConfig) -> None:
        self._live = [f for f in fragments if f.state == "model" and f.shard.trainable and config.decay]
        self._averages = [f.flat.clone() for f in self._live]
        self._decay = config.decay

    @torch.no_grad()
    def update(self, *, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        if not self._live:  # more ranks than rows
            return
        torch._foreach_lerp_(self._averages, [f.flat for f in self._live], 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the live weights."""
        for average, fragment in zip(self._averages, self._live, strict=True):
            average.copy_(fragment.flat)

    def fragments(self) -> list[Fragment]:
        """Live views of the average, for saving and loading."""
        return [Fragment("ema", f.shard, f.start, a) for f, a in zip(self._live, self._averages, strict=True)]

    @contextmanager
    def in_place_of_weights(self, engine: Refreshable) -> Iterator[None]:
        """Run the body with the averaged weights in the engine; the live ones are back, bit for bit, afterwards."""
        self._exchange()
        engine.refresh()
        try:
            yield
        finally:
            self._exchange()
            engine.refresh()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, fragment in zip(self._averages, self._live, strict=True):
            held = fragment.flat.clone()
            fragment.flat.copy_(average)
            average.copy_(held)
