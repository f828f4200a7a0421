"""Validation and samples look and don't touch: training stays the same bit for bit, the value on every mesh."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import ranks
from pool import run_ranks
from tiny import CLIP, write_latents, write_recipe

WORDS = ["data.global_batch=4", "train.steps=6", "mesh.dp=auto", "validation.samples=5", "ema.decay=0.5"]


def run(folder: Path, shards: Path, dp: int, *words: str) -> Path:
    name = f"{dp}-{len(list(folder.iterdir()))}"
    recipe = write_recipe(folder, shards, [*WORDS, f"run={folder / name}", *words], name=f"{name}.yaml")
    run_ranks(ranks.train, dp, recipe, [])
    return folder / name


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("held"), prefix="held", num_samples=5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_observing_changes_no_bit(tmp_path: Path, tiny_shards: Path, held_out: Path, stage: int) -> None:
    observing = [
        "validation.every=2",
        f"validation.shards=[{held_out}]",
        "samples.every=3",
        "samples.prompts=[a, b, c]",
    ]
    for precision in ("float32", "bfloat16"):
        words = [f"zero.stage={stage}", f"precision.parameters={precision}"]
        plain = run(tmp_path, tiny_shards, 2, *words)
        observed = run(tmp_path, tiny_shards, 2, *words, *observing)
        curves = [[(x["loss"], x["grad_norm"]) for x in lines(path / "metrics.jsonl")] for path in (plain, observed)]
        assert curves[0] == curves[1]
    names = sorted(path.name for path in (observed / "samples").iterdir())
    steps_and_prompts = [f"step-{step:08}-{n:02}" for step in (3, 6) for n in (0, 1, 2)]
    assert names == sorted(f"{stem}.{kind}" for stem in steps_and_prompts for kind in ("mp4", "png"))
    with av.open(str(observed / "samples" / "step-00000006-02.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == CLIP.frames


def test_validation_is_the_same_on_every_mesh(tmp_path: Path, tiny_shards: Path, held_out: Path) -> None:
    words = ["validation.every=3", f"validation.shards=[{held_out}]", "data.micro_batch=2"]
    results: dict[int | str, list[dict[str, Any]]] = {
        dp: lines(run(tmp_path, tiny_shards, dp, *words) / "validation.jsonl") for dp in (1, 2, 3)
    }
    assert [(x["step"], x["weights"]) for x in results[1]] == [(3, "raw"), (3, "ema"), (6, "raw"), (6, "ema")]
    for x in results[1]:
        (bucket,) = x["buckets"].values()
        assert len(bucket["loss"]) == len(bucket["sigma"]) == 8
        assert bucket["sigma"] == pytest.approx([(j + 0.5) / 8 for j in range(8)]), "quantiles of the uniform levels"
        assert x["loss"] == pytest.approx(sum(bucket["loss"]) / 8)
    for degrees in (["mesh.tp=2"], ["mesh.ring=2", "zero.engine=fsdp2", "zero.stage=3"], ["mesh.ulysses=2"]):
        results[degrees[0]] = lines(run(tmp_path, tiny_shards, 2, *words, *degrees) / "validation.jsonl")
    for mesh in results.keys() - {1}:
        for a, b in zip(results[mesh], results[1], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), mesh
    assert results[1][0]["loss"] != results[1][1]["loss"], "the average isn't the live weights"


def test_samples_are_the_same_on_every_mesh(tmp_path: Path, tiny_shards: Path) -> None:
    """As far as their compression lets it be seen; three prompts, so that one replica of two has none left."""
    words = ["samples.every=6", "samples.prompts=[a, b, c]", "optimizer.lr=1e-2"]
    meshes = [["mesh.dp=1"], ["mesh.tp=2"], ["mesh.ring=2"], ["mesh.ulysses=2", "zero.engine=fsdp2", "zero.stage=3"]]
    videos = [run(tmp_path, tiny_shards, 1 if "mesh.dp=1" in mesh else 2, *words, *mesh) / "samples" for mesh in meshes]
    for number in range(3):
        first, *others = [frames(folder / f"step-00000006-{number:02}.mp4") for folder in videos]
        assert first.std() > 10
        assert all(np.abs(first - other).mean() < 0.5 for other in others)


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
