"""What a rank holds, counted over every tensor of its process, against ZeRO's formula (framework/plan/memory.py)."""

from pathlib import Path

import engine_ranks
import pytest
from pool import run_ranks
from tiny import write_recipe

from framework.parallel.zero.config import PrecisionConfig, ZeroConfig
from framework.plan.memory import state_bytes
from framework.recipe import load_recipe

# 558,368 parameters: padding and the buckets of 1,000 elements are below 0.4 %.
MODEL = [
    "model.attention_head_dim=48",
    "model.ffn_dim=384",
    "model.num_layers=3",
    "zero.persistence=0",
    "zero.bucket_size=1000",
    "data.micro_batch=1",
    "mesh.dp=auto",
]
CELLS = [("deepspeed", stage, dtype, "") for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")] + [
    ("fsdp2", stage, dtype, "") for stage in (2, 3) for dtype in ("float32", "bfloat16", "float64")
]
# A third is trained.
CELLS += [("deepspeed", stage, "bfloat16", "'*.ffn.*'") for stage in (1, 3)] + [("fsdp2", 3, "bfloat16", "'*.ffn.*'")]


@pytest.mark.parametrize(("engine", "stage", "dtype", "trainable"), CELLS, ids=str)
def test_a_rank_holds_what_the_formula_says(
    tmp_path: Path, tiny_shards: Path, engine: str, stage: int, dtype: str, trainable: str
) -> None:
    words = [*MODEL, f"zero.engine={engine}", f"zero.stage={stage}", f"precision.parameters={dtype}"]
    words += [f"train.trainable=[{trainable}]"]
    recipe_path = write_recipe(tmp_path, tiny_shards, words)
    recipe = load_recipe(recipe_path, [])
    for held in run_ranks(engine_ranks.held_bytes, 2, recipe_path, []):
        frozen = held.num_frozen
        said = state_bytes(held.num_parameters, 2, zero=recipe.zero, precision=recipe.precision, num_frozen=frozen)
        assert (frozen > 100_000) == bool(trainable)
        assert held.masters == pytest.approx(said.masters, rel=5e-3)
        assert held.moments == pytest.approx(said.moments, rel=5e-3)
        parameters = said.parameters + said.masters * (engine == "fsdp2")  # which are its master weights
        assert held.parameters == pytest.approx(parameters, rel=5e-3)
        assert held.total == pytest.approx(said.total, rel=5e-3)
        assert held.after <= held.total, "a step leaves nothing behind"


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_formula_gives_the_papers_numbers(stage: int, gigabytes: float) -> None:
    """ZeRO's figure 1: 7.5e9 parameters, 64 ranks; gradients in 2 bytes there, partitioned from stage 2 on."""
    zero, precision = ZeroConfig(stage=stage), PrecisionConfig("bfloat16")
    said = state_bytes(7_500_000_000, 64, zero=zero, precision=precision)
    gradients = 2 * 7.5e9 / (1 if stage == 1 else 64)
    assert (said.parameters + said.masters + said.moments + gradients) / 1e9 == pytest.approx(gigabytes, rel=5e-3)


def test_a_partition_is_what_shares() -> None:
    said = state_bytes(1000, 8, zero=ZeroConfig("fsdp2", partition=4), precision=PrecisionConfig("bfloat16"))
    assert (said.parameters, said.masters, said.moments, said.gradients) == (0, 1000, 2000, 1000)
