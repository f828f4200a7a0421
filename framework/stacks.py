"""Where every thread of every rank is, on SIGUSR1: RUN/attempts/0003/stacks/rank-00007.txt.

A rank that hangs is inside C (a collective, a read of a dead file system), and there no Python handler runs:
faulthandler writes from the signal handler itself. It then wakes a thread by the wakeup descriptor, into which the
interpreter's own handler, likewise in C, writes the signal's number; on GPUs that thread adds NCCL's flight recorder
(`rank-00007.nccl`, which torch's `torchfrtrace` reads): which collective of which group each rank has entered last.
"""

import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final

from framework.environment import DUMP_SIGNAL
from framework.run import Run

FOLDER: Final = "stacks"


def stack_file(run: Run, rank: int) -> Path:
    """Where a rank's stacks are."""
    return run.attempt_path / FOLDER / f"rank-{rank:05}.txt"


def dump_on_signal(run: Run | None, rank: int) -> None:
    """From now on SIGUSR1 appends the stacks of all threads to this rank's file; to standard error while no attempt is
    known. Call it from the main thread; again when the attempt is known.
    """
    if signal.getsignal(DUMP_SIGNAL) is not pass_over:  # once: it would take faulthandler's place
        signal.signal(DUMP_SIGNAL, pass_over)
    if run is None:
        faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True, chain=True)
        return
    path = stack_file(run, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    faulthandler.register(DUMP_SIGNAL, file=descriptor, all_threads=True, chain=True)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    arguments = (woken, path.with_suffix(".nccl"))
    threading.Thread(target=record_flights, args=arguments, name="flight-recorder", daemon=True).start()


def pass_over(number: int, frame: FrameType | None) -> None:
    """The handler in Python: faulthandler has done the work."""


def record_flights(woken: int, path: Path) -> None:
    """On the thread: on every SIGUSR1 write what NCCL's flight recorder has."""
    while numbers := os.read(woken, 64):
        if DUMP_SIGNAL in numbers and (trace := flight_record()):
            path.write_bytes(trace)


def flight_record() -> bytes | None:
    """NCCL's last collectives on this rank, pickled; None where there is no NCCL, or no GPU in use."""
    torch = sys.modules.get("torch")
    bound = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(bound, "_dump_nccl_trace", None)
    if torch is None or dump is None or not torch.cuda.is_initialized():
        return None
    record: bytes = dump()
    return record
