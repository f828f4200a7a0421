"""The recipes that come with cuboid: they load, their tokens and parameters are the published ones, they fit
their hardware, and their twins train.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import ranks
import torch
from pool import run_ranks

from framework.forecast.forecast import forecast
from framework.kernels.reference import ReferenceAttention
from framework.models.dit import DiT
from framework.parallel.config import resolve_mesh
from framework.plan.hardware import load_hardware
from framework.plan.parameters import elements_of, parameter_shapes
from framework.recipe import Recipe, bucket_tokens, load_recipe
from framework.stages.recipes import stage_recipe, stages_of

pytestmark = pytest.mark.alone  # ranks

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


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "twins/cpu.yaml"])
def test_every_stage_is_planned_for_its_hardware_and_fits(name: str) -> None:
    recipe = load(name)
    described = "H100 80 GB" if name in CLUSTER else "CPU core"
    assert described in ALL[name].read_text() and recipe.hardware.name == {"H100 80 GB": "h100"}.get(described, "cpu")
    hardware = load_hardware(recipe.hardware.name)
    for part in parts_of(recipe):
        shape = resolve_mesh(part.mesh, num_ranks=None)
        found = forecast(part, shape, hardware)
        assert found.memory.fits, f"{shape}: {found.memory.refusal()}"
        assert 0 < found.time.total < 120 and found.time.model_flops > 0


def parts_of(recipe: Recipe) -> list[Recipe]:
    """The recipe of each stage; of a recipe without stages itself."""
    return [stage_recipe(recipe, stage.index) for stage in stages_of(recipe)] or [recipe]


def test_the_stages_are_the_published_ones() -> None:
    found = {name: parts_of(load(name)) for name in WHOLE if name != "twins/cpu.yaml" and load(name).stages}
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


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_keeps_the_structure_of_its_recipe(name: str) -> None:
    twin, recipe = load(name), load(name.removeprefix("twins/"))
    for section in ("execution", "flow", "loss", "ema", "rope"):
        assert getattr(twin, section) == getattr(recipe, section)
    assert (twin.zero.engine, twin.zero.stage) == (recipe.zero.engine, recipe.zero.stage)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains_through_every_stage(name: str, rabbit_latents: Path, tmp_path: Path) -> None:
    recipe = load(name)
    count = len(recipe.stages)
    words = [f"run={tmp_path}/run", f"data.streams=[{{path: {rabbit_latents}}}]", "validation.every=0"]
    words += [f"stages.{index}.exit.steps=1" for index in range(count)] or ["train.steps=2"]
    for index, part in enumerate(parts_of(recipe)):
        ranks_of_it = resolve_mesh(part.mesh, num_ranks=None).world_size
        run_ranks(ranks.train, ranks_of_it, ALL[name], words, None, index if count else None)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == (count or 2) and all(0.1 < loss < 10 for loss in losses)
