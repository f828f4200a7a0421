"""What the scheduler says of jobs, without accounting: `scontrol` and `squeue` alone (sacct needs a database that many
clusters lack). Everything here also works where no scheduler is installed: then nobody can tell.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from framework.run import RunFailure

TIMEOUT: Final = 15.0  # seconds for an answer
GONE: Final = "GONE"  # a job that the scheduler doesn't know any more: ended for some minutes
# States from which a job doesn't come back by itself.
OVER: Final = frozenset(
    (GONE, "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
)


@dataclass(frozen=True)
class JobState:
    """state: as Slurm calls it, or GONE. reason: why it waits, or "". nodes: as Slurm writes them, node[0-3].
    start: Unix seconds at which it began, or is expected to; None where nobody knows.
    """

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    start: float | None = None
    name: str = ""


class Scheduler(Protocol):
    """A job id -> what is known. `job` is None and `jobs` empty where nobody can tell."""

    def job(self, job_id: str) -> JobState | None: ...

    def jobs(self) -> list[JobState]: ...

    def cancel(self, job_id: str) -> None: ...


class NoScheduler:
    """Of a machine that has none."""

    def job(self, job_id: str) -> JobState | None:
        return None

    def jobs(self) -> list[JobState]:
        return []

    def cancel(self, job_id: str) -> None:
        """Raises ValueError."""
        raise ValueError(f"job {job_id} can't be cancelled from here: there is no scancel on this machine")


class SlurmQueue:
    """Slurm, by its commands."""

    def job(self, job_id: str) -> JobState | None:
        """None where the controller doesn't answer; state GONE where it doesn't know the job."""
        done = ask("scontrol", "show", "job", "-o", job_id)
        if done is None:
            return None
        if done.returncode:
            return JobState(job_id, GONE) if "Invalid job id" in done.stderr else None
        lines = done.stdout.splitlines()
        return parse_job(lines[0]) if lines else None

    def jobs(self) -> list[JobState]:
        """The user's own that wait or run."""
        done = ask("squeue", "--me", "--noheader", "--format=%i|%T|%r|%N|%j")
        if done is None or done.returncode:
            return []
        found = []
        for line in done.stdout.splitlines():
            job, state, reason, nodes, name = line.strip().split("|", 4)
            found.append(JobState(job, state, "" if reason == "None" else reason, nodes, name=name))
        return found

    def cancel(self, job_id: str) -> None:
        """Raises RunFailure where the scheduler won't."""
        done = ask("scancel", job_id)
        if done is None or done.returncode:
            said = "no answer" if done is None else done.stderr.strip()
            raise RunFailure(f"scancel {job_id}: {said}")


def find_scheduler() -> Scheduler:
    """This machine's."""
    return SlurmQueue() if shutil.which("scontrol") and shutil.which("squeue") else NoScheduler()


def ask(*command: str) -> "subprocess.CompletedProcess[str] | None":
    """Run a command of the scheduler; None where it is missing or doesn't answer in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def parse_job(line: str) -> JobState:
    """A line of `scontrol show job -o`."""

    def value(key: str) -> str:
        found = re.search(rf"(?<!\S){key}=(\S*)", line)
        return "" if found is None or found[1] in ("None", "(null)", "Unknown", "N/A") else found[1]

    start = value("StartTime")
    return JobState(
        job=value("JobId"),
        state=value("JobState"),
        reason=value("Reason"),
        nodes=value("NodeList"),
        start=datetime.fromisoformat(start).timestamp() if start else None,
        name=value("JobName"),
    )
