"""Fewer, larger boxes: ranks exchange what they hold before they write.

In ZeRO stage 3 every rank of N holds 1/N of every tensor: N boxes a tensor and state, millions for a large model, each
with its own line in the checkpoint's metadata. So the ranks of a zero group may cut the flattening of all their shards,
one behind the other, into N equal ranges instead, rank i writing the i-th: some thousand boxes in all. What a rank
sends is what it holds, less what it keeps.

    T = sum of the shards' elements,   share = ceil(T / N),   rank i writes [i share, (i + 1) share)
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from framework.checkpoint.write import Range
from framework.parallel.collectives import all_to_all
from framework.parallel.fragments import ParameterShard
from framework.parallel.mesh import Group

Spans = np.ndarray  # `n 2` int64: first element in the flattening of all shards, number of elements


class Exchange:
    """The exchange of one state; all states have the same ranges. Making one is a collective over the group.

    ranges: what this rank holds afterwards.
    """

    def __init__(self, held: Sequence[Range], shards: Sequence[ParameterShard], group: Group) -> None:
        """held: in the order of `shards`, as they lie in the buffers. shards: that somebody in the group holds."""
        self._group = group
        ends = np.cumsum([int(np.prod(shard.shape, dtype=np.int64)) for shard in shards])
        first = dict(zip((shard.name for shard in shards), (0, *ends[:-1].tolist()), strict=True))
        total = int(ends[-1]) if len(ends) else 0
        share = -(-total // group.size)
        own = np.array([(first[r.shard.name] + r.start, r.num_elements) for r in held], dtype=np.int64).reshape(-1, 2)
        sent = [cut(own, index * share, (index + 1) * share) for index in range(group.size)]
        self._send = [int(spans[:, 1].sum()) for spans in sent]
        counts = all_to_all(torch.tensor([2 * len(s) for s in sent]), ones(group), ones(group), group, "save")
        flat = torch.from_numpy(np.concatenate([*sent, np.zeros((0, 2), np.int64)]).reshape(-1))
        lines = all_to_all(flat, [2 * len(s) for s in sent], counts.tolist(), group, "save")
        came = [part.view(-1, 2).numpy() for part in lines.split(counts.tolist())]
        self._receive = [int(spans[:, 1].sum()) for spans in came]
        self._came, self._low = np.concatenate(came), min(group.index * share, total)
        self._size = min((group.index + 1) * share, total) - self._low
        if int(self._came[:, 1].sum()) != self._size:
            raise ValueError(
                f"the ranks hold {self._came[:, 1].sum()} of {self._size} elements that one of them writes"
            )
        self.ranges = [
            Range(shard, low - int(first[shard.name]), length)
            for shard, end in zip(shards, ends.tolist(), strict=True)
            for low, length in cut(np.array([[first[shard.name], end - first[shard.name]]]), *self._bounds()).tolist()
        ]

    def run(self, buffer: Tensor) -> Tensor:
        """This rank's range of one state, from what the ranks hold of it. A collective."""
        came = all_to_all(buffer, self._send, self._receive, self._group, "save")
        out = torch.empty(self._size, dtype=buffer.dtype)
        position = 0
        for low, length in self._came.tolist():
            out.narrow(0, low - self._low, length).copy_(came.narrow(0, position, length))
            position += length
        return out

    def _bounds(self) -> tuple[int, int]:
        return self._low, self._low + self._size


def ones(group: Group) -> list[int]:
    return [1] * group.size


def cut(spans: Spans, low: int, high: int) -> Spans:
    """The parts of some spans within [low, high); neighbours become one."""
    starts = np.maximum(spans[:, 0], low)
    ends = np.minimum(spans[:, 0] + spans[:, 1], high)
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return np.zeros((0, 2), dtype=np.int64)
    begins = np.concatenate([[True], starts[1:] != ends[:-1]])
    last = np.concatenate([begins[1:], [True]])
    return np.stack([starts[begins], ends[last] - starts[begins]], axis=1)
