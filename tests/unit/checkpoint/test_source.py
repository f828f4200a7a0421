"""Weights to begin with: every fragment of every rank against diffusers' own tensors, and what is told of them."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import pytest
import torch
from stores import save_steps
from wan_cases import CASES, randomise

from framework.checkpoint.find import open_checkpoint
from framework.checkpoint.manifest import Manifest
from framework.checkpoint.read import CheckpointReader
from framework.checkpoint.source import CheckpointSource, check_config, fill
from framework.models.config import ModelConfig
from framework.models.weights import DiffusersSource
from framework.parallel.fragments import Fragment, ParameterShard
from framework.plan.parameters import TensorParallel, parameter_shapes

CONFIG = CASES["medium"].config
TP, ZERO = 2, 3


def shards_of(index: int) -> list[ParameterShard]:
    """What a tp rank holds: where its part differs from the whole, the parts of the ranks before come first."""
    ranks = [parameter_shapes(CONFIG, TensorParallel(TP, i)) for i in range(TP)]
    shards = []
    for whole, *parts in zip(parameter_shapes(CONFIG), *ranks, strict=True):
        part = parts[index].shape
        before = [[parts[i].shape[dim] for i in range(index)] for dim in range(len(part))]
        offset = [sum(before[dim]) if size != part[dim] else 0 for dim, size in enumerate(whole.shape)]
        shards.append(ParameterShard(whole.name, whole.shape, tuple(offset), part))
    return shards


def fragments_of(shards: list[ParameterShard], index: int) -> Iterator[Fragment]:
    """A rank's third of all that a tp rank holds, laid end to end: some tensors whole, some not at all."""
    total, position = sum(prod(shard.shape) for shard in shards), 0
    low, high = total * index // ZERO, total * (index + 1) // ZERO
    for shard in shards:
        size = prod(shard.shape)
        start, stop = max(low - position, 0), min(high - position, size)
        if start < stop:
            yield Fragment("model", shard, start, torch.full((stop - start,), torch.nan))
        position += size


@pytest.mark.parametrize("max_shard_size", ["10GB", "2MB"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_rank_gets_its_own_and_reads_no_more(stored: torch.dtype, max_shard_size: str, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**asdict(CONFIG))
    randomise(model, torch.Generator().manual_seed(1))
    model.to(stored).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (max_shard_size == "2MB")
    expected = model.state_dict()
    names = {parameter.name: parameter.shape for parameter in parameter_shapes(CONFIG)}
    for tp in range(TP):
        shards, seen = shards_of(tp), 0
        for zero in range(ZERO):
            source = DiffusersSource(str(tmp_path))
            fragments = list(fragments_of(shards, zero))
            report = fill(fragments, source, names)
            for fragment in fragments:
                shard = fragment.shard
                box = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.shape, strict=True))
                part = expected[shard.name][box].reshape(-1)[fragment.start :][: fragment.flat.numel()]
                assert torch.equal(fragment.flat, part.float()), shard.name
            held = sum(fragment.flat.numel() for fragment in fragments)
            assert source.bytes_read == held * stored.itemsize
            assert not report.missing and not report.unused and report.matched.keys() == expected.keys()
            seen += held
        assert seen == sum(prod(shard.shape) for shard in shards)


def source_with(folder: Path, states: set[str], weights: str, config: dict[str, object]) -> CheckpointSource:
    """Of a checkpoint with some of its states only."""
    save_steps(folder, [1])
    storage, found = open_checkpoint(str(folder))
    manifest: Manifest = replace(found.manifest, config=config)
    reader = CheckpointReader(storage, replace(found, manifest=manifest))
    reader.tensors = {key: tensor for key, tensor in reader.tensors.items() if key.partition(".")[0] in states}
    return CheckpointSource(reader, "ema" if weights == "ema" else "raw")


def test_an_average_that_is_not_there_is_told(tmp_path: Path) -> None:
    for number, (states, weights, average, told) in enumerate(
        [
            ({"model", "exp_avg", "ema"}, "ema", True, 0),
            ({"model", "exp_avg", "ema"}, "raw", False, 0),
            ({"model", "exp_avg"}, "ema", False, 1),
            ({"model"}, "ema", False, 0),  # imported: nothing of it was trained here
        ]
    ):
        source = source_with(tmp_path / str(number), states, weights, {})
        assert (source.average, len(source.notes)) == (average, told)
        assert all("holds no average" in note for note in source.notes)


def test_heads_that_only_the_configuration_tells_apart(tmp_path: Path) -> None:
    """40 heads of 128 and 80 of 64 have the same weights' shapes, and different attention."""
    theirs, ours = ModelConfig(num_attention_heads=80, attention_head_dim=64), ModelConfig()
    source = source_with(tmp_path / "a", {"model"}, "raw", {"model": asdict(theirs)})
    check_config(source, replace(theirs, num_layers=2))
    with pytest.raises(ValueError, match=r"set model\.num_attention_heads=80 model\.attention_head_dim=64"):
        check_config(source, ours)
    check_config(source_with(tmp_path / "b", {"model"}, "raw", {}), ours)
