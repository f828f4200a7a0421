"""What a save copies before training goes on: this rank's trained fragments, into host memory that is taken once.

The memory is taken, and touched, when the run starts: a first save isn't dearer than the others, and a node without the
room for it says so at once. On a GPU it is pinned.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from framework.checkpoint.write import Range
from framework.parallel.fragments import Fragment, ParameterShard


class Staging:
    """buffers: state -> its fragments one behind the other, in the order of `ranges`."""

    def __init__(
        self, fragments: Sequence[Fragment], shards: Sequence[ParameterShard], states: Mapping[str, torch.dtype]
    ) -> None:
        """fragments: those that this rank writes. shards: of the whole model, in its order. states: that any rank
        writes; shards and states are the same on every rank.
        """
        place = {shard.name: number for number, shard in enumerate(shards)}
        by_state: dict[str, list[Fragment]] = {state: [] for state in states}
        for fragment in sorted(fragments, key=lambda f: (place[f.shard.name], f.start)):
            by_state[fragment.state].append(fragment)
        self.ranges: dict[str, list[Range]] = {}
        self.buffers: dict[str, Tensor] = {}
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        for state, held in by_state.items():
            self.ranges[state] = [Range(f.shard, f.start, f.flat.numel()) for f in held]
            size, pinned = sum(f.flat.numel() for f in held), any(f.flat.is_cuda for f in held)
            buffer = torch.zeros(size, dtype=states[state], pin_memory=pinned)
            self.buffers[state] = buffer.fill_(0)
            sources = joined([f.flat.detach() for f in held])
            self._sources += sources
            self._targets += list(buffer.split([source.numel() for source in sources]))
        self._on_gpu = any(source.is_cuda for source in self._sources)

    @torch.no_grad()
    def copy(self) -> None:
        """Copy the live values. The buffers must not be in use by a save."""
        for target, source in zip(self._targets, self._sources, strict=True):
            target.copy_(source, non_blocking=True)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()


def joined(parts: Sequence[Tensor]) -> list[Tensor]:
    """1-D tensors with neighbours in memory made one: engines keep most of a state in one buffer, and one copy of it is
    quicker than a thousand.
    """
    runs: list[Tensor] = []
    for part in parts:
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
            and last.storage_offset() + last.numel() == part.storage_offset()
        ):
            runs[-1] = last.as_strided((last.numel() + part.numel(),), (1,), last.storage_offset())
        else:
            runs.append(part)
    return runs
