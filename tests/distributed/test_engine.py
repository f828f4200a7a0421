"""Our fragments against DeepSpeed's own view of its state: they rest on its private attributes."""

from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from pool import run_ranks
from tiny import write_recipe

from framework.keys import key
from framework.models.initialise import init_tensor
from framework.recipe import load_recipe

CELLS = [
    (dp, stage, precision)
    for dp, stage in ((1, 2), (2, 1), (2, 2), (2, 3), (3, 3), (4, 1), (4, 2), (4, 3))
    for precision in (("float32", "bfloat16") if dp == 2 else ("float32",))
]


@pytest.mark.parametrize(("dp", "stage", "precision"), CELLS, ids=str)
def test_fragments_are_deepspeeds_state(tmp_path: Path, tiny_shards: Path, dp: int, stage: int, precision: str) -> None:
    """Initial weights from each tensor's key, the same on every mesh; moments land where DeepSpeed finds them."""
    words = [f"zero.stage={stage}", f"precision.parameters={precision}", "mesh.dp=auto"]
    recipe_path = write_recipe(tmp_path, tiny_shards, words)
    states = run_ranks(ranks.engine_state, dp, recipe_path, [])
    recipe, first = load_recipe(recipe_path, []), states[0]
    for name, values in first.full["model"].items():
        generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=name))
        expected = init_tensor(name, values.shape, generator, recipe.model)
        np.testing.assert_array_equal(values, expected.numpy(), err_msg=name)
        low = expected.to(getattr(torch, precision)).float().numpy()
        np.testing.assert_array_equal(first.low[name], low, err_msg=name)
        for state in first.full.keys() - {"model"}:
            np.testing.assert_array_equal(first.full[state][name], ranks.moments(state, values.shape).numpy())

    for state in ("model", "exp_avg", "exp_avg_sq"):
        for name, values in first.full["model"].items():
            pieces = sorted(rank.ranges[f"{state}.{name}"] for rank in states if f"{state}.{name}" in rank.ranges)
            ends = [0, *(start + count for start, count in pieces)]
            assert [start for start, _ in pieces] == ends[:-1], "each element is held once"
            assert ends[-1] == values.size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_update_that_is_no_number_is_skipped(tmp_path: Path, tiny_shards: Path, stage: int, precision: str) -> None:
    words = [f"zero.stage={stage}", f"precision.parameters={precision}", "mesh.dp=2"]
    recipe_path = write_recipe(tmp_path, tiny_shards, words)
    assert run_ranks(ranks.bad_step, 2, recipe_path, []) == [(True, True, True, True)] * 2
