"""A checkpoint of any mesh, stage, engine and dtype, loaded on any other: bit for bit what plain DCP reads."""

import json
from functools import cache
from pathlib import Path

import checkpoint_ranks
import numpy as np
import pytest
import ranks
from plain import newest_folder, plain_load
from pool import RanksFailed, run_ranks
from tiny import write_recipe

Cell = tuple[int, str]  # ranks, key=value words

TP2_DP2 = (4, "mesh.dp=2 mesh.tp=2 zero.stage=2")
ULYSSES2_RING2 = (4, "mesh.dp=1 mesh.ulysses=2 mesh.ring=2 zero.stage=3")
DP4 = (4, "mesh.dp=4 zero.stage=2")
DP3 = (3, "mesh.dp=3 zero.stage=1")
DP2_STAGE3 = (2, "mesh.dp=2 zero.stage=3 zero.persistence=0")
DP4_EVEN = (4, "mesh.dp=4 zero.stage=3 checkpoint.layout=even")
TP2_EVEN = (4, "mesh.dp=1 mesh.tp=2 mesh.ring=2 zero.engine=fsdp2 zero.stage=3 checkpoint.layout=even")
HYBRID = (4, "mesh.dp=4 zero.engine=fsdp2 zero.stage=3 zero.partition=2")
HYBRID_EVEN = (4, "mesh.dp=4 zero.engine=fsdp2 zero.stage=2 zero.partition=2 checkpoint.layout=even")
TP2_FSDP2 = (2, "mesh.dp=1 mesh.tp=2 zero.engine=fsdp2 zero.stage=2")
FSDP2_DP3 = (3, "mesh.dp=3 zero.engine=fsdp2 zero.stage=3")
BF16_STAGE1 = (2, "mesh.dp=1 mesh.ulysses=2 zero.stage=1 precision.parameters=bfloat16")
BF16_STAGE3 = (3, "mesh.dp=3 zero.stage=3 precision.parameters=bfloat16")
OFFLOAD = (2, "mesh.dp=2 zero.stage=2 zero.offload=optimizer")
ONE = (1, "mesh.dp=1 zero.stage=1")

PAIRS = [
    (TP2_DP2, (4, "mesh.dp=4 zero.stage=3")),
    (ULYSSES2_RING2, TP2_FSDP2),
    (DP4, DP3),
    (DP3, (4, "mesh.dp=1 mesh.tp=2 mesh.ring=2 zero.stage=3 zero.persistence=0")),
    (DP2_STAGE3, TP2_DP2),
    (DP4_EVEN, (4, "mesh.dp=2 mesh.tp=2 zero.stage=1")),
    (TP2_EVEN, DP3),
    (HYBRID, DP2_STAGE3),
    (HYBRID_EVEN, ONE),
    (TP2_FSDP2, HYBRID),
    (FSDP2_DP3, BF16_STAGE1),
    (BF16_STAGE1, FSDP2_DP3),
    (BF16_STAGE3, OFFLOAD),
    (OFFLOAD, BF16_STAGE3),
    (ONE, DP4),
]


def name(cell: Cell) -> str:
    return cell[1].replace("mesh.", "").replace("zero.", "").replace("checkpoint.", "").replace("precision.", "")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path):  # type: ignore[no-untyped-def]
    """Recipe of a run of two steps on a cell; each cell runs once."""

    @cache
    def run(cell: Cell) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        words = [*cell[1].split(), "train.steps=2", "checkpoint.every=2", "data.global_batch=6", "ema.decay=0.9"]
        recipe = write_recipe(folder, tiny_shards, words)
        run_ranks(ranks.train, cell[0], recipe, [])
        return recipe

    return run


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{name(pair[0])} -> {name(pair[1])}")
def test_any_to_any(saved, pair: tuple[Cell, Cell]) -> None:  # type: ignore[no-untyped-def]
    before, after = pair
    recipe = saved(before)
    expected = {key: tensor.numpy() for key, tensor in plain_load(newest_folder(recipe.parent / "run")).items()}
    reset = ["zero.persistence=100000", "zero.offload=none", "zero.partition=all", "zero.engine=deepspeed"]
    words = [*reset, "precision.parameters=float32", "mesh.tp=1", "mesh.ring=1", "mesh.ulysses=1", *after[1].split()]
    loaded, *_ = run_ranks(checkpoint_ranks.load, after[0], recipe, words)
    assert loaded.step == 2
    assert loaded.held.keys() == expected.keys()
    assert {key.split(".")[0] for key in expected} == {"model", "exp_avg", "exp_avg_sq", "ema"}
    different = [key for key, value in expected.items() if not np.array_equal(value, loaded.held[key])]
    assert different == []
    assert max(stats.amplification for stats in loaded.stats) <= 1.05
    # 4 states of 4 bytes, each read by whoever holds it: once, but for what tp ranks and replicas both hold.
    assert sum(stats.needed for stats in loaded.stats) >= sum(value.nbytes for value in expected.values())


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("before", "after"),
    [(TP2_DP2, DP3), (DP2_STAGE3, TP2_FSDP2), (HYBRID_EVEN, ULYSSES2_RING2)],
    ids=["tp2 dp2 -> dp3", "dp2 -> tp2 fsdp2", "fsdp2 dp4 -> ulysses2 ring2"],
)
def test_a_run_goes_on_on_another_mesh(tmp_path: Path, tiny_shards: Path, before: Cell, after: Cell) -> None:
    """The first loss to 1e-6, the next 20 to 1e-4 of the run that stayed where it was."""
    common = ["data.global_batch=6", "checkpoint.every=4", "optimizer.decay_steps=100"]
    whole = write_recipe(tmp_path, tiny_shards, [*common, f"run={tmp_path / 'whole'}", "train.steps=25"])
    run_ranks(ranks.train, before[0], whole, before[1].split())
    moved = write_recipe(tmp_path, tiny_shards, [*common, f"run={tmp_path / 'moved'}", "train.steps=4"], name="m.yaml")
    run_ranks(ranks.train, before[0], moved, before[1].split())
    reset = ["zero.engine=deepspeed", "zero.partition=all", "mesh.tp=1", "mesh.ring=1", "mesh.ulysses=1"]
    run_ranks(ranks.train, after[0], moved, [*reset, *after[1].split(), "train.steps=25"])
    ours, theirs = losses(tmp_path / "moved"), losses(tmp_path / "whole")
    assert len(ours) == 25 and ours[:4] == theirs[:4]
    assert abs(ours[4] / theirs[4] - 1) < 1e-6
    np.testing.assert_allclose(ours[5:], theirs[5:], rtol=1e-4)


def test_another_model_is_refused_on_every_rank(tmp_path: Path, tiny_shards: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=1", "train.steps=1"])
    run_ranks(ranks.train, 1, recipe, [])
    with pytest.raises(RanksFailed, match=r"model\.\S+ has the shape \(\d+.*\) in .*step-00000001-0000, \(\d+.*in the"):
        run_ranks(checkpoint_ranks.load, 2, recipe, ["mesh.dp=2", "model.ffn_dim=48"])
