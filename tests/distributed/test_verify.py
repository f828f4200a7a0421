"""`cuboid verify` through the real command: the table, the exit status, and what it says of what it can't compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_latents, write_recipe, write_stages

from framework.shapes import ClipShape

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def verify(recipe: Path, *words: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    command = [sys.executable, "-m", "framework.cli", "verify", str(recipe), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=CLEAN | {"OMP_NUM_THREADS": "1"}, timeout=280)
    return done.returncode, done.stdout, done.stderr


def meshes(*words: str) -> list[str]:
    return [item for word in words for item in ("--mesh", word)]


def test_meshes_that_agree(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_shards)
    chosen = ["dp=1", "tp=2,stage=3", "ring=2,engine=fsdp2,stage=3"]
    status, out, err = verify(recipe, "--steps", "2", "--json", *meshes(*chosen))
    assert (status, err) == (0, ""), (out, err)
    told = json.loads(out)
    assert [row["words"] for row in told["rows"]] == chosen and all(row["agrees"] for row in told["rows"])
    for row in told["rows"][1:]:
        errors = row["errors"]
        assert errors["same_samples"] and errors["gradient"] <= 5e-6 and errors["norm"] <= 1e-5
        assert errors["gradient_name"] and errors["curve"] <= 1e-4 and errors["weight"] <= 1e-4
    assert not (tmp_path / "run").exists(), "it leaves no run behind"


def test_a_stage_is_verified_alone(tiny_shards: Path, tmp_path: Path) -> None:
    """The second stage takes batches of 2 and the first one's are 4; a mesh's words lie over its ring."""
    recipe = write_stages(tmp_path, tiny_shards)
    status, out, err = verify(recipe, "--steps", "1", "--stage", "long", *meshes("dp=1"))
    assert (status, err) == (0, "") and out.startswith("float32, 2 samples, 1 step;"), (out, err)
    status, out, err = verify(recipe, "--stage", "middle", *meshes("dp=1"))
    assert (status, out) == (2, "") and "no such stage, only short, long" in err


def test_float64_says_that_fsdp2_stands_in(tiny_shards: Path, tmp_path: Path) -> None:
    status, out, err = verify(write_recipe(tmp_path, tiny_shards), "--dtype", "float64", *meshes("dp=1", "ulysses=2"))
    assert (status, err) == (0, ""), (out, err)
    assert "fsdp2 stands in for DeepSpeed, whose masters are float32" in out
    assert out.splitlines()[-1].startswith("ulysses=2") and "agrees" in out.splitlines()[-1]


def test_bfloat16_is_judged_by_its_own_error(tiny_shards: Path, tmp_path: Path) -> None:
    status, out, _ = verify(
        write_recipe(tmp_path, tiny_shards),
        "--dtype",
        "bfloat16",
        "--steps",
        "1",
        *meshes("dp=1", "tp=2,stage=3", "ring=2,stage=2"),
    )
    assert status == 0, out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["dp=1", "tp=2,stage=3", "ring=2,stage=2"]


def test_a_pattern_and_levels_by_frame(tmp_path: Path) -> None:
    """5 latent frames of 2 tokens: two ranks share one. Every frame has a noise level of its own."""
    latents = write_latents(tmp_path / "latents", clip=ClipShape(17, 16, 32))
    words = [
        "attention.pattern={name: window, window: {frames: 1, sinks: 1}}",
        "flow.timesteps.per_frame=true",
        "data.buckets=[{frames: 17, height: 16, width: 32}]",
    ]
    chosen = meshes("dp=1", "ring=2,engine=fsdp2,stage=3")
    status, out, err = verify(write_recipe(tmp_path, latents, words), "--steps", "1", *chosen)
    assert (status, err) == (0, "") and out.count("agrees") == 1, (out, err)


LIE = """
import framework.cli
from framework.launch import verify

right = verify.Observation.load

def wrong(path):
    seen = right(path)
    if path.name == "mesh-1.npz":
        seen.gradients["blocks.1.norm2.weight"][3] += 1e-3
    return seen

verify.Observation.load = staticmethod(wrong)
framework.cli.main()
"""


def test_what_differs_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    words = ["verify", str(write_recipe(tmp_path, tiny_shards)), "--steps", "0", *meshes("dp=1", "dp=2")]
    environment = CLEAN | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIE, *words], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 1
    assert "DIFFERS; worst gradient blocks.1.norm2.weight" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--mesh dp=1"),
        (meshes("dp=1", "cp=2"), "'cp=2' is none of dp="),
        (meshes("dp=auto"), "'dp=auto' must be a whole number from 1 on"),
        (meshes("dp=1", "tp=0"), "'tp=0' must be a whole number from 1 on"),
        ([*meshes("dp=1", "tp=x"), "--shrink"], "'tp=x' must be a whole number from 1 on"),
        (meshes("dp=1", "tp=3"), "mesh.tp=3 must divide the model's 2 heads"),
        (meshes("dp=1", "ulysses=2,stage=1,engine=fsdp2"), "zero.stage=1 with zero.engine=fsdp2"),
        (meshes("dp=1", "dp=64"), "too many for"),
        ([*meshes("dp=1"), "--dtype", "float16"], "--dtype float16 must be one of float64, float32, bfloat16"),
        ([*meshes("dp=1"), "--steps", "-1"], "--steps -1 must be at least 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny_shards: Path, tmp_path: Path, words: list[str], told: str) -> None:
    status, out, err = verify(write_recipe(tmp_path, tiny_shards), *words)
    assert (status, out) == (2, "") and told in err and len(err.splitlines()) == 1


def test_a_bucket_whose_degrees_a_mesh_has_no_ranks_for(tiny_shards: Path, tmp_path: Path) -> None:
    bucket = "data.buckets=[{frames: 5, height: 16, width: 16, ulysses: 2}]"
    status, out, _ = verify(write_recipe(tmp_path, tiny_shards, [bucket]), "--steps", "1", *meshes("dp=1", "dp=2"))
    assert status == 0, out
    assert "dp=1: 5x16x16 takes the mesh's degrees, as 1 ranks aren't 1 x 2" in out and "dp=2: " not in out


@pytest.mark.parametrize("shrink", [[], ["--shrink"]], ids=["as it is", "shrunk"])
def test_it_runs_inside_a_job(tiny_shards: Path, tmp_path: Path, shrink: list[str]) -> None:
    recipe = write_recipe(tmp_path, tiny_shards)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = ["verify", str(recipe), *shrink, "--steps", "1", *meshes("dp=2", "ulysses=2,engine=fsdp2,stage=3", "tp=2")]
    command, environment = [*launcher, "framework.cli", *words], CLEAN | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.count("agrees") == 2, "one rank tells"


WAN_14B = """
attention: {pattern: {name: window, window: {frames: 4, sinks: 1}}}
tokenizer: {name: dct, dct: {coefficients: 16}}
model: {text_dim: 256}
data:
  streams: [{path: nowhere}]
  buckets:
    - {frames: 81, height: 720, width: 1280}
    - {frames: 1, height: 720, width: 1280, ring: 1, ulysses: 1}
  global_batch: 64
"""


def test_a_14b_recipe_shrinks_to_a_laptop(tmp_path: Path) -> None:
    """Heads, degrees and remainders of a model of 40 heads and 75,600 tokens in a window, on two ranks."""
    recipe = tmp_path / "wan-14b.yaml"
    recipe.write_text(WAN_14B)
    status, out, err = verify(recipe, "--shrink", "--steps", "1", *meshes("dp=1", "ulysses=2", "tp=2,stage=3"))
    assert (status, err) == (0, ""), (out, err)
    assert out.count("agrees") == 2
