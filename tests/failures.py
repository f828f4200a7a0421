"""Every kind of failure, on a real Slurm, with ranks that train nothing: each ends in the state that slurm/README.md
says, and no step is lost or done twice beyond what was saved.

Each is a function of a lab and a folder, on nodes of its own: tests/slurm/test_failures.py runs several at once, as
most of their time is waiting.
"""

import os
import re
import signal
import time
from pathlib import Path
from types import MappingProxyType
from typing import Final

from light_jobs import LightRun, light_run
from lost_nodes import (
    lost_node_of_an_elastic_run,
    lost_node_of_the_supervisor,
    lost_node_with_a_spare,
    lost_node_without_a_spare,
    preempted_after_a_swap,
    zombies_commit_nothing,
)
from slurm_lab import Lab

from framework.launch.config import HealthConfig
from framework.launch.submit import submit_all
from framework.programs.config import WatchConfig


def is_whole(run: LightRun, steps: int) -> bool:
    """Whether every step is there once, and the sum over all of them came through every checkpoint."""
    expected = [sum(i**2 for i in range(1, step + 1)) for step in range(1, steps + 1)]
    return run.steps() == list(range(1, steps + 1)) and run.totals() == expected


def done(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 12})
    run.submit()
    assert run.wait_finished().outcome == "done"
    assert is_whole(run, 12)
    assert lab.wait_state(run.id, "COMPLETED")


def killed_rank_is_restarted_inside_the_allocation(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 60})
    run.submit()
    run.wait_step(8)
    killed_at, node, begin = run.step(), run.kill(3), time.monotonic()
    run.wait_step(1, attempt=1)
    assert time.monotonic() - begin < 15
    assert run.wait_finished().outcome == "done"
    ended = run.events("ended")[0]
    assert (ended.outcome, ended.node) == ("retry", node) and "Killed" in str(ended.reason)
    assert not run.events("requeued") and is_whole(run, 60)
    assert run.resumed >= killed_at - 5  # one save interval


def preemption(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 150})
    run.submit()
    run.wait_step(10)
    told = time.time()
    high = lab.run(
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-w",
        ",".join(run.hosts),
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 1",
    )
    run.wait(lambda: bool(run.events("requeued")))
    verdict, ended = run.verdict(0), run.last("ended")
    assert verdict is not None and verdict.signal == signal.SIGUSR2 and verdict.step == ended.step
    assert ended.outcome == "preempted" and ended.time - told < 3 * (0.05 + 2) + 1  # the scheduler looks once a second
    lab.wait_state(high, {"RUNNING", "COMPLETED"})
    assert run.wait_finished().outcome == "done"
    assert run.resumed == verdict.step and is_whole(run, 150)
    second = run.events("started")[1]
    assert second.restart == 1


def requeued_by_an_operator(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 120})
    run.submit()
    run.wait_step(10)
    lab.run("scontrol", "requeue", run.id)
    assert run.wait_finished().outcome == "done"
    verdict = run.verdict(0)
    assert verdict is not None and verdict.signal == signal.SIGTERM
    assert run.resumed == verdict.step and is_whole(run, 120)
    assert len(run.events("requeued")) == 1


def time_limit(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 900}, time="00:01:00", notice=55)
    run.submit()
    run.wait(lambda: bool(run.events("requeued")), 60)
    verdict, ended = run.verdict(0), run.last("ended")
    assert verdict is not None and verdict.signal == signal.SIGUSR2 and ended.step == verdict.step > 0
    run.wait_step(verdict.step + 1, attempt=1)
    lab.run("scancel", run.id)
    assert run.wait_finished().outcome == "cancelled"


def hang(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 80}, watch=WatchConfig(start=30, step=3, save=20))
    run.submit()
    run.wait_step(8)
    node = run.kill(2, signal.SIGSTOP)
    assert run.wait_finished().outcome == "done"
    ended = run.events("ended")[0]
    assert (ended.kind, ended.node) == ("hang", node) and f"rank 2 on {node}" in str(ended.reason)
    heard = re.search(r"nothing heard for (\d+) s", str(ended.reason))
    assert heard is not None and 3 <= int(heard[1]) <= 3 * 3
    stacks = sorted(path.name for path in (run.path / "attempts" / "0000" / "stacks").iterdir() if path.stat().st_size)
    assert stacks == ["rank-00000.txt", "rank-00001.txt", "rank-00003.txt"]
    assert "largest" in (run.path / "attempts" / "0000" / "stacks" / "rank-00000.txt").read_text()
    assert not run.events("requeued") and is_whole(run, 80)


def signal_during_a_save(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 30, "save": 1.0})
    run.submit()
    run.wait(lambda: (beat := run.beat()) is not None and beat.phase == "save")
    lab.run("scancel", "--signal=USR2", run.id)
    run.wait(lambda: bool(run.events("requeued")))
    verdict = run.verdict(0)
    assert verdict is not None and run.last("ended").outcome == "preempted"
    assert run.wait_finished().outcome == "done"
    assert run.resumed == verdict.step and is_whole(run, 30)


def script_error_at_start(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"error": "name 'modle' is not defined"})
    run.submit()
    finished = run.wait_finished()
    assert finished.outcome == "fatal" and "name 'modle' is not defined" in str(finished.reason)
    assert len(run.events("launched")) == 1 and not run.events("requeued")
    lab.wait_state(run.id, "FAILED")


def crash_loop(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"crash": 3})
    run.submit()
    finished = run.wait_finished()
    assert finished.outcome == "fatal" and "gave up after 4 failures" in str(finished.reason)
    assert "a made-up failure" in str(finished.reason)
    assert [event.kind for event in run.events("ended")] == ["crash"] * 4 and len(run.events("requeued")) == 1
    lab.wait_state(run.id, "FAILED")


def cancelled(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder)
    run.submit()
    run.wait_step(10)
    lab.run("scancel", run.id)
    finished, verdict = run.wait_finished(), run.verdict()
    assert finished.outcome == "cancelled" and verdict is not None
    assert f"every rank has saved step {verdict.step}" in str(finished.reason)
    lab.wait_state(run.id, "CANCELLED")
    assert len(run.events("started")) == 1


def signals_during_the_health_checks(lab: Lab, folder: Path) -> None:
    """They say nothing of the nodes."""
    health = HealthConfig(level="basic", disk=0.0, command="sleep 3")
    run = light_run(lab, folder, {"steps": 12}, health=health)
    run.submit()
    run.wait(lambda: bool(run.events("started")))
    time.sleep(1.5)
    lab.run("scancel", "--signal=USR2", run.id)
    run.wait(lambda: bool(run.events("launched")))
    assert run.wait_finished().outcome == "done"
    again = light_run(lab, folder / "again", {"steps": 12}, health=health)
    again.submit()
    again.wait(lambda: bool(again.events("started")))
    time.sleep(1.5)
    lab.run("scancel", again.id)
    assert again.wait_finished().outcome == "cancelled"
    assert not run.events("excluded") + again.events("excluded") and not (folder / "nodes.json").exists()


def killed_srun(lab: Lab, folder: Path) -> None:
    """Its ranks, which it leaves behind, don't live on beside those of the next attempt."""
    run = light_run(lab, folder, {"steps": 100})
    run.submit()
    run.wait_step(8)
    pids = [run.rank(rank)[0] for rank in range(4)]
    words = f"--nodelist={','.join(run.hosts)}\0".encode()
    script = f"{run.job.folder}/rank.sh\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if (command := read(path)).startswith(b"srun\0") and words in command and script in command:
            os.kill(int(path.parent.name), signal.SIGKILL)
    run.wait(lambda: len(run.events("launched")) == 2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert run.wait_finished().outcome == "done" and is_whole(run, 100)


def killed_supervisor(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 120})
    run.submit()
    run.wait_step(10)
    words = f"submitit.core._submit\0{run.job.folder}".encode()
    found = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if words in read(p)]
    for process in found:
        os.kill(process, signal.SIGKILL)
    assert run.wait_finished(90).outcome == "done" and len(found) == 1
    assert run.resumed >= 5 and len(run.events("started")) == 2 and is_whole(run, 120)


def read(path: Path) -> bytes:
    """What a file of /proc holds, nothing where its process has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def bad_node_is_excluded_and_remembered(lab: Lab, folder: Path) -> None:
    bad = folder / "bad"  # the node that is first to look
    command = f"mkdir {folder}/first 2>/dev/null && hostname >{bad}; sleep 0.2; "
    command += f"grep -vqx $(hostname) {bad} || (echo no GPU; exit 1)"
    run = light_run(lab, folder, {"steps": 12}, health=HealthConfig(level="basic", disk=0.0, command=command))
    run.submit()
    assert run.wait_finished(90).outcome == "done"
    excluded, name = run.last("excluded"), bad.read_text().strip()
    assert excluded.node == name and "no GPU" in str(excluded.reason)
    assert name not in run.hosts and is_whole(run, 12)
    assert name in (folder / "nodes.json").read_text()
    assert lab.job(run.id)["ExcNodeList"] == name


def slow_node_is_swapped(lab: Lab, folder: Path) -> None:
    health = HealthConfig(level="off", times=3)
    run = light_run(lab, folder, {"steps": 160, "slow": 1}, spare_nodes=1, health=health)
    run.submit()
    assert run.wait_finished(90).outcome == "done"
    slow = run.events("launched")[0].nodes[1]  # type: ignore[index]
    excluded, ended = run.last("excluded"), run.events("ended")[0]
    assert excluded.node == slow and "2.00 times as long as the others" in str(excluded.reason)
    assert (ended.outcome, ended.kind) == ("retry", "slow") and not run.events("requeued")
    assert slow not in run.hosts and is_whole(run, 160) and run.resumed == ended.step


def array_of_two(lab: Lab, folder: Path) -> None:
    """A sweep: one array, runs of their own, of which each comes back by itself."""
    runs = [light_run(lab, folder / name, {"steps": 100}, nodes=(1, 1)) for name in ("a", "b")]
    ids = submit_all([run.job for run in runs])
    assert [name.rpartition("_")[2] for name in ids] == ["0", "1"]
    for run, name in zip(runs, ids, strict=True):
        run.id = name
    runs[1].wait_step(10)
    lab.run("scancel", "--signal=USR2", ids[1])
    assert [run.wait_finished(90).outcome for run in runs] == ["done", "done"]
    assert [len(run.events("requeued")) for run in runs] == [0, 1]
    assert all(is_whole(run, 100) for run in runs)


def every_node_is_bad(lab: Lab, folder: Path) -> None:
    """A check that fails everywhere: no node is to blame alone, and nothing goes round for ever."""
    health = HealthConfig(level="basic", disk=0.0, command="echo no module; false")
    run = light_run(lab, folder, {"steps": 12}, nodes=(1, 1), health=health)
    run.submit()
    finished = run.wait_finished(90)
    assert finished.outcome == "fatal" and "gave up after 2 failures" in str(finished.reason)
    assert "no module" in str(finished.reason) and not run.events("launched")
    assert len(run.events("started")) == 2 and not (folder / "nodes.json").exists()


SCENARIOS: Final = MappingProxyType(
    {
        each.__name__: each
        for each in (
            lost_node_without_a_spare,
            zombies_commit_nothing,
            time_limit,
            lost_node_of_the_supervisor,
            lost_node_with_a_spare,
            lost_node_of_an_elastic_run,
            bad_node_is_excluded_and_remembered,
            preempted_after_a_swap,
            every_node_is_bad,
            signals_during_the_health_checks,
            killed_srun,
            killed_supervisor,
            slow_node_is_swapped,
            array_of_two,
            preemption,
            requeued_by_an_operator,
            signal_during_a_save,
            hang,
            killed_rank_is_restarted_inside_the_allocation,
            crash_loop,
            done,
            script_error_at_start,
            cancelled,
        )
    }
)
