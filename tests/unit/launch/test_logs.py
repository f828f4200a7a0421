"""Logs of ranks and supervisors, on into what comes next."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from histories import DIED, LAUNCHED, write_run

from framework.history import Event, History
from framework.launch.logs import LogRequest, check_request, follow_log, print_log
from framework.run import open_attempt

pytestmark = pytest.mark.alone  # waits are timed


def write_log(run: Path, attempt: int, name: str, text: str) -> None:
    open_attempt(run, attempt)
    with (run / f"attempts/{attempt:04}/logs/{name}").open("a") as file:
        file.write(text)


def test_the_newest_log_is_printed(tmp_path: Path) -> None:
    for attempt, text in ((0, "old\n"), (1, "new\ncut off")):
        write_log(tmp_path, attempt, "rank-0.log", text)
    write_log(tmp_path, 1, "rank-7.log", "eight\n")
    write_log(tmp_path, 1, "rank-00007.log", "seven\n")
    (tmp_path / "attempts/0002").mkdir()  # which has none yet
    assert list(print_log(tmp_path, LogRequest())) == ["new", "cut off"]
    assert list(print_log(tmp_path, LogRequest(attempt=0))) == ["old"]
    assert list(print_log(tmp_path, LogRequest(rank=7))) == ["seven", "eight"]


def test_the_supervisors_log(tmp_path: Path) -> None:
    for folder, job in (("0000", "99"), ("0001", "100")):
        (tmp_path / "jobs" / folder).mkdir(parents=True)
        (tmp_path / "jobs" / folder / f"{job}.log").write_text(f"job {job}\n")
    assert list(print_log(tmp_path, LogRequest(rank=None))) == ["job 100"]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    write_log(tmp_path, 0, "rank-1.log", "")
    write_log(tmp_path, 0, "rank-3.log", "")
    for request, message in (
        (
            LogRequest(0),
            "no log of rank 0: there are logs of 2 ranks, 1 to 3; rank 0 of a run that was started by hand",
        ),
        (LogRequest(7), "no log of rank 7: there are logs of 2 ranks, 1 to 3$"),
        (LogRequest(1, attempt=4), "--attempt 4: .* has no such attempt; it has 0$"),
        (LogRequest(None), "no supervisor's log"),
    ):
        with pytest.raises(ValueError, match=message):
            check_request(tmp_path, request)


class Writer(threading.Thread):
    """Does the next of its things whenever the reader has got the line before."""

    def __init__(self, seen: list[str], things: list[tuple[str, Callable[[], None]]]) -> None:
        super().__init__(daemon=True)
        self.seen, self.things = seen, things

    def run(self) -> None:
        for line, thing in self.things:
            while line not in self.seen:
                time.sleep(0.005)
            thing()


def test_following_goes_on_into_the_next_attempt(tmp_path: Path) -> None:
    """A line that is written in two parts is one; what was written before the next attempt began isn't lost."""
    seen: list[str] = []
    over = threading.Event()
    write_log(tmp_path, 0, "rank-0.log", "one\n")

    def next_attempt() -> None:
        write_log(tmp_path, 0, "rank-0.log", "o\nlast words")
        write_log(tmp_path, 1, "rank-00000.log", "again\n")

    def end() -> None:
        write_log(tmp_path, 1, "rank-00000.log", "bye\n")
        over.set()

    things = [("one", lambda: write_log(tmp_path, 0, "rank-0.log", "two\ntw")), ("two", next_attempt), ("again", end)]
    Writer(seen, things).start()
    limit = time.monotonic() + 20
    follow = follow_log(tmp_path, LogRequest(), is_over=lambda: over.is_set() or time.monotonic() > limit, every=0.01)
    for line in follow:
        seen.append(line)
    first, second = "==> attempts/0000/logs/rank-0.log <==", "==> attempts/0001/logs/rank-00000.log <=="
    assert seen == [first, "one", "two", "two", "last words", second, "again", "bye"]


def test_following_one_attempt_stays_there(tmp_path: Path) -> None:
    write_log(tmp_path, 0, "rank-0.log", "one\n")
    write_log(tmp_path, 1, "rank-0.log", "two\n")
    found = list(follow_log(tmp_path, LogRequest(attempt=0), is_over=lambda: True, every=0.01))
    assert found == ["==> attempts/0000/logs/rank-0.log <==", "one"]


def follow(run: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "framework.cli", "logs", str(run), "-f"]
    environment = os.environ | {"PATH": str(run)}  # where there is a Slurm, it doesn't know the job
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_the_verb_follows_until_the_run_ends_or_ctrl_c(tmp_path: Path) -> None:
    """One run ends by its history; another goes on when the reader has had enough."""
    now = time.time()
    events = [replace(event, time=now - 60) for event in LAUNCHED]
    beat = replace(DIED, time=now, since=now - 1)
    runs = [write_run(tmp_path / name, events, [beat]) for name in ("ends", "goes-on")]
    for run in runs:
        write_log(run, 0, "rank-0.log", "hello\n")
    ends, goes_on = (follow(run) for run in runs)
    for process in (ends, goes_on):
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)][1] == "hello\n"
    goes_on.send_signal(signal.SIGINT)
    History(runs[0]).add(Event("finished", time.time(), job="7", outcome="done"))
    assert goes_on.communicate(timeout=10) == ("", "") and goes_on.returncode == 130
    assert ends.communicate(timeout=10) == ("", "") and ends.returncode == 0
