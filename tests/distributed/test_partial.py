"""Partial training in both engines against plain AdamW in one process: adapters, patterns, and both."""

import json
from pathlib import Path

import engine_ranks
import numpy as np
import partial_ranks
import pytest
import ranks
import torch
from plain import assert_same, plain_updates
from pool import run_ranks
from tiny import write_recipe

from framework.launch.check import check_start
from framework.programs.sample import SampleRequest, sample
from framework.recipe import load_recipe

STEPS = [
    "data.global_batch=8",
    "data.micro_batch=2",
    "mesh.dp=auto",
    "zero.persistence=0",
    "optimizer.lr=1e-2",
    "optimizer.eps=1e-4",
    "optimizer.clip=0.5",
    "optimizer.weight_decay=0.1",
]
LORA = ["lora.rank=3", "lora.alpha=6", "lora.targets=['*.attn?.to_q', '*.to_out.0', '*.ffn.net.*', proj_out]"]
KINDS = {
    "lora": LORA,
    "patterns": ["train.trainable=['blocks.1.*', '*norm*']"],
    "both": [*LORA, "train.trainable=['*.bias', scale_shift_table]"],
}
ENGINES = {
    "stage 1": ["zero.stage=1"],
    "stage 2": ["zero.stage=2"],
    "stage 3": ["zero.stage=3"],
    "fsdp2 2": ["zero.engine=fsdp2", "zero.stage=2"],
    "fsdp2 3": ["zero.engine=fsdp2", "zero.stage=3"],
    "hybrid": ["zero.engine=fsdp2", "zero.stage=3", "zero.partition=1"],
}
CELLS = [("lora", engine) for engine in ENGINES]
CELLS += [("patterns", "stage 1"), ("patterns", "stage 3"), ("patterns", "fsdp2 3"), ("both", "stage 2")]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("partial"), tiny_shards, STEPS)


@pytest.mark.parametrize(("kind", "engine"), CELLS)
def test_two_updates_are_plain_adamw(recipe_path: Path, kind: str, engine: str) -> None:
    """Gradients, norms, weights and moments; nothing else moves, and every element is owned once."""
    words = [*KINDS[kind], *ENGINES[engine]]
    expected = plain_updates(load_recipe(recipe_path, words), torch.float32)
    every = run_ranks(partial_ranks.partial, 2, recipe_path, words)
    got, trained = every[0].updates, expected.gradients[0].keys()
    assert_same(got, expected, 3e-5)
    assert got.gradients[0].keys() == trained < got.states["model"].keys()
    for rank in every:
        assert rank.frozen_kept and rank.averaged <= trained
    for name in got.states["model"].keys() - trained:
        np.testing.assert_array_equal(every[0].before[name], got.states["model"][name], err_msg=name)
        owned = sum(rank.frozen[name][2] for rank in every if name in rank.frozen)
        assert owned == got.states["model"][name].size, (name, "each element has one owner")
    owned = [sum(count for _, _, count in rank.frozen.values()) for rank in every]
    if engine != "hybrid":
        assert min(owned) > 0.4 * sum(owned), "the work of writing them is shared"


@pytest.mark.parametrize("engine", ["stage 1", "stage 2", "stage 3", "fsdp2 3"])
def test_frozen_weights_are_kept_in_what_computes(recipe_path: Path, engine: str) -> None:
    """bfloat16 with DeepSpeed, partitioned in stage 3 alone; fsdp2's table keeps float32, partitioned."""
    words = [*LORA, *ENGINES[engine], "precision.parameters=bfloat16"]
    every = run_ranks(partial_ranks.partial, 2, recipe_path, words)
    for rank in every:
        dtype = "float32" if engine == "fsdp2 3" else "bfloat16"
        assert rank.frozen_kept and {held for held, *_ in rank.frozen.values()} == {dtype}
        held = sum(count for _, count, _ in rank.frozen.values())
        total = sum(every[0].before[name].size for name in every[0].before if name in rank.frozen)
        assert held == total if engine in ("stage 1", "stage 2") else held < 0.6 * total
    assert every[0].updates.norms[0] > 0


@pytest.mark.parametrize(
    ("engine", "persistence"), [("stage 1", 0), ("stage 3", 0), ("stage 3", 1000), ("stage 3", 100_000), ("fsdp2 2", 0)]
)
def test_what_is_written_is_what_computes(recipe_path: Path, engine: str, persistence: int) -> None:
    """Frozen weights too, after a forward that gathered the old ones; stage 3 keeps small ones gathered."""
    words = [*LORA, *ENGINES[engine], f"zero.persistence={persistence}"]
    every = run_ranks(engine_ranks.written, 2, recipe_path, words)
    alone = run_ranks(engine_ranks.written, 1, recipe_path, [*LORA, "zero.engine=fsdp2"])[0]
    for name, values in every[0][0]["model"].items():
        np.testing.assert_array_equal(values, (ranks.moments("model", values.shape) * 0.1).numpy(), err_msg=name)
    for _, before, after in every:
        np.testing.assert_allclose(before, alone[1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after, alone[2], rtol=1e-4, atol=1e-4)
        assert not np.array_equal(before, after)


def test_an_adapter_has_its_linears_dtype(recipe_path: Path) -> None:
    """In a block of bfloat16, linears that compute in float32 and their adapters with them."""
    table = "precision.table=[{pattern: '*.to_out.*', compute: float32}, {pattern: 'proj_out.*', compute: float32}]"
    words = [*LORA, *ENGINES["fsdp2 3"], "precision.parameters=bfloat16", table]
    seen, update = run_ranks(engine_ranks.seen_dtypes, 2, recipe_path, words)[0]
    for name, dtype in seen.items():
        assert dtype == ("float32" if ".to_out." in name or name.startswith("proj_out") else "bfloat16"), name
    expected = plain_updates(load_recipe(recipe_path, LORA), torch.float32, 1)
    assert update.norms[0] == pytest.approx(expected.norms[0], rel=2e-2)
    for name, values in expected.gradients[0].items():
        assert np.abs(update.gradients[0][name] - values).max() < 0.1 * np.abs(values).max(), name


def test_an_adapter_with_a_row_of_its_own_is_refused(recipe_path: Path) -> None:
    table = "precision.table=[{pattern: '*.lora_?.*', compute: float32}]"
    words = [*LORA, *ENGINES["fsdp2 3"], "precision.parameters=bfloat16", table]
    with pytest.raises(ValueError, match=r"proj_out.weight .*, proj_out.lora_A.weight"):
        check_start(load_recipe(recipe_path, words), num_ranks=2, num_gpus=0)


def test_a_run_resumes_and_samples(tmp_path: Path, tiny_shards: Path) -> None:
    """The losses of one go, on another mesh and engine within rounding; then a video by the averaged weights."""
    words = [*KINDS["both"], "mesh.dp=2", "checkpoint.every=2", "train.steps=4", "ema.decay=0.9"]
    whole = write_recipe(tmp_path, tiny_shards, [*words, f"run={tmp_path / 'whole'}"], name="whole.yaml")
    broken = write_recipe(tmp_path, tiny_shards, [*words, f"run={tmp_path / 'broken'}"], name="broken.yaml")
    moved = write_recipe(tmp_path, tiny_shards, [*words, f"run={tmp_path / 'moved'}"], name="moved.yaml")
    run_ranks(ranks.train, 2, whole, [])
    for recipe, then in ((broken, []), (moved, ["mesh.dp=1", "mesh.tp=2", "zero.engine=fsdp2"])):
        run_ranks(ranks.train, 2, recipe, ["train.steps=2"])
        run_ranks(ranks.train, 2, recipe, ["train.steps=4", *then])

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    assert losses("broken") == losses("whole") and len(losses("whole")) == 4
    assert losses("moved") == pytest.approx(losses("whole"), rel=1e-5)
    request = SampleRequest("a rabbit", tmp_path / "out.mp4", 0, "ema", 2, None)
    assert "from step 4, ema weights" in sample(tmp_path / "broken", request)
