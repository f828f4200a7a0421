"""A run in stages, each on a mesh of its own: unattended it is one curve, and killed in each stage the same one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
from curriculum import write_curriculum
from plain_dcp import digests, folder_of
from pool import run_ranks, run_until_killed

from framework.checkpoint.stage import read_progress
from framework.recipe import load_recipe
from framework.run import Run, read_verdict

NUM_RANKS = (1, 2, 2, 2)
# stage -> where its ranks are killed, one time after another: between saves, after one, in the first step, and as the
# checkpoint that hands over is committed.
DEATHS = {
    0: [ranks.Death(1)],
    1: [ranks.Death(5), ranks.Death(6, "commit")],
    2: [ranks.Death(6)],
    3: [ranks.Death(11)],
}


def lines(run: Path, *names: str) -> list[tuple[Any, ...]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in found]


def cuboid(*words: str) -> str:
    command = [sys.executable, "-m", "framework.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_curriculum(tmp_path_factory.mktemp("curriculum"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run of one command."""
    run = recipe.parent / "run"
    cuboid("train", str(recipe))
    return run


def test_one_command_trains_all_stages(recipe: Path, whole: Path) -> None:
    names = ["image"] * 3 + ["short"] * 3 + ["half-rate"] * 3 + ["full-rate"] * 3
    assert lines(whole, "step", "stage") == list(enumerate(names, start=1))
    # By hand: 1e-3 after a warm-up of two, on a cosine whose third step is its first; then 5e-4 the same way.
    assert [lr for (lr,) in lines(whole, "lr")] == [5e-4, 1e-3, 1e-3, 2.5e-4, 5e-4, 5e-4] + [1e-3] * 6
    meshes = [load_recipe(Run(whole, n).attempt_path / "recipe.yaml", []).mesh for n in range(4)]
    assert [(m.dp, m.ring, m.tp) for m in meshes] == [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
    verdicts = [read_verdict(Run(whole, n)) for n in range(4)]
    assert [(v.stage, v.step, v.follow) for v in verdicts if v] == [
        ("image", 3, 3),
        ("short", 6, 2),
        ("half-rate", 9, 1),
        ("full-rate", 12, 0),
    ]
    assert "its 4 stages are done, 12 steps" in cuboid("train", str(recipe))
    assert len(list((whole / "attempts").glob("0*"))) == 4, "nothing was started again"


def test_killed_in_each_stage_it_is_the_same_run(recipe: Path, whole: Path) -> None:
    run = recipe.parent / "broken"
    words = [f"run={run}"]
    for stage, deaths in DEATHS.items():
        for death in deaths:
            exits = run_until_killed(ranks.train, NUM_RANKS[stage], recipe, words, death, stage)
            assert -signal.SIGKILL in exits
            assert read_progress(load_recipe(recipe, words)).stage == stage
        verdicts = run_ranks(ranks.train, NUM_RANKS[stage], recipe, words, None, stage)
        assert verdicts[0].follow == 3 - stage
    names = ("step", "loss", "grad_norm", "lr", "stage")
    assert lines(run, *names) == lines(whole, *names)
    assert digests(folder_of(run, 12)) == digests(folder_of(whole, 12))
