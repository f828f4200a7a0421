"""What a plan says of a recipe, against numbers worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from framework.cli import app
from framework.forecast.forecast import forecast
from framework.forecast.search import search
from framework.forecast.text import forecast_lines, layout_lines, memory_json, to_json
from framework.launch.check import check_memory
from framework.parallel.config import MeshShape, resolve_mesh
from framework.plan.hardware import gpu_of, load_hardware
from framework.recipe import Recipe, load_recipe
from framework.shapes import Strides
from framework.stages.recipes import stage_recipe
from framework.tokenizer import config as tokenizer_config
from framework.tokenizer.config import TokenizerConfig, WanConfig, WanVae

RECIPES = Path(__file__).parents[3] / "recipes"
H100 = load_hardware("h100")


@pytest.fixture(scope="module")
def wan() -> Recipe:
    return load_recipe(RECIPES / "wan2.1-14b.yaml", [])


def test_tokens_flops_and_sizes_are_those_worked_out_by_hand(wan: Recipe) -> None:
    """21 x 30 x 52 tokens. FLOPs: 3 x (40 blocks x (2 S D (6 D + 2 F) + 4 L D^2 + 4 S D (S + L)) + what is around)."""
    found = forecast(wan, resolve_mesh(wan.mesh, num_ranks=None), H100)
    (bucket,) = found.buckets
    tokens, width, ffn, text = 21 * 30 * 52, 5120, 13824, 512
    assert (bucket.tokens, bucket.samples, bucket.micro_batches) == (tokens, 64, (1, 1, 1, 1))
    linears = 2 * tokens * width * (6 * width + 2 * ffn) + 4 * text * width**2
    attention = 4 * tokens * width * (tokens + text)
    around = 2 * tokens * width * 128 + 2 * text * width * (4096 + width) + 2 * width * (256 + 7 * width)
    assert bucket.petaflops == pytest.approx(3 * (40 * (linears + attention) + around) / 1e15, rel=1e-12)
    assert bucket.attention == pytest.approx(3 * 40 * attention / (bucket.petaflops * 1e15), rel=1e-12)
    assert bucket.tokens_a_rank == tokens / 8
    assert found.parameters == found.trained == 14_288_491_584
    assert found.checkpoint == 16 * found.parameters
    assert found.samples == 64 * wan.train.steps and found.tokens == found.samples * tokens
    assert found.latents == found.samples * 2 * 16 * 21 * 60 * 104
    assert found.hours == pytest.approx(found.time.total * wan.train.steps / 3600)
    assert found.gpu_hours == pytest.approx(128 * found.hours)


def test_memory_is_states_and_what_is_listed(wan: Recipe) -> None:
    """fsdp2, stage 3, 64 ranks of half the model each: 4, 8 and 4 bytes of a 64th, and the average's 4."""
    memory = forecast(wan, resolve_mesh(wan.mesh, num_ranks=None), H100).memory
    parts, part = memory.parts(), 14_288_491_584 / 2 / 64
    # Beside it the first rank has modulation tables whole, as their one row isn't shared: 40 blocks of 6 x 5120 and one
    # of 2. What tp leaves whole (embeddings, head, norms, biases of rows) is 1.2 % more.
    tables = 4 * (40 * 6 + 2) * 5120 * (1 - 1 / 64)
    assert parts["masters"] == pytest.approx(4 * part + tables, rel=0.02)
    assert parts["moments"] == 2 * parts["masters"] == 2 * parts["ema"]
    assert memory.total == pytest.approx(sum(parts.values())) and memory.fits
    assert parts["communicators"] == 6 * H100.device.communicator


def test_a_step_of_several_buckets_is_their_mean() -> None:
    recipe = load_recipe(RECIPES / "moviegen-1b.yaml", ["stages=[]"])
    shape = resolve_mesh(recipe.mesh, num_ranks=None)
    found = forecast(recipe, shape, H100)
    video, image = found.buckets
    assert (video.tokens, image.tokens) == (73_728, 2_304)
    # Shares of the samples 10 : 1, so of the draws (10 / n) : (1 / m) for draws of n and m samples.
    draws = 10 / video.samples, 1 / image.samples
    mean = (draws[0] * video.seconds + draws[1] * image.seconds) / sum(draws)
    assert found.time.total == pytest.approx(mean)


def test_the_plain_data_are_complete(wan: Recipe) -> None:
    plain = json.loads(json.dumps(to_json([forecast(wan, resolve_mesh(wan.mesh, num_ranks=None), H100)])))
    (stage,) = plain["stages"]
    assert stage["memory"]["fits"] and stage["mesh"] == {"dp": 16, "ring": 1, "ulysses": 4, "tp": 2}
    parts = [value for name, value in stage["time"].items() if name not in ("total", "mfu", "model_flops")]
    assert stage["time"]["total"] == pytest.approx(sum(parts))


def test_a_search_finds_what_fits_the_fastest_first(wan: Recipe) -> None:
    layouts = search(wan, H100, gpus=128)
    times = [layout.time.total for layout in layouts]
    assert times == sorted(times) and all(layout.memory.fits for layout in layouts)
    assert all(layout.shape.world_size == 128 for layout in layouts)
    assert all(layout.shape.ulysses * layout.shape.tp <= 8 for layout in layouts), "inside the link domain"
    for layout in (layouts[0], layouts[len(layouts) // 2], layouts[-1]):
        again = load_recipe(RECIPES / "wan2.1-14b.yaml", layout.words)
        found = forecast(again, resolve_mesh(again.mesh, num_ranks=128), H100)
        assert found.time.total == pytest.approx(layout.time.total)
        assert found.memory.total == pytest.approx(layout.memory.total)
    mine = forecast(wan, MeshShape(16, 1, 4, 2), H100)
    assert times[0] <= mine.time.total, "the recipe's own layout is one of them"


def test_a_search_tries_the_recipes_own_micro_batch() -> None:
    recipe = load_recipe(RECIPES / "wan2.1-1.3b.yaml", ["data.micro_batch=3", "mesh.dp=16"])
    assert {layout.recipe.data.micro_batch for layout in search(recipe, H100, gpus=16)} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "words",
    [
        ["zero.partition=8", "mesh.dp=64"],
        ["execution.recompute_blocks=10", "mesh.dp=64"],
        ["execution.offload=true", "mesh.dp=64"],
        ["zero.engine=deepspeed", "zero.offload=optimizer", "mesh.dp=64"],
        ["data.buckets.0.ring=2", "mesh.dp=64"],
    ],
    ids=lambda words: words[0],
)
def test_the_words_of_a_layout_are_the_layout_whatever_they_are_laid_over(words: list[str]) -> None:
    layouts = search(load_recipe(RECIPES / "wan2.1-1.3b.yaml", words), H100, gpus=16)
    for layout in (layouts[0], layouts[len(layouts) // 2], layouts[-1]):
        again = load_recipe(RECIPES / "wan2.1-1.3b.yaml", [*words, *layout.words])
        found = forecast(again, resolve_mesh(again.mesh, num_ranks=16), H100)
        assert found.memory.total == pytest.approx(layout.memory.total)
        assert found.time.total == pytest.approx(layout.time.total)


def test_what_layouts_of_a_search_share_is_what_each_has_alone() -> None:
    """Two buckets, each with degrees of its own, some of the layouts with activations or the optimizer on the host."""
    recipe = load_recipe(RECIPES / "moviegen-5b.yaml", ["stages=[]"])
    layouts = search(recipe, replace(H100, device=replace(H100.device, memory=45e9)), gpus=64)
    assert {layout.recipe.execution.recompute for layout in layouts} >= {"keep_attention", "all"}
    assert {layout.recipe.execution.offload for layout in layouts} == {False, True}
    for layout in layouts[::101]:
        found = forecast(layout.recipe, layout.shape, H100)
        assert found.memory.parts() == layout.memory.parts()
        assert found.time == layout.time


def test_a_search_reads_the_files_of_a_tokenizer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its strides and its channels, and not for each layout."""
    asked = []

    def read(asking: WanConfig) -> WanVae:
        asked.append(asking)
        return WanVae(Path(), Strides(4, 8, 8, causal=True), (0.0,) * 16, (1.0,) * 16)

    monkeypatch.setattr(tokenizer_config, "read_wan", read)
    stored = load_recipe(RECIPES / "wan2.1-1.3b.yaml", [])
    recipe = replace(stored, tokenizer=TokenizerConfig(name="wan", wan=WanConfig("somewhere")))
    layouts = search(recipe, H100, gpus=16)
    assert len(asked) == 2
    assert [layout.time for layout in layouts] == [layout.time for layout in search(stored, H100, gpus=16)]
    assert all(layout.recipe.tokenizer == recipe.tokenizer for layout in layouts), "the recipe's own"


def test_what_fits_by_less_than_the_count_may_be_wrong_by_is_called_tight(wan: Recipe) -> None:
    shape = resolve_mesh(wan.mesh, num_ranks=None)
    need = forecast(wan, shape, H100).memory.total
    said = []
    for share in (0.94, 0.96, 1.04):
        device = replace(H100.device, memory=need / share)
        found = forecast(wan, shape, replace(H100, device=device))
        plain = memory_json(found.memory)
        assert plain["used"] == pytest.approx(share)
        line = next(line for line in forecast_lines(found) if " GB (" in line)
        assert f"({share:.0%})" in line
        said.append((plain["fits"], plain["tight"], line.partition("): ")[2]))
    assert said == [(True, False, "fits"), (True, True, "fits, tight"), (False, False, "does NOT fit")]


def test_a_tight_layout_is_marked_where_it_ranks(wan: Recipe) -> None:
    layouts = search(wan, H100, gpus=128)
    some = [next(layout for layout in layouts if layout.memory.tight is tight) for tight in (True, False)]
    lines = layout_lines(some)
    assert "% tight" in lines[2] and "tight" not in lines[3] and lines[4].startswith("tight: above 95%")
    assert not any("tight" in line for line in layout_lines(some[1:]))


@pytest.mark.parametrize("words", [[], ["--search"]])
def test_a_mesh_of_as_many_as_there_are_says_for_how_many_it_was_planned(words: list[str]) -> None:
    recipe = [str(RECIPES / "wan2.1-1.3b.yaml"), "mesh.dp=auto", "mesh.ulysses=2", "--gpu", "h100", *words]
    found = CliRunner().invoke(app, ["plan", *recipe])
    assert found.output.startswith("mesh.dp is auto and --gpus isn't given: planned for 2 GPUs, the least"), found
    assert "mesh.dp is auto" not in CliRunner().invoke(app, ["plan", *recipe, "--gpus", "4"]).output


def test_empty_slots_are_no_work(wan: Recipe) -> None:
    """64 samples for 128 replicas: half of them compute nothing that counts."""
    recipe = load_recipe(RECIPES / "wan2.1-1.3b.yaml", ["mesh.dp=128"])
    full = load_recipe(RECIPES / "wan2.1-1.3b.yaml", ["mesh.dp=64"])
    found, most = (forecast(each, resolve_mesh(each.mesh, num_ranks=None), H100) for each in (recipe, full))
    assert (found.buckets[0].empty, most.buckets[0].empty) == (0.5, 0.0)
    assert found.time.model_flops == most.time.model_flops
    assert found.time.mfu == pytest.approx(most.time.mfu / 2, rel=0.02)


def test_a_checkpoint_of_adapters_has_no_frozen_weight(wan: Recipe) -> None:
    recipe = load_recipe(RECIPES / "wan2.1-14b.yaml", ["lora.rank=8"])
    found = forecast(recipe, resolve_mesh(recipe.mesh, num_ranks=None), H100)
    assert found.checkpoint == 16 * found.trained and found.trained == 40 * 8 * 8 * (5120 + 5120)


def test_layouts_of_a_stage_are_words_of_the_stage() -> None:
    found = CliRunner().invoke(app, ["plan", str(RECIPES / "moviegen-1b.yaml"), "--search", "--json"])
    plain = json.loads(found.output)
    assert [stage["stage"] for stage in plain["stages"]][:2] == ["images-256px", "joint-256px"]
    words = [word for index in (0, 1) for word in plain["stages"][index]["layouts"][0]["words"]]
    recipe = load_recipe(RECIPES / "moviegen-1b.yaml", words)
    for index in (0, 1):
        part = stage_recipe(recipe, index)
        plan = forecast(part, resolve_mesh(part.mesh, num_ranks=None), H100)
        assert plan.time.total == pytest.approx(plain["stages"][index]["layouts"][0]["time"]["total"])


def test_a_plan_that_does_not_fit_is_json_too() -> None:
    words = [str(RECIPES / "wan2.1-14b.yaml"), "mesh.dp=1", "mesh.tp=1", "zero.stage=2", "--json"]
    found = CliRunner().invoke(app, ["plan", *words])
    assert isinstance(found.exception, ValueError)
    assert not json.loads(found.output)["stages"][0]["memory"]["fits"]


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GH200 480GB", ""),
        ("NVIDIA GeForce RTX 4090", ""),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, described: str) -> None:
    assert gpu_of(name) == described


def test_a_start_on_a_smaller_gpu_is_refused(wan: Recipe) -> None:
    """An A100 of 40 GB is called like one of 80: what it has counts."""
    recipe = load_recipe(RECIPES / "wan2.1-14b-720p.yaml", ["execution.recompute=none"])
    shape = resolve_mesh(wan.mesh, num_ranks=None)
    check_memory(wan, shape, "NVIDIA A100-SXM4-40GB", num_bytes=42e9)
    with pytest.raises(ValueError, match=r"the device has 42\.0"):
        check_memory(recipe, shape, "NVIDIA A100-SXM4-40GB", num_bytes=42e9)


def test_a_search_on_a_device_that_is_too_small_says_what_is_the_least(wan: Recipe) -> None:
    small = replace(H100, device=replace(H100.device, memory=4e9))
    with pytest.raises(ValueError, match=r"no layout of this recipe on 16 GPUs fits 4.0 GB \(h100\); the least .* GB"):
        search(wan, small, gpus=16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wan2.1-14b.yaml", "--gpus", "0"], "--gpus 0 must be at least 1"),
        (["wan2.1-14b.yaml", "--gpus", "24"], "world_size doesn't hold: 16 \\* 1 \\* 4 \\* 2 against 24"),
        (["wan2.1-14b.yaml", "mesh.dp=1", "mesh.tp=1", "zero.stage=2"], "a rank needs .* GB and the device has 84.9"),
        (["wan2.1-14b.yaml", "--gpu", "h1000"], "did you mean h100"),
        ([], "name a recipe"),
        (["--calibrate", "--out", "FILE.yaml", "--gpu", "h100", "--gpus", "8"], "--gpus, --gpu with --calibrate"),
        (["wan2.1-14b.yaml", "--ranks", "2"], "--ranks 2 is the number of processes of --calibrate"),
        (
            ["wan2.1-14b.yaml", "precision.parameters=float64"],
            r"hardware/h100.yaml: device.attention.reference isn't described",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_number(words: list[str], message: str) -> None:
    words = [str(RECIPES / word) if word.endswith(".yaml") else word for word in words]
    found = CliRunner().invoke(app, ["plan", *words])
    assert isinstance(found.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise found.exception
