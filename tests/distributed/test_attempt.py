"""The ranks of an attempt that a launcher has claimed and watches."""

import json
import os
import signal
import time
from pathlib import Path

import attempt_ranks
import pool
import pytest
from tiny import write_recipe

from framework.checkpoint.attempt import claim_attempt
from framework.heartbeat import read_heartbeat
from framework.run import Run, Verdict
from framework.stacks import stack_file
from framework.storage.directory import Directory


def test_a_claimed_attempt(tiny_shards: Path, tmp_path: Path) -> None:
    words = ["mesh.dp=2", "train.steps=4", "checkpoint.every=2", "watch.probe_every=2"]
    recipe, path = write_recipe(tmp_path, tiny_shards, words), tmp_path / "run"
    store = Directory(str(path / "checkpoints"))
    assert [claim_attempt(path, store), claim_attempt(path, store)] == [0, 1]
    begin = time.time()
    assert pool.run_ranks(attempt_ranks.supervised, 2, recipe, [], 1) == [Verdict("done", 4)] * 2
    assert sorted(folder.name for folder in (path / "attempts").glob("0*")) == ["0000", "0001"]
    assert sorted(store.list("fence/")) == ["fence/0000.json", "fence/0001-start.json", "fence/0001.json"]
    assert (path / "attempts/0001/recipe.yaml").is_file() and (path / "attempts/0001/verdict.json").is_file()
    assert list((path / "attempts/0001/logs").iterdir()) == [], "the launcher has the logs"

    beat = read_heartbeat(Run(path, 1))
    assert beat is not None
    assert (beat.phase, beat.step, beat.last, beat.resumed, beat.saved) == ("end", 4, 4, 0, 4)
    assert begin < beat.saved_at <= beat.time < time.time()
    assert list(beat.seconds) == ["import", "init", "build", "load", "first_step", "step", "save", "end"]
    assert 5 < beat.seconds["import"] < 5 + time.time() - begin
    line = json.loads((path / "metrics.jsonl").read_text().splitlines()[2])
    assert line["step"] == 3 and beat.loss == line["loss"], "losses are read a step late"
    assert len(beat.compute) == len(beat.waited) == 2
    assert all(0 < seconds < 1 for seconds in beat.compute) and all(seconds >= 0 for seconds in beat.waited)
    for rank in range(2):
        assert "attempt_ranks.py" in stack_file(Run(path, 1), rank).read_text()


@pytest.mark.parametrize("every", [50, 3], ids=["step", "save"])
def test_a_rank_that_hangs_is_an_error_on_the_others(tiny_shards: Path, tmp_path: Path, every: int) -> None:
    """After watch.step seconds, although starting may take longer; and before the launcher does anything. The save that
    it takes part in gets watch.save.
    """
    words = ["mesh.dp=2", "train.steps=50", "watch.step=3", "watch.start=60", "watch.save=2"]
    words += [f"checkpoint.every={every}"]
    recipe = write_recipe(tmp_path, tiny_shards, words)
    processes, pipes = pool.start(attempt_ranks.hang, 2, (recipe, [], 3))
    try:
        assert pipes[0].poll(60)
        status, (kind, seconds, trace) = pipes[0].recv()
    finally:
        pool.stop(processes)
    assert (status, kind) == ("ok", "lost_peer"), trace
    assert 2.5 < seconds < 30
    assert os.path.exists(tmp_path / "run/attempts/0000/heartbeat.json")


def test_a_stop_before_the_first_step(tiny_shards: Path, tmp_path: Path) -> None:
    """Of one rank, agreed on by all: nothing is trained, and nothing saved."""
    recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=2", "train.steps=50"])
    first, second = pool.run_ranks(attempt_ranks.stopped_early, 2, recipe, [])
    assert (first, second) == (Verdict("stopped", 0, signal.SIGTERM), Verdict("stopped", 0, signal.SIGUSR2))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert list((tmp_path / "run/checkpoints").glob("step-*")) == []
    verdict = json.loads((tmp_path / "run/attempts/0000/verdict.json").read_text())
    assert verdict == {"outcome": "stopped", "step": 0, "signal": signal.SIGTERM}
