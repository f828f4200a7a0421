"""Ranks on this machine: start them, pass signals on, end them all when one fails, say why once.

Every rank is a process of its own that runs the same command with a place in its environment; rank 0 keeps the
terminal. A rank that fails writes its message into a directory; the earliest message is the one that is shown.
"""

import ctypes
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from framework.environment import DUMP_SIGNAL, STOP_SIGNALS, rank_variables
from framework.failure import first_failure
from framework.log import error

GRACE_SECONDS = 10.0
PORTS = range(20000, 32768)
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies (Linux only; elsewhere nothing happens). A request for
    its stacks that comes too early is passed over.
    """
    signal.signal(DUMP_SIGNAL, signal.SIG_IGN)  # until the rank knows what to do with it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on, below those that the kernel hands out itself: it is
    used seconds later, when the ranks have started.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports between {PORTS.start} and {PORTS.stop} is free")


class Launcher:
    """Starts ranks, one set after another. While it is entered, signals go on to those that run; received: those that
    asked to stop.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Launcher":
        self._previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        self._previous[DUMP_SIGNAL] = signal.signal(DUMP_SIGNAL, self._dump)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, arguments: list[str], *, world_size: int) -> int:
        """Run `cuboid ARGUMENTS` on `world_size` local ranks and wait. Returns the exit status."""
        if self.received:  # between two sets of ranks
            return 128 + self.received[0]
        with tempfile.TemporaryDirectory(prefix="cuboid-") as name:
            folder, port = Path(name), free_port()
            self._ranks = ranks = []
            try:
                for rank in range(world_size):
                    output = None if rank == 0 else (folder / f"rank-{rank}.log").open("wb")
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "framework.cli", *arguments],
                            env=rank_variables(rank=rank, world_size=world_size, port=port, failures=folder),
                            stdout=output,
                            stderr=output,
                            start_new_session=True,
                            preexec_fn=die_with_parent,
                        )
                    )
                failed = wait(ranks)
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
            return 0 if failed is None else explain(folder, ranks[failed], failed, self.received)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        for process in self._ranks:
            process.send_signal(number if len(self.received) == 1 else signal.SIGKILL)

    def _dump(self, number: int, frame: FrameType | None) -> None:
        for process in self._ranks:
            process.send_signal(number)


def run_local(arguments: list[str], *, world_size: int) -> int:
    """Run `cuboid ARGUMENTS` on `world_size` local ranks and wait. Returns the exit status."""
    with Launcher() as launcher:
        return launcher.run(arguments, world_size=world_size)


def wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; returns the rank that failed first. The others then have a grace period to end by themselves."""
    first: int | None = None
    deadline = 0.0
    while any(process.poll() is None for process in ranks):
        if first is None:
            first = next((rank for rank, process in enumerate(ranks) if process.returncode), None)
            deadline = time.monotonic() + GRACE_SECONDS
        elif time.monotonic() > deadline:
            break
        time.sleep(0.05)
    # A rank that was killed comes before those that failed because it was gone.
    killed = [rank for rank, process in enumerate(ranks) if (process.returncode or 0) < 0]
    failed = [rank for rank, process in enumerate(ranks) if process.returncode]
    return next(iter([*killed, *([] if first is None else [first]), *failed]), None)


def explain(folder: Path, process: subprocess.Popen[bytes], rank: int, received: list[int]) -> int:
    """Print why the rank that failed first did; the exit status. What the others say then is a consequence."""
    status = process.returncode
    if len(received) > 1:
        error("stopped at once: nothing since the newest checkpoint is saved; the same command resumes there")
        return 128 + received[0]
    failure = first_failure(folder)
    # NCCL ends a process by SIGABRT when another rank is gone; what that one said is the reason.
    consequence = status == -signal.SIGABRT and failure is not None and failure.kind != "lost_peer"
    if status < 0 and not received and not consequence:
        error(f"error: rank {rank} was killed by {signal.Signals(-status).name}; the same command resumes")
        return 1
    if failure is not None:
        error(failure.message)
        return failure.status
    if received:
        return 128 + received[0]
    log = folder / f"rank-{rank}.log"
    tail = "\n" + log.read_text(errors="replace")[-2000:] if log.exists() else ""
    error(f"error: rank {rank} ended with status {status}{tail}")
    return 1
