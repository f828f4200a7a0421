"""The heart, by a clock that the test moves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework import heartbeat
from framework.heartbeat import Heart, read_heartbeat
from framework.run import Run, open_attempt


class Clock:
    now = 100.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def test_phases_and_steps(tmp_path: Path, clock: Clock) -> None:
    open_attempt(tmp_path, 3)
    run, heart = Run(tmp_path, 3), Heart(begin=90.0, writes=True)
    assert read_heartbeat(run) is None
    heart.attach(run)
    beat = read_heartbeat(run)
    assert beat is not None and (beat.attempt, beat.phase, beat.since, beat.time) == (3, "import", 90.0, 100.0)
    clock.now = 102.0
    heart.enter("init")
    clock.now = 105.0
    heart.enter("first_step")
    heart.resumed(20, last=30)
    clock.now = 109.0
    heart.step(21, seconds=4.0, tokens_per_second=2.0, loss=0.5)
    clock.now = 109.5
    heart.step(22, seconds=0.5, tokens_per_second=16.0, loss=0.25)
    beat = read_heartbeat(run)
    assert beat is not None and beat.step == 21, "at most one write a second"
    assert beat.seconds == {"import": 12.0, "init": 3.0, "first_step": 4.0}
    heart.saved(22, 109.4)
    heart.measured((0.1, 0.2), (0.0, 0.5))
    clock.now = 110.5
    heart.enter("save")
    clock.now = 112.0
    heart.enter("step")
    clock.now = 112.5
    heart.step(23, seconds=0.5, tokens_per_second=16.0, loss=float("nan"))
    clock.now = 114.0
    heart.step(24, seconds=1.5, tokens_per_second=16.0, loss=float("inf"))
    text = (run.attempt_path / "heartbeat.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text)["loss"] is None
    beat = read_heartbeat(run)
    assert beat is not None and (beat.step, beat.resumed, beat.last, beat.saved, beat.saved_at) == (
        24,
        20,
        30,
        22,
        109.4,
    )
    assert (beat.compute, beat.waited) == ((0.1, 0.2), (0.0, 0.5))
    assert beat.seconds == {"import": 12.0, "init": 3.0, "first_step": 4.0, "step": 3.5, "save": 1.5}
    assert beat.since == 114.0


def test_other_ranks_keep_the_time_only(tmp_path: Path, clock: Clock) -> None:
    open_attempt(tmp_path, 0)
    heart = Heart(begin=90.0, writes=False)
    heart.attach(Run(tmp_path, 0))
    heart.enter("build")
    assert heart.state.phase == "build" and heart.state.seconds == {"import": 10.0}
    assert [path.name for path in (tmp_path / "attempts/0000").iterdir()] == ["logs"]


def test_an_earlier_attempts_heartbeat_is_none_of_this_one(tmp_path: Path, clock: Clock) -> None:
    for number in (0, 1):
        open_attempt(tmp_path, number)
    Heart(begin=90.0, writes=True).attach(Run(tmp_path, 0))
    text = (tmp_path / "attempts/0000/heartbeat.json").read_text()
    (tmp_path / "attempts/0001/heartbeat.json").write_text(text)
    assert read_heartbeat(Run(tmp_path, 0)) is not None and read_heartbeat(Run(tmp_path, 1)) is None


def test_when_a_process_began() -> None:
    code = "import time; time.sleep(0.5); from framework.heartbeat import process_began; print(process_began())"
    begin = time.time()
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert begin - 0.1 < began < begin + 0.4, "the time until its first line counts too"
