"""The recipes that come with cuboid: they load, their tokens and parameters are the published ones, they plausibly fit
their hardware, and their twins train.
"""

import json
import math
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import yaml
from pool import run_ranks

from framework.kernels.reference import ReferenceAttention
from framework.layers import StrictLoader, Tree, overlay
from framework.models.dit import DiT
from framework.parallel.config import resolve_mesh
from framework.plan.memory import state_bytes
from framework.plan.parameters import TensorParallel, elements_of, parameter_shapes
from framework.plan.scale_file import STAGED
from framework.recipe import Recipe, bucket_degrees, bucket_tokens, build_recipe, load_recipe, read_recipe_layers

FOLDER = Path(__file__).parents[2] / "recipes"
ALL = {str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.rglob("*.yaml"))}
BASES = [name for name in ALL if name.startswith(("models/", "data/"))]
WHOLE = [name for name in ALL if name not in BASES]
TWINS = [name for name in WHOLE if name.startswith("twins/") and name != "twins/cpu.yaml"]
CLUSTER = [name for name in WHOLE if f"twins/{name}" in ALL]
DATA = ["data.streams=[{path: x}]", "data.buckets=[{frames: 1, height: 64, width: 64}]"]


@cache
def load(name: str) -> Recipe:
    words = [*DATA, "data.buckets.0.frames=8"] if name.startswith("models/moviegen") else DATA
    if name.startswith("data/"):
        words = ["model.in_channels=48", "model.out_channels=48", "model.text_dim=256"]
    return load_recipe(ALL[name], words if name in BASES else [])


@pytest.mark.parametrize("name", ALL)
def test_they_load_and_their_headers_say_what_they_are_for(name: str) -> None:
    load(name)
    header = [line for line in ALL[name].read_text().splitlines() if line.startswith("#")]
    assert header and len(header[0]) > 20
    if name in WHOLE and name != "twins/cpu.yaml":
        words = ("Command", "Hardware", "Expected", "Time")
        assert [word for word in words if not any(line.startswith(f"# {word} ") for line in header)] == []
        assert f"cuboid train recipes/{name}" in "\n".join(header)


@pytest.mark.parametrize("name", CLUSTER)
def test_their_hardware_is_their_mesh(name: str) -> None:
    """Every recipe for a cluster says how many GPUs it is for, and has degrees for as many."""
    shape = resolve_mesh(load(name).mesh, num_ranks=None)
    assert f"# Hardware   {shape.world_size:,} H100 80 GB" in ALL[name].read_text()
    assert shape.replica <= 8, "a replica lies in one node"


def test_there_is_a_twin_of_every_recipe_for_a_cluster() -> None:
    others = {"overfit.yaml", "quickstart.yaml"}  # made for a CPU
    assert {f"twins/{name}" for name in WHOLE if "/" not in name} - {f"twins/{name}" for name in others} == set(TWINS)


@pytest.mark.parametrize(
    ("name", "index", "tokens"),
    [
        ("wan2.1-1.3b.yaml", 0, 32_760),
        ("wan2.1-14b.yaml", 0, 32_760),
        ("wan2.1-14b-720p.yaml", 0, 75_600),
        ("wan2.2-a14b-high.yaml", 0, 75_600),
        ("wan2.2-a14b-low.yaml", 0, 75_600),
        ("moviegen-30b.yaml", 0, 73_728),
        ("moviegen-5b.yaml", 0, 73_728),
        ("moviegen-1b.yaml", 0, 73_728),
        ("moviegen-1b.yaml", 1, 2_304),
        ("duration-curriculum.yaml", 0, 71_424),
    ],
)
def test_tokens_are_the_published_ones(name: str, index: int, tokens: int) -> None:
    assert bucket_tokens(load(name), index).num_tokens == tokens


def test_hunyuan_videos_tokens_are_the_published_ones() -> None:
    """720 x 1280 x 129 frames through 4x8x8 and patches of 1x2x2."""
    recipe = load_recipe(ALL["wan2.1-1.3b.yaml"], ["data.buckets=[{frames: 129, height: 720, width: 1280}]"])
    assert bucket_tokens(recipe, 0).num_tokens == 118_800


@pytest.mark.parametrize("name", ALL)
def test_parameters_by_formula_are_those_of_the_model(name: str) -> None:
    model = load(name).model
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in DiT(model, ReferenceAttention()).parameters())
    assert elements_of(parameter_shapes(model)) == counted
    if name.startswith("models/") and name != "models/wan-3m.yaml":
        assert f"{counted:,}" in ALL[name].read_text()


@pytest.mark.parametrize("name", CLUSTER)
def test_they_plausibly_fit_80_gigabytes(name: str) -> None:
    """Weights, gradients and moments, what recompute=keep_attention keeps of each block (its input, q, k, v and what
    came out, in bfloat16), and all of the block that is being computed again (34 bytes a channel and token).
    """
    recipe = load(name)
    shape, model = resolve_mesh(recipe.mesh, num_ranks=None), recipe.model
    psi = elements_of(parameter_shapes(model, TensorParallel(shape.tp)))
    held = state_bytes(psi, shape.dp * shape.cp, zero=recipe.zero, precision=recipe.precision).total
    held += 2 * psi if recipe.zero.stage == 2 else 3 * 2 * psi / model.num_layers  # gathered
    held += 4 * psi / recipe.zero.partition_size(shape.dp * shape.cp) if recipe.ema.decay else 0
    per_rank = max(
        recipe.data.micro_batch * bucket_tokens(recipe, i).num_tokens / math.prod(bucket_degrees(recipe, i)) / shape.tp
        for i in range(len(recipe.data.buckets))
    )
    assert recipe.execution.recompute == "keep_attention"
    assert held + per_rank * model.width * (10 * model.num_layers + 34) < 60e9, "a quarter is for what isn't counted"


def stages_of(name: str) -> list[Tree]:
    """A recipe's own stages; until recipes have them, from its last comment."""
    text = ALL[name].read_text()
    if "\n# stages:\n" in text:
        text = "\n".join(line[2:] for line in text[text.index("\n# stages:\n") :].splitlines())
    tree: dict[str, Any] = yaml.load(text, Loader=StrictLoader)
    stages: list[Tree] = tree.get("stages", [])
    return stages


def stage_of(whole: Tree, stage: Tree) -> Recipe:
    tree = deepcopy(whole)
    overlay(tree, {key: value for key, value in stage.items() if key not in ("name", "exit")}, top=True)
    return build_recipe(tree)


def test_every_stage_is_a_recipe() -> None:
    staged = {name: stages for name in WHOLE if (stages := stages_of(name))}
    found = {}
    for name, stages in staged.items():
        whole = read_recipe_layers(ALL[name])
        whole.pop("stages", None)
        found[name] = [stage_of(whole, stage) for stage in stages]
    assert set(found) == {
        f"{folder}{name}.yaml"
        for folder in ("", "twins/")
        for name in ("moviegen-1b", "moviegen-5b", "moviegen-30b", "duration-curriculum")
    }
    tokens = {name: [bucket_tokens(stage, 0).num_tokens for stage in stages] for name, stages in found.items()}
    assert tokens["moviegen-30b.yaml"] == [256, 8192, 8192, 73_728, 73_728]
    assert tokens["duration-curriculum.yaml"] == [256, 576, 576, 8640, 8640, 17_856, 71_424, 71_424]
    movie_gen = [(stage.data.global_batch, stage.mesh.tp, stage.mesh.ulysses) for stage in found["moviegen-30b.yaml"]]
    assert movie_gen == [(9216, 1, 1), (1536, 4, 1), (3072, 4, 1), (1536, 4, 2), (512, 4, 2)]
    for name, stages in found.items():
        assert all(stage.data.global_batch % resolve_mesh(stage.mesh, num_ranks=None).dp == 0 for stage in stages), name
        assert all(stage["exit"]["steps"] > 0 for stage in staged[name]), name


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_keeps_the_structure_of_its_recipe(name: str) -> None:
    twin, recipe = load(name), load(name.removeprefix("twins/"))
    for section in ("execution", "flow", "loss", "ema", "rope"):
        assert getattr(twin, section) == getattr(recipe, section)
    assert (twin.zero.engine, twin.zero.stage) == (recipe.zero.engine, recipe.zero.stage)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains(name: str, rabbit_latents: Path, tmp_path: Path) -> None:
    shape = resolve_mesh(load(name).mesh, num_ranks=None)
    words = [f"run={tmp_path}/run", f"data.streams=[{{path: {rabbit_latents}}}]", "train.steps=2", "validation.every=0"]
    words += ["stages=[]"] if STAGED else []
    run_ranks(ranks.train, shape.world_size, ALL[name], words)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0.1 < loss < 10 for loss in losses)
