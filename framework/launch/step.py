"""One step of a job: tasks that srun starts on some of its nodes."""

import random
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from framework.environment import step_variables
from framework.launch import slurm
from framework.launch.job import Job
from framework.launch.script import srun_words

PORTS = range(20000, 32768)
SRUN_LOG = "srun.log"
NUMBER = "step"
GRACE = 30.0  # seconds for srun to end once its tasks are killed
CLEARED = 3.0  # seconds for the scheduler to see that; it keeps the step of a lost node until it sees that too


@dataclass(frozen=True)
class Step:
    """A running step. client: its srun. hosts: in the order of the ranks, tasks_a_node on each. logs: where ranks
    print, and srun.
    """

    job: str
    client: subprocess.Popen[bytes]
    hosts: tuple[str, ...]
    tasks_a_node: int
    logs: Path

    @property
    def num_tasks(self) -> int:
        return len(self.hosts) * self.tasks_a_node

    def node_of(self, rank: int) -> str:
        """The node that a rank runs on."""
        return self.hosts[rank // self.tasks_a_node]

    def said(self) -> str:
        """What srun has printed."""
        return (self.logs / SRUN_LOG).read_text(errors="replace")

    def signal(self, name: str) -> None:
        """Send a signal to every task. Before the first task has started there is nobody to send it to."""
        with suppress(FileNotFoundError):
            slurm.signal_step(self.job, (self.logs / NUMBER).read_text().strip(), name)

    def end(self) -> None:
        """Kill what is left of it, stopped processes too: that is what srun does when it is told to end."""
        self.client.terminate()
        try:
            self.client.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.client.kill()
            self.client.wait()
        self.clear()

    def clear(self) -> None:
        """After srun's end, however it ended: no task of it lives on beside those of the next step."""
        with suppress(FileNotFoundError):
            slurm.end_step(self.job, (self.logs / NUMBER).read_text().strip(), CLEARED)


def start_step(
    job: Job,
    job_id: str,
    hosts: tuple[str, ...],
    command: tuple[str, ...],
    *,
    tasks_a_node: int,
    logs: Path,
    own: Mapping[str, str],
    tolerant: bool = False,
) -> Step:
    """Start a command on some hosts, in their order. own: variables of these tasks. tolerant: a task that fails, or a
    node that can't be reached, doesn't end the others.
    """
    logs.mkdir(parents=True, exist_ok=True)
    variables = {
        **own,
        "CUBOID_HOSTS": " ".join(hosts),
        "CUBOID_RANKS_A_NODE": str(tasks_a_node),
        "CUBOID_LOGS": str(logs),
        "CUBOID_LAUNCHED": f"{time.time():.3f}",
        "MASTER_PORT": str(random.SystemRandom().choice(PORTS)),
    }
    words = srun_words(job, hosts, command, tasks_a_node=tasks_a_node, tolerant=tolerant)
    with (logs / SRUN_LOG).open("ab") as log:
        client = subprocess.Popen(
            words,
            env=step_variables(variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Step(job_id, client, hosts, tasks_a_node, logs)
