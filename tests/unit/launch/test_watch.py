"""Watching a step: the limit of each phase, what counts as silence, and who gave no sign of life."""

import json
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from framework.failure import Failure, write_failure
from framework.heartbeat import FILE, Heartbeat
from framework.launch import watch
from framework.launch.step import Step
from framework.launch.stragglers import Stragglers
from framework.launch.watch import limit_of, position, watch_step
from framework.programs.config import WatchConfig
from framework.run import Run, open_attempt
from framework.stacks import stack_file

pytestmark = pytest.mark.alone  # waits are timed

LIMITS = WatchConfig(start=100.0, step=10.0, save=50.0)
BEAT = Heartbeat(attempt=0, phase="step", time=1000.0, since=1000.0)


@pytest.mark.parametrize(
    ("phase", "limit"),
    [(p, 100.0) for p in ("import", "init", "build", "load", "first_step")]
    + [("step", 10.0), ("observe", 10.0), ("save", 50.0), ("end", 50.0)],
)
def test_each_phase_has_its_limit(phase: str, limit: float) -> None:
    assert limit_of(replace(BEAT, phase=phase), LIMITS) == (phase, limit)  # type: ignore[arg-type]


def test_a_start_is_one_piece_until_there_was_a_step() -> None:
    """After a rollback a start's phases come again, long after the launch."""
    assert position(None) == position(replace(BEAT, phase="init", since=3.0)) == position(replace(BEAT, phase="load"))
    again = replace(BEAT, phase="load", seconds={"step": 9.0})
    assert position(again) != position(None) and position(again) != position(replace(again, since=1001.0))
    assert position(BEAT) != position(replace(BEAT, step=1, since=1001.0))


def step_of(run: Run, command: str) -> Step:
    client = subprocess.Popen(["bash", "-c", command])
    (run.attempt_path / "logs" / "srun.log").touch()
    return Step("1", client, ("a", "b"), 2, run.attempt_path / "logs")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    open_attempt(tmp_path, 0)
    run = Run(tmp_path, 0)
    run.failures.mkdir()
    return run


def watched(step: Step, run: Run, limits: WatchConfig = LIMITS) -> watch.Seen:
    return watch_step(step, run, limits, Stragglers(step.hosts, limit=0.0, times=1), swap=False, look=lambda: None)


def test_a_step_that_ends_by_itself(run: Run) -> None:
    assert watched(step_of(run, "exit 3"), run) == watch.Seen()


def test_a_hang_is_ended_and_names_who_is_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "DUMP", 0.3)
    (run.attempt_path / FILE).write_text(json.dumps(asdict(BEAT)))
    for rank in (0, 1, 3):
        file = stack_file(run, rank)
        file.parent.mkdir(exist_ok=True)
        file.write_text("Thread 0x1\n")
    step = step_of(run, "sleep 60")
    hang = watched(step, run, replace(LIMITS, step=1.0)).hang
    assert hang is not None and step.client.returncode is not None
    assert (hang.phase, hang.limit, dict(hang.silent)) == ("step", 1.0, {2: "b"}) and 1 < hang.seconds < 10


def test_the_heartbeat_of_an_older_attempt_isnt_this_ones(run: Run) -> None:
    (run.attempt_path / FILE).write_text(json.dumps(asdict(replace(BEAT, attempt=7))))
    assert watched(step_of(run, "sleep 2"), run, replace(LIMITS, step=0.5)).hang is None


def test_a_heartbeat_that_isnt_whole_is_none(run: Run) -> None:
    (run.attempt_path / FILE).write_text('{"attempt": 0, "pha')
    assert watched(step_of(run, "sleep 0.7"), run).hang is None


def test_ranks_that_linger_after_a_failure_are_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LINGER", 0.5)
    write_failure(run.failures, Failure(1, "error: x", 1, time.time()))
    step, begin = step_of(run, "sleep 60"), time.monotonic()
    assert watched(step, run).hang is None
    assert step.client.returncode is not None and time.monotonic() - begin < 10
