"""The scheduler's commands, as the supervisor and `submit` use them."""

import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Literal

SECONDS = 60.0
GONE: Final = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN")
FIELD: Final = re.compile(r"(\w+)=(\S*)")


def call(words: Sequence[str], *, seconds: float = SECONDS, status: int | None = 0) -> str:
    """Standard output of a command. Raises OSError with what it said where it failed, or took too long. status: that it
    must end with, None = any.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise ValueError(f"there is no {words[0]} on the PATH: run this on a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"`{' '.join(words)}` gave no answer within {seconds:g} s") from None
    if status is not None and done.returncode != status:
        raise OSError(f"`{' '.join(words)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def expand(nodes: str) -> tuple[str, ...]:
    """node[1-3] -> node1, node2, node3."""
    return tuple(call(["scontrol", "show", "hostnames", nodes]).split())


def fields_of_job(job: str) -> dict[str, str]:
    """What `scontrol show job` says; empty where it knows none of that number."""
    try:
        return dict(FIELD.findall(call(["scontrol", "show", "job", "-o", job])))
    except OSError:
        return {}


def fate(job: str, restart: int) -> Literal["requeued", "cancelled", "limit", "unknown"]:
    """Why the scheduler ends a job that was told to: it is in the queue again already, or not to come back, or at its
    limit. unknown: it isn't the scheduler that ends it, or nobody answers. restart: which start of it this is.
    """
    fields = fields_of_job(job)
    if int(fields.get("Restarts", restart)) > restart:
        return "requeued"
    state = fields.get("JobState", "")
    if state == "TIMEOUT" or (state == "COMPLETING" and fields.get("Reason") == "TimeLimit"):
        return "limit"
    return "cancelled" if state in ("COMPLETING", "CANCELLED") else "unknown"


def is_ending(job: str) -> bool:
    """Whether the scheduler is ending a job already."""
    return fields_of_job(job).get("JobState") == "COMPLETING"


def is_silent(node: str) -> bool:
    """Whether the scheduler has no answer from a node, long before it holds it for lost."""
    try:
        return "*" in (text := call(["sinfo", "-h", "-N", "-o", "%T", "-n", node])) or "down" in text
    except OSError:
        return False


def num_nodes(partition: str) -> int:
    """Nodes of a partition, or of all of them; many where nobody says."""
    where = [f"--partition={partition}"] if partition else []
    try:
        return len(set(call(["sinfo", "--noheader", "--Node", "--format=%N", *where]).split()))
    except OSError:
        return 1 << 30


def gone_nodes(nodes: Sequence[str], *, look_again: float = 3.0) -> tuple[str, ...]:
    """Those of some nodes that the scheduler holds for lost, or that don't answer it at two looks, some seconds apart.
    Nobody, where it doesn't answer itself.
    """
    try:
        text = call(["sinfo", "-h", "-N", "-o", "%N %T", "-n", ",".join(nodes)])
    except OSError:
        return ()
    states = {name: state.upper() for name, _, state in (line.partition(" ") for line in text.splitlines())}
    gone = [node for node in nodes if any(word in states.get(node, "") for word in GONE)]
    silent = [node for node in nodes if node not in gone and states.get(node, "").endswith("*")]
    if silent and look_again > 0:  # which a busy node may be for a moment
        time.sleep(look_again)
        gone += gone_nodes(silent, look_again=0)
    elif silent:
        gone += silent
    return tuple(gone)


def requeue(job: str, exclude: Sequence[str]) -> None:
    """Put this job back into the queue, without some nodes. The scheduler ends its batch script meanwhile: every
    process of it gets SIGTERM at once, the one that does this too, which therefore ignores it. Raises OSError.
    """
    words = f"scontrol requeue {job}"
    if exclude:
        # Not held meanwhile: a release that fails would leave the job held for ever, and a requeued one waits some
        # seconds anyway. A job that has lost a node takes 5 s for an update, or refuses it; then it comes back without.
        update = f"scontrol update JobId={job} ExcNodeList={','.join(exclude)}"
        words += f" && for i in 1 2 3; do {update} && exit 0; sleep 1; done; exit 0"
    call(["bash", "-c", f"trap '' TERM; {words}"])


def end_step(job: str, step: str, seconds: float) -> None:
    """Kill what is left of a step, and wait until nothing is. A task whose node doesn't answer may stay."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        signal_step(job, step, "KILL")
        try:
            steps = call(["squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i"]).split()
        except OSError:
            steps = []
        if f"{job}.{step}" not in steps:
            return
        time.sleep(0.5)


def signal_step(job: str, step: str, name: str) -> None:
    """Send a signal to every task of a step. The status says nothing: an error is told of signals that arrived too."""
    with suppress(subprocess.TimeoutExpired):
        words = ["scancel", f"--signal={name}", f"{job}.{step}"]
        subprocess.run(words, capture_output=True, timeout=SECONDS, check=False)
