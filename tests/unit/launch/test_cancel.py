"""Ending runs from outside: a job of a stand-in scheduler, and a real process that holds a run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from histories import DIED, LAUNCHED, Board, write_run

from framework.cli import app
from framework.history import Event, History
from framework.launch.cancel import cancel
from framework.launch.facts import read_facts
from framework.launch.queue import GONE, JobState, NoScheduler

pytestmark = pytest.mark.alone  # waits are timed

HOLDS = """
import signal, sys, time
from pathlib import Path
from framework.run import Run, Verdict, lock_run
lock_run(Path(sys.argv[1]))
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
print("held", flush=True)
end = time.monotonic() + 20
while not got:
    assert time.monotonic() < end
    time.sleep(0.01)
Run(Path(sys.argv[1]), 0).write_verdict(Verdict("stopped", 130, got[0]))
"""
# Stand-ins of the commands, which write down how they were called.
SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/calls
if [ "$4" = 9 ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
echo "JobId=$4 JobName=a JobState=RUNNING Reason=None StartTime=2026-11-26T17:00:00 NodeList=node[0-1] NumNodes=2"
"""
SQUEUE = """#!/bin/sh
echo "7|RUNNING|None|node[0-1]|run"
echo "8|PENDING|Resources||a|b"
"""
SCANCEL = """#!/bin/sh
echo "scancel $@" >> {folder}/calls
"""


def call(*words: str) -> None:
    """The command, in this process."""
    app(list(words), standalone_mode=False)


def test_a_job_that_runs(tmp_path: Path) -> None:
    """The history is told before the scheduler is."""
    path = write_run(tmp_path / "run", LAUNCHED, [DIED])
    board = Board(JobState("7", "RUNNING"))
    lines = list(cancel(read_facts(path, 1470.0, board), board))
    assert lines[0] == "job 7 is being cancelled: its ranks finish their step, save and end"
    assert (board.warned, board.cancelled) == (["7"], [])
    assert [(event.event, event.job) for event in History(path).events()][-1] == ("cancelled", "7")


def test_a_job_that_waits(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", LAUNCHED[:1])
    board = Board(JobState("7", "PENDING"))
    assert list(cancel(read_facts(path, 1010.0, board), board)) == [
        "job 7 is cancelled; no step was running, so nothing was to be saved"
    ]


def test_nothing_to_cancel(tmp_path: Path) -> None:
    ended = [*LAUNCHED, Event("finished", 1500.0, job="7", outcome="done")]
    held = write_run(tmp_path / "c", [], [DIED])
    (held / "attempts/lock").write_text("process 12 on another")
    for path, board, message in (
        (write_run(tmp_path / "a", ended, [DIED]), Board(), "no job and no process of this machine holds"),
        (write_run(tmp_path / "b", LAUNCHED, [DIED]), Board(JobState("7", GONE)), r"job 7 of .* is over \(GONE\)"),
        (held, NoScheduler(), "process 12 on another, another machine: cancel it there"),
        (write_run(tmp_path / "d", LAUNCHED, [DIED]), NoScheduler(), "no scheduler answers here"),
    ):
        before = History(path).events()
        with pytest.raises(ValueError, match=message):
            list(cancel(read_facts(path, 1470.0, board), board))
        assert History(path).events() == before


def test_a_run_that_a_process_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets SIGTERM, saves and ends; a second cancel finds nothing."""
    path = write_run(tmp_path / "run", [], [DIED])
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        call("cancel", str(path))
        assert f"process {process.pid} of this machine holds {path}; it was sent SIGTERM" in capsys.readouterr().out
        assert process.wait(timeout=10) == 0
    facts = read_facts(path, time.time())
    assert facts.newest is not None and facts.newest.verdict is not None and facts.newest.verdict.signal == 15
    command = [sys.executable, "-m", "framework.cli", "cancel", str(path)]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: nothing to cancel: no job and no process of this machine holds {path}\n"


LAUNCHES = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
signal.signal(signal.SIGTERM, lambda number, frame: rank.send_signal(number))
sys.exit(rank.wait() or 7)
"""


def test_the_launcher_of_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It passes the signal on to all its ranks. Here a file by the command's name starts one."""
    path = write_run(tmp_path / "run", [], [DIED])
    (tmp_path / "cuboid").write_text(LAUNCHES)
    command = [sys.executable, str(tmp_path / "cuboid"), HOLDS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        call("cancel", str(path))
        assert f"process {process.pid}, which started it, was sent SIGTERM" in capsys.readouterr().out
        assert process.wait(timeout=10) == 7


def test_the_verbs_with_slurms_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins in front of PATH: status sees the queue, cancel calls scancel."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    path = write_run(tmp_path / "runs/run", LAUNCHED, [DIED])
    gone = write_run(tmp_path / "runs/gone", [Event("submitted", 1000.0, job="9")])
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    call("status", "--runs", str(tmp_path / "runs"))
    found = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in found[1:3]] == [[str(gone), "LOST"], [str(path), "SILENT"]]
    assert found[3:] == ["jobs of yours that are no run's here:", "  8  PENDING  a|b  Resources"]
    call("cancel", str(path))
    calls = (folder / "calls").read_text().splitlines()
    assert calls == ["show job -o 9", "show job -o 7", "show job -o 7", "scancel --signal=USR2 7"]
