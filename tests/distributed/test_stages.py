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
import yaml
from curriculum import write_curriculum
from plain_dcp import digests, folder_of
from pool import RanksFailed, run_ranks, run_until_killed
from tiny import recipe_tree, write_latents

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


def test_ranks_from_outside_train_all_stages_on_a_plateau_too(tiny_shards: Path, tmp_path: Path) -> None:
    """Where the number of ranks stays: the same numbers as on new ranks for each stage, and after a kill.

    No validation is ten times better than the one before, so the third ends the first stage.
    """
    held_out = write_latents(tmp_path / "held", prefix="held")
    tree = recipe_tree(tiny_shards, tmp_path / "run") | {"train": {}, "ema": {"decay": 0.0}}
    tree["checkpoint"] = {"every": 1, "keep": 20}
    tree["validation"] = {"every": 1, "shards": [str(held_out)], "samples": 4, "sigmas": 2}
    leaving = {"plateau": {"evaluations": 2, "min_improvement": 0.9}, "steps": 9}
    tree["stages"] = [
        {"name": "flat", "exit": leaving, "mesh": {"dp": 2}},
        {"name": "rest", "exit": {"steps": 2}, "mesh": {"tp": 2}, "validation": {"every": 0}},
    ]
    path = tmp_path / "plateau.yaml"
    path.write_text(yaml.safe_dump(tree))
    run_ranks(ranks.train_all, 2, path, [])
    assert lines(tmp_path / "run", "step", "stage") == list(enumerate(["flat"] * 3 + ["rest"] * 2, start=1))
    words = [f"run={tmp_path / 'broken'}"]
    run_until_killed(ranks.train, 2, path, words, ranks.Death(2), 0)
    saved = read_progress(load_recipe(path, words))  # of step 2, if that was written in time
    assert saved.stage == 0 and len(saved.evaluations) == saved.step in (1, 2)
    assert [run_ranks(ranks.train, 2, path, words, None, stage)[0].step for stage in (0, 1)] == [3, 5]
    names = ("step", "loss", "grad_norm", "stage")
    assert lines(tmp_path / "broken", *names) == lines(tmp_path / "run", *names)
    run_ranks(ranks.train_all, 2, path, [])  # which says that nothing is left
    with pytest.raises(
        RanksFailed, match=r"stages\[0\] \(flat\): dp \* ring \* ulysses \* tp == world_size doesn't hold"
    ):
        run_ranks(ranks.train_all, 1, path, [f"run={tmp_path / 'other'}"])


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
