"""`cuboid status`, `logs` and `cancel` on a real Slurm, with a run of ranks that train nothing."""

from pathlib import Path

import pytest
from light_jobs import light_run
from slurm_lab import Lab

from framework.cli import app
from framework.history import now
from framework.launch.facts import read_facts
from framework.launch.logs import LogRequest, print_log
from framework.launch.queue import GONE, SlurmQueue
from framework.launch.status import Status, status_of


def look(path: Path) -> Status:
    return status_of(read_facts(path, now(), SlurmQueue()))


def test_a_run_that_restarts_and_is_cancelled(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = light_run(lab, tmp_path, {"steps": 2000})
    run.submit()
    run.wait_step(8)
    run.kill(3)
    run.wait_step(12, attempt=1)
    found = look(run.path)
    assert found.state in ("RUNNING", "SAVING")
    assert (found.job, found.restarts, found.requeues) == (run.id, 1, 0)
    assert (found.attempt, found.ranks, found.nodes) == (1, 4, run.hosts)
    assert found.reason is not None and "Killed" in found.reason
    account = found.account
    assert sum(account.parts.values()) == pytest.approx(account.wall)
    assert account.num_steps >= 12 and account.parts["steps"] > 0
    (restart,) = account.restarts
    assert 0 < restart.seconds < account.wall and restart.lost >= 0

    app(["status", "--runs", str(tmp_path)], standalone_mode=False)
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[0] == str(run.path) and line.split()[-2] == run.id
    assert any("attempt 1: 4 ranks on" in line for line in print_log(run.path, LogRequest(rank=None)))
    for rank in range(4):
        path = run.run.attempt_path / f"logs/rank-{rank:05}.log"
        assert list(print_log(run.path, LogRequest(rank))) == path.read_text().splitlines()

    app(["cancel", str(run.path)], standalone_mode=False)
    assert f"job {run.id} is being cancelled" in capsys.readouterr().out
    assert run.wait_finished().outcome == "cancelled"
    verdict = run.verdict()
    assert verdict is not None and verdict.outcome == "stopped"
    ended = look(run.path)
    assert (ended.state, ended.checkpoint) == ("CANCELLED", verdict.step)
    with pytest.raises(ValueError, match="nothing to cancel"):
        app(["cancel", str(run.path)], standalone_mode=False)


def test_jobs_that_wait_and_jobs_that_nobody_knows(lab: Lab) -> None:
    lab.enter()
    words = ("sbatch", "--parsable", "--hold", "-J", "a b", "-o", "/dev/null", "--wrap", "true")
    job = lab.run(*words).strip()
    scheduler = SlurmQueue()
    waits = scheduler.job(job)
    assert waits is not None and (waits.state, waits.reason) == ("PENDING", "JobHeldUser")
    assert [(each.state, each.name) for each in scheduler.jobs() if each.job == job] == [("PENDING", "a b")]
    scheduler.cancel(job)
    over = scheduler.job(job)
    assert over is not None and over.state == "CANCELLED"
    unknown = scheduler.job("99999")
    assert unknown is not None and unknown.state == GONE
