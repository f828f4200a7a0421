"""A real Slurm of several nodes for the tests, by slurm/lab/lab.sh."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "slurm" / "lab" / "lab.sh"
INHERITED = re.compile("SLURM_|SLURMD_|SBATCH_|SRUN_|SALLOC_|SCANCEL_|SQUEUE_|SINFO_")


class NoLabError(Exception):
    """This machine cannot run one; the message says why."""


class Lab:
    """A Slurm with the nodes node0, node1, ... and partitions low and high; `environment` is that of its clients."""

    def __init__(
        self,
        folder: Path,
        *,
        num_nodes: int = 4,
        kill_wait: int = 5,
        grace: int = 10,
        slurmd_timeout: int = 10,
        message_timeout: int = 5,
    ) -> None:
        """The last four are Slurm's KillWait, GraceTime, SlurmdTimeout and MessageTimeout, in seconds."""
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if not INHERITED.match(name)}
        self.environment = inherited | {
            "SLURM_LAB": str(folder),
            "SLURM_LAB_NODES": str(num_nodes),
            "SLURM_LAB_KILL_WAIT": str(kill_wait),
            "SLURM_LAB_GRACE": str(grace),
            "SLURM_LAB_SLURMD_TIMEOUT": str(slurmd_timeout),
            "SLURM_LAB_MESSAGE_TIMEOUT": str(message_timeout),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self.start()

    def start(self) -> None:
        """Start the daemons, and wait until every node is idle."""
        try:
            self._lab("up")
        except AssertionError:
            self.close()
            raise

    def close(self) -> None:
        """End every process of the lab and delete its folder."""
        self._lab("down")

    def enter(self) -> None:
        """Let what this process starts speak to this Slurm."""
        os.environ["SLURM_CONF"] = self.environment["SLURM_CONF"]

    def kill_node(self, node: str) -> None:
        """The node's slurmd dies; the ranks on it live on, unseen by Slurm."""
        self._lab("kill-node", node)

    def lose_node(self, node: str) -> None:
        """All that runs on the node dies."""
        self._lab("lose-node", node)

    def freeze_node(self, node: str) -> None:
        """All that runs on the node stops, and its connections stay open."""
        self._lab("freeze-node", node)

    def start_node(self, node: str) -> None:
        """The node comes back."""
        self._lab("start-node", node)

    def run(self, *words: str, timeout: float = 60) -> str:
        """The output of sbatch, srun, squeue, scontrol, scancel or sinfo."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(words)}: exit status {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, NodeList, ExcNodeList, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job_id)))

    def job_state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, CANCELLED, ..."""
        return self.job(job_id)["JobState"]

    def node_state(self, node: str) -> str:
        """idle, allocated, mixed, down, drained, ..., with the flags of sinfo: `*` doesn't answer."""
        return self.run("sinfo", "--noheader", "--partition=low", f"--nodes={node}", "--format=%T")

    def wait_state(self, job_id: str, states: str | set[str], timeout: float = 30) -> str:
        """Wait until the job is in one of `states`."""
        return self._wait(lambda: self.job_state(job_id), states, timeout, f"job {job_id}")

    def wait_node(self, node: str, states: str | set[str], timeout: float = 30) -> str:
        """Wait until the node is in one of `states`."""
        return self._wait(lambda: self.node_state(node), states, timeout, node)

    def logs(self) -> str:
        """The last lines of each daemon's log, for a failed test's message."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-20:]) for file in files)

    def _wait(self, ask: Callable[[], str], states: str | set[str], timeout: float, what: str) -> str:
        wanted = {states} if isinstance(states, str) else states
        end = time.monotonic() + timeout
        while (state := ask()) not in wanted:
            assert time.monotonic() < end, f"{what} is {state} after {timeout} s, not {wanted}\n{self.logs()}"
            time.sleep(0.05)
        return state

    def _lab(self, *words: str) -> None:
        done = subprocess.run(
            ["bash", str(SCRIPT), *words], capture_output=True, text=True, env=self.environment, timeout=300
        )
        if done.returncode == 2:
            raise NoLabError(done.stderr.strip())
        assert done.returncode == 0, done.stderr
