"""The quickstart at 1 s, by the commands of its users to 2, 4 and 8 s: every stage trains, and what its plan says of
tokens and bytes is what the run counts, to the byte.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import scale_ranks
from clips import ASSET, all_frames
from curated import write_jsonl
from pool import run_ranks
from typer.testing import CliRunner

from framework.cli import app
from framework.diffusion.video_file import write_mp4

QUICKSTART: Final = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
MESHES: Final = {"ulysses": ["mesh.dp=1", "mesh.ulysses=2"], "dp": []}  # the second is the quickstart's own
CASES: Final = [("ulysses", 2), ("ulysses", 4), ("ulysses", 8), ("dp", 8)]
STEPS: Final = 2  # of a stage: what the second adds to the run's bytes is a step's, without what opening the run sends
WORDS: Final = [  # 1 s, and a model that is quick
    *("data.buckets.0.fps=4", "data.buckets.0.frames=5", f"train.steps={2 * STEPS}", "optimizer.warmup=1"),
    *("model.num_layers=1", "model.num_attention_heads=2", "model.attention_head_dim=24", "model.ffn_dim=96"),
    *("validation.every=0", "samples.every=0", "checkpoint.every=4"),
]


@dataclass(frozen=True)
class Made:
    """A scaled recipe. plan: its stages as `cuboid plan --json` says. lines: metrics of the run. engine: bytes that the
    first rank's ZeRO engine sent, by step.
    """

    plan: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    engine: list[float]


def cuboid(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{words}: {result.output}{result.exception}"
    return result.output


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip of the quickstart, forth and back: 10.6 s."""
    folder = tmp_path_factory.mktemp("videos")
    frames = all_frames(ASSET)[:, ::7, ::7]
    (folder / "clips").mkdir()
    write_mp4(folder / "clips" / "long.mp4", np.concatenate([frames, frames[::-1]]), 25)
    captions = write_jsonl(folder / "captions.jsonl", [{"file": "long.mp4", "captions": [{"text": "a rabbit"}]}])
    cuboid("prepare", folder / "clips", "--captions", captions, "--out", folder / "videos")
    return folder / "videos"


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Made]:
    """Mesh and seconds -> what became of them; all go on from one run of 1 s, and all latents lie in one place."""
    folder = tmp_path_factory.mktemp("scaled")
    words = [*WORDS, f"data.streams=[{{path: {folder / 'latents'}}}]", f"run={folder / 'run'}"]
    jobs = [(QUICKSTART, [*MESHES["ulysses"], *words])]
    for mesh, seconds in CASES:
        recipe = folder / f"{mesh}-{seconds}s.yaml"
        cuboid("scale", QUICKSTART, *MESHES[mesh], *words, "--seconds", seconds, "--out", recipe)
        jobs.append((recipe, [f"run={folder / recipe.stem}"]))
    for recipe, own in jobs:
        cuboid("encode", recipe, *own, "--videos", videos, "--out", folder / "latents")
    engines = run_ranks(scale_ranks.train, 2, jobs)[0]
    return {
        case: Made(
            json.loads(cuboid("plan", recipe, "--json"))["stages"],
            [json.loads(line) for line in (folder / recipe.stem / "metrics.jsonl").read_text().splitlines()],
            engine,
        )
        for case, (recipe, _), engine in zip(CASES, jobs[1:], engines[1:], strict=True)
    }


@pytest.mark.parametrize(("mesh", "seconds"), CASES)
def test_a_longer_clip_trains_and_sends_what_its_plan_says(
    made: dict[tuple[str, int], Made], mesh: str, seconds: int
) -> None:
    found = made[mesh, seconds]
    assert [line["stage"] for line in found.lines] == ["half-rate"] * STEPS + ["full-rate"] * STEPS
    assert all(math.isfinite(line["loss"]) and "skipped" not in line for line in found.lines)
    assert [stage["stage"] for stage in found.plan] == ["half-rate", "full-rate"]
    # Latent frames of 24 tokens: 1 + 1 of a second at 4 frames each, and of the two at half the rate.
    assert [stage["buckets"][0]["tokens"] for stage in found.plan] == [2 * 24, (1 + seconds) * 24]
    for number, stage in enumerate(found.plan):
        first, last = found.lines[number * STEPS : (number + 1) * STEPS]
        (bucket,) = stage["buckets"]
        for line in (first, last):
            assert (line["tokens"], line["samples"]) == (bucket["samples"] * bucket["tokens"], bucket["samples"])
        assert (stage["tokens"], stage["samples"]) == tuple(first[key] + last[key] for key in ("tokens", "samples"))
        sent = {group: total - first["traffic"][group] for group, total in last["traffic"].items()}
        engine = found.engine[number * STEPS : (number + 1) * STEPS]
        sent["zero"] = sent.get("zero", 0) + engine[1]
        assert engine[0] == engine[1] > 0
        assert {group: count for group, count in sent.items() if count} == stage["traffic"]
