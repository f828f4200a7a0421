"""A recipe for longer clips, against numbers worked out by hand.

Wan 2.1 14B at 480p: 81 frames at 16 a second are 21 latent frames of 30 x 52 tokens, 32,760; on tp 2 x ulysses 4 a rank
has 8,190 of them. 20 s are 321 frames, 81 latent ones, 126,360 tokens.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from framework.cli import app
from framework.forecast.search import fastest_placement
from framework.models.config import RopeConfig
from framework.parallel.config import MeshConfig
from framework.plan.hardware import load_hardware
from framework.plan.scale import Change, ScaleRequest, bridge_stages, changes_for, figures_of, last_stage
from framework.plan.scale_file import node_lines
from framework.plan.scale_mesh import Placement
from framework.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[3] / "recipes"
WORDS: dict[str, list[str]] = {
    "image too": [
        "data.buckets=[{frames: 81, height: 480, width: 832, fps: 16}, {frames: 1, height: 480, width: 832}]"
    ],
    "two at once": ["data.micro_batch=2"],
    "scaled": ["data.buckets.0.frames=161", "rope={time: riflex, factor: 1.9524, trained_frames: 21}"],
    "by tokens": ["flow.shift={name: tokens, tokens: {value: 2.0}}"],
    "any ranks": ["mesh.dp=auto"],
    "sampled": ["sampler.shift=3.0"],
    "stored": ["optimizer.decay_steps=3", "attention.kernel=aten", "train.steps=3"],
}


def wan(case: str = "") -> Recipe:
    return load_recipe(RECIPES / "wan2.1-14b.yaml", WORDS.get(case, []))


def changed(recipe: Recipe, request: ScaleRequest, **given: Any) -> dict[str, Any]:
    return {change.key: change.after for change in changes_for(recipe, request, **given)}


def test_four_times_the_seconds_on_twice_the_gpus() -> None:
    assert changed(wan(), ScaleRequest(20, 256)) == {
        "data.buckets.0.frames": 321,
        # 126,360 / 8,190 = 15.4 ranks a sample: 16, of which 4 are Ulysses' (8 ranks in a node, 2 of them tp's).
        "mesh": {"dp": 8, "ring": 4, "ulysses": 4, "tp": 2},
        "data.global_batch": 16,  # 64 * 21 / 81 = 16.6, to a multiple of 8
        "flow.shift.fixed.value": 5.8919,  # 3 sqrt(81 / 21)
        "rope": {"time": "ntk", "factor": 3.8571, "trained_frames": 0},  # 81 / 21, above 3
        "optimizer.lr": 5e-5,  # 1e-4 sqrt(16 / 64)
        "init_from": "runs/wan2.1-14b",
        "run": "runs/wan2.1-14b-20s",
    }


def test_twice_the_seconds_on_the_same_gpus() -> None:
    """161 frames are 41 latent ones, 63,960 tokens: 7.8 ranks a sample."""
    found = changed(wan(), ScaleRequest(10))
    assert found["mesh"] == {"dp": 8, "ring": 2, "ulysses": 4, "tp": 2}
    assert found["rope"] == {"time": "riflex", "factor": 1.9524, "trained_frames": 21}
    assert found["data.global_batch"] == 32  # 64 * 21 / 41 = 32.8
    assert "execution.recompute" not in found


def test_a_larger_picture_leaves_time_alone() -> None:
    """45 x 80 tokens in place of 30 x 52: 75,600 / 32,760 = 2.308 of them, and as many ranks, 9.2 -> 16."""
    found = changed(wan(), ScaleRequest(5, size=(720, 1280)))
    assert (found["data.buckets.0.height"], found["data.buckets.0.width"]) == (720, 1280)
    assert found["flow.shift.fixed.value"] == 4.5573
    assert found["mesh"] == {"dp": 4, "ring": 4, "ulysses": 4, "tp": 2}
    assert not found.keys() & {"rope", "data.buckets.0.frames"}
    assert bridge_stages(wan(), changes_for(wan(), ScaleRequest(5, size=(720, 1280)))) == []


def test_too_few_gpus_compute_more_again_and_then_are_refused() -> None:
    """8 GPUs have 4 ranks a sample. Kept are 10 bytes of a token and channel, of 8,190 tokens; with `all` 2 bytes of
    126,360 / 4. A minute has 375,960 tokens: 2 * 375,960 / 81,900 = 9.2 ranks, 10 times tp.
    """
    found = changed(wan(), ScaleRequest(20, 8))
    assert found["execution.recompute"] == "all"
    assert found["mesh"] == {"dp": 1, "ring": 1, "ulysses": 4, "tp": 2}
    with pytest.raises(ValueError, match=r"8 GPUs are too few for 375,960 tokens .* only with 20 of them"):
        changed(wan(), ScaleRequest(60, 8))


def test_a_smaller_micro_batch_comes_before_more_ranks() -> None:
    """Two samples of 32,760 tokens become one of 63,960."""
    found = changed(wan("two at once"), ScaleRequest(10))
    assert found["data.micro_batch"] == 1 and "mesh" not in found


def test_shorter_buckets_stay() -> None:
    """An image has 1,560 tokens; the means of both are 17,160 and 63,960: 64 * 17,160 / 63,960 = 17.2."""
    found = changed(wan("image too"), ScaleRequest(20, 256))
    assert found["data.buckets.0.frames"] == 321 and not [key for key in found if key.startswith("data.buckets.1")]
    assert (found["data.degrees"], found["data.global_batch"]) == ("auto", 16)


def test_a_scaling_goes_on_from_the_one_the_weights_have() -> None:
    """From 41 latent frames to 81, on top of 41 / 21; the same pair is stretched."""
    found = changed(wan("scaled"), ScaleRequest(20, 256))
    assert found["rope"] == {"time": "riflex", "factor": 3.8572, "trained_frames": 21}
    with pytest.raises(ValueError, match=r"--rope ntk: the weights were trained with rope.time=riflex"):
        changed(wan("scaled"), ScaleRequest(20, 256, rope="ntk"))
    assert changed(wan(), ScaleRequest(10, rope="interpolation"))["rope"] == {
        "time": "interpolation",
        "factor": 1.9524,
        "trained_frames": 0,
    }
    assert "rope" not in changed(wan(), ScaleRequest(10, rope="none"))
    with pytest.raises(ValueError, match=r"--rope riflex: the clips get shorter \(21 -> 11 latent frames\)"):
        changed(wan(), ScaleRequest(2.5, rope="riflex"))


def test_a_shift_by_tokens_follows_by_itself_and_the_samplers_own_with_the_fixed_one() -> None:
    assert not [key for key in changed(wan("by tokens"), ScaleRequest(20, 256)) if "shift" in key]
    assert changed(wan("sampled"), ScaleRequest(20, 256))["sampler.shift"] == 5.8919


def test_constant_samples_keep_the_learning_rate() -> None:
    assert not changed(wan(), ScaleRequest(20, 256, batch="samples")).keys() & {"data.global_batch", "optimizer.lr"}


def test_more_replicas_than_the_batch_has_samples_are_refused() -> None:
    """64 * 21 / 41 = 32.8 samples; 8 ranks a sample, with tp 16, so 32 * 16 GPUs have one each; 1,024 have 64, which
    are no more than twice as many, and 2,048 aren't.
    """
    assert changed(wan(), ScaleRequest(10, 1024)).keys() & {"mesh", "data.global_batch"} == {"mesh"}
    said = r"mesh.dp=128 \(of 2,048 GPUs, 16 a sample\) .* 128 samples .* 32.78: take --gpus 512 or fewer, or"
    with pytest.raises(ValueError, match=said):
        changed(wan(), ScaleRequest(10, 2048))
    with pytest.raises(ValueError, match=r"need 32 samples .* gives 15.56: .* say --batch samples for 60, or begin"):
        changed(replace(wan(), data=replace(wan().data, global_batch=60)), ScaleRequest(20), choose=by_32)
    with pytest.raises(ValueError, match=r"need 256 samples a step, where --batch samples gives 64"):
        changed(wan(), ScaleRequest(10, 4096, batch="samples"))


def by_32(old: Recipe, new: Recipe, num_gpus: int | None) -> Placement:
    return Placement(MeshConfig(32, 4, 4, 2), "keep_attention")


def test_the_fastest_mesh_leaves_each_replica_a_sample() -> None:
    """As many tokens are 16.6 samples: of the meshes of 512 GPUs those with at most 16 replicas."""
    choose = fastest_placement(load_hardware("h100"))
    found = changed(wan(), ScaleRequest(20, 512), choose=choose)
    assert found["mesh"]["dp"] <= 16 and math.prod(found["mesh"].values()) == 512
    kept = {c.key: c for c in changes_for(wan(), ScaleRequest(20, 256), choose=choose)}["execution.recompute"]
    assert kept.after == "none" and kept.reason.endswith("leave room to keep more for the backward")
    with pytest.raises(ValueError, match=r"no mesh of 100,000 GPUs .* data.global_batch=64 .* take fewer --gpus"):
        changed(wan(), ScaleRequest(20, 100_000), choose=choose)


def test_the_reason_of_a_mesh_says_how_many_gpus_it_takes() -> None:
    changes = {c.key: c for c in changes_for(wan(), ScaleRequest(20, 256))}
    assert changes["mesh"].reason.startswith("256 of 256 GPUs, 32 a sample: 7,898 tokens in a forward of a rank")


def test_what_auto_stood_for_in_a_run_is_left_behind() -> None:
    """A decay of the old run's 3 steps would leave the new one's at the final rate."""
    seen = []

    def choose(old: Recipe, new: Recipe, num_gpus: int | None) -> Placement:
        seen.append((new.attention.kernel, new.optimizer.decay_steps))
        return Placement(MeshConfig(8, 4, 4, 2), "keep_attention")

    found = changed(wan("stored"), ScaleRequest(20, 256), choose=choose)
    assert (found["optimizer.decay_steps"], found["attention.kernel"]) == ("auto", "auto")
    assert seen == [("auto", "auto")]


def test_ranks_that_the_recipe_leaves_open_stay_so() -> None:
    """15.4 ranks a sample, to a power of two; 16.6 samples."""
    found = changed(wan("any ranks"), ScaleRequest(20))
    assert found["mesh"] == {"dp": "auto", "ring": 4, "ulysses": 4, "tp": 2} and found["data.global_batch"] == 17


@pytest.mark.parametrize(
    ("name", "seconds", "message"),
    [
        ("wan2.1-14b", 5.1, r"82.6 frames, .* stride 4 can't .* 5 s \(81 frames\) and 5.25 s \(85 frames\)"),
        ("moviegen-1b", 10.3, r"164.8 frames, .* stride 8 can't .* 10 s \(160 frames\) and 10.5 s \(168 frames\)"),
        ("wan2.1-14b", 5, r"the longest clips are 5 s long already"),
        ("wan2.1-14b", 0, r"--seconds 0 must be above 0"),
    ],
)
def test_durations_that_cannot_be_are_refused(name: str, seconds: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changes_for(load_recipe(RECIPES / f"{name}.yaml", []), ScaleRequest(seconds))


def test_a_bucket_without_a_rate_has_no_duration() -> None:
    with pytest.raises(ValueError, match=r"data.buckets.0.fps is null"):
        changes_for(load_recipe(RECIPES / "wan2.1-14b.yaml", ["data.buckets.0.fps=null"]), ScaleRequest(10))


def test_movie_gen_doubles() -> None:
    """512 frames are 64 latent ones of 48 x 48 tokens, and an image for ten clips stays."""
    recipe = load_recipe(RECIPES / "moviegen-1b.yaml", [])
    found = changed(recipe, ScaleRequest(32, 256))
    assert found["data.buckets.0.frames"] == 512
    assert found["rope"] == {"time": "riflex", "factor": 2.0, "trained_frames": 32}
    # The means of ten clips and an image are 67,235 and 134,260 tokens; 256 * 0.5008 = 128.2, dp 256 / 4.
    assert found["data.global_batch"] == 128 and math.prod(found["mesh"].values()) == 256


def test_ulysses_stays_within_a_node() -> None:
    """147,456 tokens need 4 ranks a sample, and tp 4 leaves 2 of a node's 8 to Ulysses, though there are 12 heads."""
    found = changed(load_recipe(RECIPES / "moviegen-30b.yaml", []), ScaleRequest(32))
    assert found["mesh"] == {"dp": 384, "ring": 2, "ulysses": 2, "tp": 4}
    assert found["data.global_batch"] == 768  # 1,536 * 0.5008, to a multiple of 384


def test_the_bridge_has_the_tokens_of_before_at_half_the_rate() -> None:
    changes = changes_for(wan(), ScaleRequest(20, 256))
    half, full = bridge_stages(wan(), changes)
    assert half["data"]["buckets"] == [{"frames": 81, "height": 480, "width": 832, "fps": 8.0}]
    assert half["mesh"] == {"dp": 32, "ring": 1, "ulysses": 4, "tp": 2}  # the old degrees on 256 ranks
    assert (half["data"]["global_batch"], half["optimizer"]) == (64, {"lr": 1e-4})
    assert half["flow"] == {"shift": {"fixed": {"value": 3.0}}}
    assert half["rope"]["time"] == "none"
    assert (half["exit"], full) == ({"steps": 50000}, {"name": "full-rate", "exit": {"steps": 50000}})
    assert bridge_stages(wan(), changes_for(wan(), ScaleRequest(9))) == [], "10 s at half the rate are too long"


def test_the_mesh_is_chosen_by_whoever_is_given() -> None:
    seen = []

    def choose(old: Recipe, new: Recipe, num_gpus: int | None) -> Placement:
        seen.append((old.data.buckets[0].frames, new.data.buckets[0].frames, num_gpus))
        return Placement(MeshConfig(2, 3, 5, 1), "all")

    found = changed(wan(), ScaleRequest(20), choose=choose)
    assert seen == [(81, 321, 128)]
    assert found["mesh"] == {"dp": 2, "ring": 3, "ulysses": 5, "tp": 1} and found["execution.recompute"] == "all"


def test_figures_of_a_recipe() -> None:
    """Linears 2 S D (6 D + 2 F), attention 4 S D (S + L), in 40 blocks, three times; around them little (flops.py)."""
    figures, s, d, text = figures_of(wan()), 32_760, 5120, 512
    blocks = 40 * 3 * (2 * s * d * (6 * d + 2 * 13_824) + 2 * text * d * 2 * d + 4 * s * d * (s + text)) / 1e15
    assert figures.petaflops == pytest.approx(blocks, rel=2e-3)
    assert figures.attention == pytest.approx(40 * 3 * 4 * s * d * (s + text) / 1e15 / figures.petaflops)
    assert replace(figures, petaflops=0, attention=0) == replace(
        figures, clip="81x480x832@16.0", seconds=5.0, tokens=s, samples=64, rank_tokens=8190, petaflops=0, attention=0
    )


def scale(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["scale", *map(str, words)])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_the_file_is_the_recipe_with_every_change_and_its_reason(tmp_path: Path) -> None:
    out = tmp_path / "new.yaml"
    status, text = scale(RECIPES / "wan2.1-14b.yaml", "--seconds", 20, "--gpus", 256, "--out", out)
    assert status == 0, text
    assert "tokens a sample                                32,760           126,360" in text
    # The recipe names its hardware, so the mesh is the fastest that a search finds there.
    choose = fastest_placement(load_hardware("h100"))
    new, changes = load_recipe(out, []), changes_for(wan(), ScaleRequest(20, 256), choose=choose)
    found = {change.key: change.after for change in changes}
    assert (new.data.buckets[0].frames, asdict(new.mesh)) == (321, found["mesh"])
    assert new.mesh.ring * new.mesh.ulysses > wan().mesh.ulysses
    assert new.rope == RopeConfig("ntk", 3.8571) and new.init_from == "runs/wan2.1-14b"
    assert (new.model, new.zero, new.precision) == (wan().model, wan().zero, wan().precision)
    written = " ".join(line.strip().removeprefix("# ") for line in out.read_text().splitlines())
    assert [change.key for change in changes if change.reason not in written] == []
    lines = out.read_text().splitlines()
    assert lines[lines.index("      value: 5.8919") - 1].endswith("= 1.964; was 3.0")
    text = out.read_text()
    assert yaml.safe_load(text)["stages"] == bridge_stages(wan(), changes)
    status, text = scale(RECIPES / "wan2.1-14b.yaml", "--seconds", 20, "--out", out)
    assert status == 1 and "is there already" in text


def test_a_scaled_recipe_scales_again(tmp_path: Path) -> None:
    first, second = tmp_path / "10.yaml", tmp_path / "20.yaml"
    assert scale(RECIPES / "wan2.1-14b.yaml", "--seconds", 10, "--out", first)[0] == 0
    assert scale(first, "--seconds", 20, "--gpus", 256, "--out", second)[0] == 0
    assert load_recipe(second, []).rope == RopeConfig("riflex", 3.8572, 21)


def test_a_recipe_with_stages_goes_on_from_its_last() -> None:
    first, last = (
        {"name": name, "exit": {"steps": n}, "data": {"global_batch": n}} for name, n in (("a", 5), ("b", 7))
    )
    tree = {"seed": 1, "data": {"global_batch": 2, "micro_batch": 3}, "stages": [first, last]}
    assert last_stage(tree) == {"seed": 1, "data": {"global_batch": 7, "micro_batch": 3}, "train": {"steps": 7}}
    assert last_stage({"seed": 1}) == {"seed": 1}
    by_samples = {**last, "exit": {"samples": 50}}
    assert last_stage(tree | {"stages": [first, by_samples]})["train"] == {"steps": 8}, "50 / 7, the last one in part"
    assert last_stage({"stages": [{"name": "a", "exit": {"samples": 50}}]})["train"] == {"steps": 7}, "50 / 8"


def test_a_file_that_cannot_be_written_is_refused_before_the_table(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    status, text = scale(RECIPES / "wan2.1-1.3b.yaml", "--seconds", 10, "--out", tmp_path / "file" / "new.yaml")
    assert status == 1 and f"{tmp_path}/file is a file, not a directory" in text and "tokens a sample" not in text
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    status, text = scale(RECIPES / "wan2.1-1.3b.yaml", "--seconds", 10, "--out", tmp_path / "a" / "new.yaml")
    assert status == 1 and f"{tmp_path} is closed to this user" in text and "tokens a sample" not in text
    monkeypatch.undo()
    status, text = scale(RECIPES / "wan2.1-1.3b.yaml", "--seconds", 10, "--out", tmp_path / ("a" * 300))
    assert status == 1 and "can't be written (File name too long)" in text and "tokens a sample" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "clips"], "--batch clips must be tokens or samples"),
        (["--rope", "yarn"], "--rope yarn must be one of none, interpolation, ntk, riflex"),
        (["--gpus", 0], "--gpus 0 must be at least 1"),
        (["--resolution", "720p"], "--resolution 720p must be HEIGHTxWIDTH"),
        (["--resolution", "721x1280"], "height 721 isn't a multiple of the stride 8"),
        (["data.buckets=[{frames: 5, height: 64, width: 64, fps: 4}, {frames: 1, height: 32, width: 32}]"], None),
    ],
)
def test_words_that_cannot_be_are_refused(words: list[Any], message: str | None) -> None:
    words = words if message else [*words, "--resolution", "64x64"]
    status, text = scale(RECIPES / "wan2.1-14b.yaml", *words, "--seconds", 20)
    assert status == 1 and (message or "the buckets have several (32x32, 64x64)") in text


def test_lists_and_comments_are_written_as_yaml() -> None:
    tree = {"a": {"b": [{"c": 1, "d": [1, 2]}, {"c": None, "d": []}], "e": "24:00:00"}, "f": {}, "g": 6e-5}
    lines = list(node_lines(tree, {"a.b.0.c": Change("a.b.0.c", 2, 1, "why")}, "", ""))
    assert yaml.safe_load("\n".join(lines)) == tree
    assert lines[:4] == ["a:", "  b:", "      # why; was 2", "    - c: 1"]
