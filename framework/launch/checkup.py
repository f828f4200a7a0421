"""The health checks of an allocation's nodes, as a step before the ranks' (health.py is what each node does)."""

import time
from collections.abc import Sequence
from pathlib import Path

from framework.environment import Allocation
from framework.launch.health import NodeReport, read_reports, step_seconds, write_request
from framework.launch.job import Job
from framework.launch.script import python_of
from framework.launch.step import start_step
from framework.launch.variables import rank_environment
from framework.launch.verdict import tail

LOOK = 0.05


def check_nodes(job: Job, allocation: Allocation, nodes: Sequence[str]) -> list[NodeReport]:
    """What every node says of itself; one that says nothing has a problem. Raises OSError where none says anything."""
    cluster, folder = job.cluster, Path(job.folder) / "health"
    health = cluster.health
    write_request(folder, health, cluster.scratch, time.time(), nodes, gpus=cluster.gpus)
    tasks = cluster.ranks_per_node if health.level == "full" else 1
    step = start_step(
        job,
        allocation.job,
        tuple(nodes),
        (python_of(cluster), "-m", "framework.cli", "health", str(folder)),
        tasks_a_node=tasks,
        logs=folder / "logs",
        own=rank_environment(cluster, allocation.user),
        tolerant=True,
    )
    deadline = time.monotonic() + step_seconds(health)
    while step.client.poll() is None and time.monotonic() < deadline:
        time.sleep(LOOK)
    if step.client.poll() is None:
        step.end()
    reports = read_reports(folder, nodes)
    if step.client.returncode and not any((folder / f"{node}.json").is_file() for node in nodes):
        raise OSError(f"the health checks didn't run on any node: {tail(step.said())}")
    return reports
