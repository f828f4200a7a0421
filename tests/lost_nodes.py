"""Nodes that go, with and without one to take their place. See failures.py."""

import time
from pathlib import Path

from light_jobs import light_run
from slurm_lab import Lab


def lost_node_with_a_spare(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 900}, spare_nodes=1)
    run.submit()
    run.wait_step(10)
    hosts = run.hosts
    begin = time.monotonic()
    lab.lose_node(hosts[1])
    try:
        run.wait_step(1, attempt=1)
        again = run.last("launched").nodes
        assert len(again) == 2 and hosts[1] not in again
        assert run.last("excluded").node == hosts[1] and not run.events("requeued")
        print(f"swapped after {time.monotonic() - begin:.1f} s")
        lab.run("scancel", run.id)
        assert run.wait_finished().outcome == "cancelled"
    finally:
        lab.start_node(hosts[1])
    lab.wait_node(hosts[1], "idle")


def preempted_after_a_swap(lab: Lab, folder: Path) -> None:
    """A job that has lost a node comes back too: Slurm takes long to change such a job, and it isn't held for that."""
    run = light_run(lab, folder, {"steps": 400}, spare_nodes=1)
    run.submit()
    run.wait_step(10)
    lost = run.hosts[1]
    lab.lose_node(lost)
    try:
        run.wait_step(1, attempt=1)
        lab.run("scancel", "--signal=USR2", run.id)
        run.wait(lambda: len(run.events("started")) == 2, 60)
        run.wait_step(1, attempt=2)
        lab.run("scancel", run.id)
        assert run.wait_finished().outcome == "cancelled"
    finally:
        lab.start_node(lost)
    lab.wait_node(lost, "idle")


def lost_node_of_an_elastic_run(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 900}, nodes=(1, 2))
    run.submit()
    run.wait_step(10)
    hosts = run.last("launched").nodes
    assert hosts is not None and run.last("launched").ranks == 4
    lab.lose_node(hosts[1])
    try:
        run.wait_step(1, attempt=1)
        assert (run.last("launched").nodes, run.last("launched").ranks) == (hosts[:1], 2)
        lab.run("scancel", run.id)
        assert run.wait_finished().outcome == "cancelled"
    finally:
        lab.start_node(hosts[1])
    lab.wait_node(hosts[1], "idle")


def lost_node_of_the_supervisor(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 900}, spare_nodes=1)
    run.submit()
    run.wait_step(10)
    first = run.last("started").nodes
    assert first is not None
    lab.lose_node(first[0])
    try:
        run.wait(lambda: len(run.events("started")) == 2, 60)
        run.wait_step(1, attempt=1)
        again = run.last("launched").nodes
        assert first[0] not in again
        assert first[0] in str(run.last("requeued").reason)
        lab.run("scancel", run.id)
        assert run.wait_finished().outcome == "cancelled"
    finally:
        lab.start_node(first[0])
    lab.wait_node(first[0], "idle")


def lost_node_without_a_spare(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 900})
    run.submit()
    run.wait_step(10)
    hosts = run.hosts
    lab.lose_node(hosts[1])
    try:
        run.wait(lambda: len(run.events("started")) == 2, 60)
        run.wait_step(1, attempt=1)
        again = run.last("launched").nodes
        assert hosts[1] not in again
        lab.run("scancel", run.id)
        assert run.wait_finished().outcome == "cancelled"
    finally:
        lab.start_node(hosts[1])
    lab.wait_node(hosts[1], "idle")


def zombies_commit_nothing(lab: Lab, folder: Path) -> None:
    run = light_run(lab, folder, {"steps": 5000}, nodes=(1, 1))
    run.submit()
    run.wait_step(10)
    hosts = run.hosts
    pids = [run.rank(rank)[0] for rank in range(2)]
    lab.kill_node(hosts[0])
    try:
        run.wait(lambda: len(run.events("launched")) == 2, 60)
        failure = run.path / "attempts" / "0000" / "failures" / "rank-0.json"
        run.wait(failure.exists)
        assert "attempt 1 has taken over" in failure.read_text()
        run.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        run.wait_step(1, attempt=1)
        start = run.resumed
        late = [path.name for path in (run.path / "checkpoints").glob("step-*-0000/manifest.json")]
        folders = [path.parent.name for path in (run.path / "checkpoints").glob("step-*-0000/manifest.json")]
        assert late and max(int(name.split("-")[1]) for name in folders) == start
        lab.run("scancel", run.id)
        assert run.wait_finished().outcome == "cancelled"
    finally:
        lab.start_node(hosts[0])
    lab.wait_node(hosts[0], "idle")
