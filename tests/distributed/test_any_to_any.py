"""A checkpoint of any mesh, stage, engine and dtype, loaded on any other: bit for bit what plain DCP reads."""

import json
from functools import cache
from pathlib import Path

import checkpoint_ranks
import numpy as np
import pytest
import ranks
from plain_dcp import newest_folder, plain_load
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

# With the head trained too: its initial zeros would keep every gradient from the adapters.
LORA = "lora.rank=2 train.trainable=[proj_out.*]"
LORA_TP2 = (2, f"mesh.dp=1 mesh.tp=2 zero.stage=2 {LORA}")
LORA_FSDP2 = (3, f"mesh.dp=3 zero.engine=fsdp2 zero.stage=3 {LORA}")
LORA_STAGE3 = (4, f"mesh.dp=2 mesh.tp=2 zero.stage=3 precision.parameters=bfloat16 {LORA}")

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
    (LORA_TP2, LORA_FSDP2),
    (LORA_FSDP2, LORA_TP2),
    (LORA_STAGE3, LORA_FSDP2),
]


def name(cell: Cell) -> str:
    return (
        cell[1]
        .replace("train.trainable=[proj_out.*]", "")
        .replace("mesh.", "")
        .replace("zero.", "")
        .replace("checkpoint.", "")
        .replace("precision.", "")
    )


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
    stored = plain_load(newest_folder(recipe.parent / "run"))
    expected = {key: tensor.float().numpy() for key, tensor in stored.items()}
    reset = ["zero.persistence=100000", "zero.offload=none", "zero.partition=all", "zero.engine=deepspeed"]
    words = [*reset, "precision.parameters=float32", "mesh.tp=1", "mesh.ring=1", "mesh.ulysses=1", *after[1].split()]
    loaded, *_ = run_ranks(checkpoint_ranks.load, after[0], recipe, words)
    assert loaded.step == 2
    assert loaded.held.keys() == expected.keys()
    assert {key.split(".")[0] for key in expected} == {"model", "exp_avg", "exp_avg_sq", "ema"}
    different = [key for key, value in expected.items() if not np.array_equal(value, loaded.held[key])]
    assert different == []
    assert max(stats.amplification for stats in loaded.stats) <= 1.05
    # Everything is read by whoever holds it: once, but for what tp ranks and replicas both hold.
    assert sum(stats.needed for stats in loaded.stats) >= sum(tensor.nbytes for tensor in stored.values())


def test_frozen_weights_are_stored_once(tmp_path: Path, tiny_shards: Path) -> None:
    """Two saves, a resume on another mesh and two more: the same files, named by every manifest; they stay as long."""
    words = ["train.steps=2", "checkpoint.every=1", "checkpoint.keep=2", *LORA_TP2[1].split()]
    recipe = write_recipe(tmp_path, tiny_shards, words)
    store = tmp_path / "run/checkpoints"
    run_ranks(ranks.train, 2, recipe, [])
    first = {path.name: path.stat().st_mtime_ns for path in (store / "frozen").iterdir()}
    before = plain_load(newest_folder(tmp_path / "run"))
    moved = ["train.steps=4", "mesh.tp=1", "mesh.dp=3", "zero.engine=fsdp2"]
    run_ranks(ranks.train, 3, recipe, moved)
    assert len(first) == 2 and {p.name: p.stat().st_mtime_ns for p in (store / "frozen").iterdir()} == first
    after = plain_load(newest_folder(tmp_path / "run"))
    frozen = {key for key in before if key.startswith("model.") and "lora" not in key and "proj_out" not in key}
    assert len(frozen) > 50 and all(np.array_equal(before[key], after[key]) for key in frozen)
    trained = [key for key in before if key not in frozen]
    assert {key.split(".")[0] for key in trained} == {"model", "exp_avg", "exp_avg_sq", "ema"}
    assert all("lora" in key or "proj_out" in key for key in trained)
    same = [key for key in trained if np.array_equal(before[key], after[key])]
    assert len(same) < len(trained) / 4, "all but what has no gradient yet"
    folder = newest_folder(tmp_path / "run")
    own = sum(path.stat().st_size for path in folder.glob("model-*.distcp"))
    assert own < 0.6 * sum((store / "frozen" / name).stat().st_size for name in first)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name for name in manifest["files"] if name.startswith("../")} == {f"../frozen/{name}" for name in first}


def test_weights_that_are_frozen_later_are_stored_then(tmp_path: Path, tiny_shards: Path) -> None:
    """A run of everything goes on with less: its checkpoints stay whole, and it resumes from them."""
    recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=2", "train.steps=1", "checkpoint.every=1"])
    run_ranks(ranks.train, 2, recipe, [])
    whole = plain_load(newest_folder(tmp_path / "run"))
    less = ["train.trainable=[proj_out.*]", "resume.allow=[train.trainable]"]
    run_ranks(ranks.train, 2, recipe, [*less, "train.steps=2"])
    run_ranks(ranks.train, 2, recipe, ["train.steps=3"])
    after = plain_load(newest_folder(tmp_path / "run"))
    assert {key for key in whole if key.startswith("model.")} == {key for key in after if key.startswith("model.")}
    assert {key for key in after if key.startswith("exp_avg.")} == {"exp_avg.proj_out.weight", "exp_avg.proj_out.bias"}
    assert all(np.array_equal(after[k], whole[k]) for k in after if k.startswith("model.") and "proj_out" not in k)


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
