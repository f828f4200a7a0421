"""What a checkpoint holds besides the numbers, and which cuts make how many boxes: counted, nothing is written."""

from math import prod

import pytest
import torch

from framework.checkpoint.manifest import Manifest, Origin, Progress, StoredFile, encode_manifest
from framework.checkpoint.records import StoredTensor, encode_metadata
from framework.checkpoint.write import FileLayout, Range, lay_out
from framework.models.config import ModelConfig
from framework.parallel.fragments import ParameterShard
from framework.plan.parameters import parameter_shapes

CONFIG = ModelConfig(num_layers=10, num_attention_heads=8, ffn_dim=4096)  # 1,024 wide
STATES = ("model", "exp_avg", "exp_avg_sq", "ema")


def held(shards: list[ParameterShard], rank: int, num_ranks: int, stage: int) -> list[Range]:
    """By the rules of ZeRO: in stage 3 a part of each parameter, else a part of all of them one behind the other."""
    found, base = [], 0
    total = sum(prod(shard.shape) for shard in shards)
    for shard in shards:
        size = prod(shard.shape)
        part, first = (-(-size // num_ranks), 0) if stage == 3 else (-(-total // num_ranks), base)
        low, high = max(rank * part - first, 0), min((rank + 1) * part - first, size)
        if high > low:
            found.append(Range(shard, low, high - low))
        base += size
    return found


@pytest.mark.parametrize(("num_ranks", "stage"), [(1, 1), (8, 2), (4, 3), (8, 3)])
@pytest.mark.parametrize("num_states", [3, 4])
def test_bytes_besides_the_payload(num_ranks: int, stage: int, num_states: int) -> None:
    shards = [ParameterShard.whole(p.name, p.shape) for p in parameter_shapes(CONFIG)]
    size = sum(prod(shard.shape) for shard in shards)
    assert size > 100_000_000
    layouts: list[FileLayout] = []
    for rank in range(num_ranks):
        ranges = held(shards, rank, num_ranks, stage)
        names = ((state, f"{state}-{rank:05}.distcp") for state in STATES[:num_states])
        layouts += [lay_out(name, state, ranges, torch.float32) for state, name in names]
    payload = sum(4 * keyed.box.num_elements for layout in layouts for keyed in layout.boxes)
    assert payload == 4 * num_states * size
    tensors: dict[str, list] = {}  # type: ignore[type-arg]
    for layout in layouts:
        for keyed in layout.boxes:
            tensors.setdefault(keyed.key, []).append(keyed)
    metadata = encode_metadata(
        {k: StoredTensor(v[0].shape, torch.float32, tuple(keyed.box for keyed in v)) for k, v in tensors.items()}
    )
    files = {
        layout.name: StoredFile(layout.num_bytes, ("0" * 16,) * -(-layout.num_bytes // (4 << 20))) for layout in layouts
    }
    manifest = encode_manifest(Manifest(Progress(), Origin(), files))
    rest = sum(layout.num_bytes for layout in layouts) - payload + len(metadata) + len(manifest)
    assert rest / payload < 0.01
