"""Planning a checkpoint of a simulated 14B model on 1,024 ranks: what each rank and what rank 0 do before a first save.

The ranges that the ranks of each ZeRO stage hold are made up by its rule; no rank runs. Rank 0's part is what it does
with what the ranks send it. With the even layout the ranks exchange their coordinates first: one rank's share of that
is measured here too, with what it would receive made up.
"""

import pickle
import time
from collections.abc import Callable, Iterator
from math import prod

import numpy as np
import torch

from framework.checkpoint.exchange import cut
from framework.checkpoint.records import StoredTensor, check_cover, decode_metadata, encode_metadata
from framework.checkpoint.write import FileLayout, Range, lay_out
from framework.models.config import ModelConfig
from framework.parallel.fragments import ParameterShard
from framework.plan.parameters import parameter_shapes

RANKS = 1024
STATES = ("model", "exp_avg", "exp_avg_sq")


def held_flat(shards: list[ParameterShard], rank: int) -> list[Range]:
    """Stages 1 and 2, and the even layout: an equal range of all parameters one behind the other."""
    ends = np.cumsum([prod(shard.shape) for shard in shards])
    share = -(-int(ends[-1]) // RANKS)
    low, high = rank * share, min((rank + 1) * share, int(ends[-1]))
    first = int(np.searchsorted(ends, low, side="right"))
    found = []
    for shard, end in zip(shards[first:], ends[first:].tolist(), strict=True):
        start = end - prod(shard.shape)
        if start >= high:
            break
        begin, stop = max(low, start), min(high, end)
        found.append(Range(shard, begin - start, stop - begin))
    return found


def held_stage3(shards: list[ParameterShard], rank: int) -> list[Range]:
    """Stage 3: the rank's part of every parameter."""
    found = []
    for shard in shards:
        size = prod(shard.shape)
        part = -(-size // RANKS)
        if (start := rank * part) < size:
            found.append(Range(shard, start, min(part, size - start)))
    return found


def layouts_of(
    held: Callable[[list[ParameterShard], int], list[Range]], shards: list[ParameterShard]
) -> Iterator[list[FileLayout]]:
    for rank in range(RANKS):
        ranges = held(shards, rank)
        yield [lay_out(f"{state}-{rank:05}.distcp", state, ranges, torch.float32) for state in STATES]


def time_plan(
    name: str, held: Callable[[list[ParameterShard], int], list[Range]], shards: list[ParameterShard], share: int
) -> None:
    """share: of how many ranks one is measured; the rest is counted from it."""
    slowest, sent = 0.0, []
    tensors: dict[str, list] = {}  # type: ignore[type-arg]
    begin = time.perf_counter()
    for rank, layouts in enumerate(layouts_of(held, shards)):
        if rank >= share:
            break
        seconds = time.perf_counter() - begin
        slowest = max(slowest, seconds)
        sent.append(pickle.dumps(layouts))
        begin = time.perf_counter()
    received = time.perf_counter()
    for data in sent:
        for layout in pickle.loads(data):
            for keyed in layout.boxes:
                tensors.setdefault(keyed.key, []).append(keyed)
    built = {k: StoredTensor(v[0].shape, torch.float32, tuple(keyed.box for keyed in v)) for k, v in tensors.items()}
    if share == RANKS:
        for key, tensor in built.items():
            check_cover(key, tensor)
    data = encode_metadata(built)
    first = time.perf_counter() - received
    reading = time.perf_counter()
    decode_metadata(data, name)
    reading = time.perf_counter() - reading
    boxes, scale = sum(len(tensor.boxes) for tensor in built.values()), RANKS / share
    note = "" if share == RANKS else f" ({share} of {RANKS} ranks, times {scale:.0f})"
    print(
        f"{name}{note}: {boxes * scale:,.0f} boxes; a rank {slowest:.2f} s, sends {len(sent[0]) / 1e3:.0f} kB; rank 0 "
        f"{first * scale:.1f} s; .metadata {len(data) * scale / 1e6:.1f} MB, read in {reading * scale:.1f} s"
    )


def time_exchange(shards: list[ParameterShard]) -> None:
    """What one rank computes of the coordinates, from stage 3 to the even layout."""
    ends = np.cumsum([prod(shard.shape) for shard in shards])
    first = dict(zip((shard.name for shard in shards), (0, *ends[:-1].tolist()), strict=True))
    share = -(-int(ends[-1]) // RANKS)
    begin = time.perf_counter()
    own = np.array([(first[r.shard.name] + r.start, r.num_elements) for r in held_stage3(shards, 7)], dtype=np.int64)
    sent = [cut(own, index * share, (index + 1) * share) for index in range(RANKS)]
    seconds, pieces = time.perf_counter() - begin, sum(map(len, sent))
    print(f"stage 3, exchange: a rank {seconds:.2f} s for {pieces:,} pieces that it sends")


def plan() -> None:
    """Print the times."""
    shards = [ParameterShard.whole(p.name, p.shape) for p in parameter_shapes(ModelConfig())]
    print(f"{sum(prod(s.shape) for s in shards) / 1e9:.1f}B parameters in {len(shards)} tensors, {RANKS} ranks, no EMA")
    time_plan("stages 1 and 2", held_flat, shards, RANKS)
    time_exchange(shards)
    time_plan("stage 3, layout even", held_flat, shards, RANKS)
    time_plan("stage 3, layout own", held_stage3, shards, 32)
    print("later saves: the same .metadata, nothing to plan")
