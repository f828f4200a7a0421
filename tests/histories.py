"""Runs written by hand: a history, heartbeats and verdicts, of which a person can say how they are."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from framework.heartbeat import Heartbeat
from framework.history import Event, History
from framework.launch.queue import JobState
from framework.run import Run, Verdict, open_attempt


class Board:
    """A scheduler that says what it was told to, and remembers what was cancelled."""

    def __init__(self, *known: JobState) -> None:
        self.known = {state.job: state for state in known}
        self.cancelled: list[str] = []
        self.warned: list[str] = []

    def job(self, job_id: str) -> JobState | None:
        return self.known.get(job_id)

    def jobs(self) -> list[JobState]:
        return list(self.known.values())

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)

    def warn(self, job_id: str) -> None:
        self.warned.append(job_id)


def write_run(
    path: Path,
    events: list[Event],
    beats: list[Heartbeat] | None = None,
    verdicts: dict[int, tuple[Verdict, float]] | None = None,
) -> Path:
    """A run directory with these inside."""
    (path / "attempts").mkdir(parents=True)
    for event in events:
        History(path).add(event)
    for beat in beats or []:
        open_attempt(path, beat.attempt)
        (Run(path, beat.attempt).attempt_path / "heartbeat.json").write_text(json.dumps(asdict(beat)))
    for number, (verdict, closed) in (verdicts or {}).items():
        open_attempt(path, number)
        Run(path, number).write_verdict(verdict)
        os.utime(Run(path, number).attempt_path / "verdict.json", (closed, closed))
    return path


# A job that waits 100 s, is checked for 30 s, and whose first attempt dies at step 130 after a save at 100; the second
# goes on there in the same job and runs.
LAUNCHED = [
    Event("submitted", 1000.0, job="7", cluster="lab"),
    Event("started", 1100.0, job="7", restart=0, nodes=("node0", "node1")),
    Event("launched", 1130.0, job="7", attempt=0, nodes=("node0", "node1"), ranks=4),
]
DIED = Heartbeat(
    attempt=0,
    phase="step",
    time=1466.0,
    since=1465.0,
    step=130,
    last=1000,
    saved=100,
    saved_at=1400.0,
    loss=0.5,
    step_seconds=2.0,
    tokens_per_second=5000.0,
    # From 1135: 5 s after the launch. The first step takes 22 s, 20 of them beyond a usual one of 2.
    seconds={"import": 10.0, "init": 5.0, "build": 15.0, "load": 10.0, "first_step": 22.0, "step": 258.0, "save": 10.0},
)
RESTARTED = [
    Event("ended", 1500.0, job="7", attempt=0, outcome="retry", reason="rank 3 was killed", step=100, node="node1"),
    Event("excluded", 1500.5, node="node1", reason="rank 3 was killed"),
    Event("launched", 1510.0, job="7", attempt=1, nodes=("node0", "node2"), ranks=4),
]
RUNS = Heartbeat(
    attempt=1,
    phase="step",
    time=1620.0,
    since=1619.0,
    step=131,
    last=1000,
    resumed=100,
    loss=0.25,
    step_seconds=2.0,
    tokens_per_second=6000.0,
    seconds={"import": 10.0, "init": 5.0, "build": 5.0, "load": 5.0, "first_step": 12.0, "step": 62.0, "observe": 9.0},
    compute=(1.0, 1.1, 1.0, 1.5),
)
