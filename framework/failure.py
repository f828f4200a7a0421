"""Why a rank failed: one record a rank, in the directory that CUBOID_FAILURES names.

    mistake      of the user, ValueError: would end the same way again
    memory       of the GPU or of the machine
    numbers      the loss or the norm isn't finite any more
    storage      a file system or an object store refuses
    failure      any other that one message explains
    crash        anything else, with its traceback
    lost_peer    another rank is gone or doesn't answer: a consequence, never the cause

When one rank dies or hangs, all the others lose it within moments of each other, and any of them may write first; so
the record that tells most is the earliest of another kind.
"""

import json
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from framework.heartbeat import Phase
from framework.run import RunFailure, write_atomically

Kind = Literal["mistake", "memory", "numbers", "lost_peer", "storage", "failure", "crash"]

# By name: torch, which has them, takes seconds to import, and a failure may come before it is.
MEMORY: Final = ("MemoryError", "OutOfMemoryError")
NUMBERS: Final = ("BadNumbers",)
PEERS: Final = ("DistError",)  # DistBackendError (NCCL), DistNetworkError and DistStoreError derive from it
# What the memory allocators say in errors of other classes (NCCL, cuBLAS, the CPU's).
MEMORY_TEXT: Final = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator|can't allocate memory")
# gloo's and the stores' errors are plain RuntimeErrors; a failure that quotes one is a consequence like it.
PEER_TEXT: Final = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting \d+ms|\[[^\]]*gloo/transport|"
    r"Socket Timeout|wait timeout after|Connection was likely closed|NCCL communicator was aborted|another rank could"
)
COLLECTIVES: Final = ("torch/distributed/", "parallel/collectives.py", "deepspeed/comm/")
# NCCL's own, which says that this rank's device failed, not that another one is gone.
OWN_DEVICE: Final = re.compile(r"unhandled cuda error|Cuda failure")


@dataclass(frozen=True)
class Failure:
    """A rank's record. status: the exit status it asks for. error: name of the exception's class. phase, step: where
    its heart was (heartbeat.py). time: Unix seconds.
    """

    rank: int
    message: str
    status: int
    time: float
    kind: Kind = "crash"
    error: str = ""
    phase: Phase | None = None
    step: int = 0


def write_failure(folder: Path, failure: Failure) -> None:
    """Called by a failing rank."""
    write_atomically(folder / f"rank-{failure.rank}.json", json.dumps(asdict(failure)))


def read_failures(folder: Path) -> list[Failure]:
    """All ranks' records, those that tell most first."""
    failures = []
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):  # of a file system that shows a file before it is whole
            failures.append(Failure(**json.loads(path.read_text())))
    return sorted(failures, key=lambda failure: (failure.kind == "lost_peer", failure.time))


def first_failure(folder: Path) -> Failure | None:
    """The earliest record that is no mere consequence, else the earliest."""
    return next(iter(read_failures(folder)), None)


def failure_of(error: Exception, *, rank: int, phase: Phase | None = None, step: int = 0) -> Failure:
    """The record of an exception."""
    kind = kind_of(error)
    explained = isinstance(error, (ValueError, RunFailure, OSError))
    message = f"error: {error}" if explained else "".join(traceback.format_exception(error))
    status = 2 if kind == "mistake" else 1
    return Failure(rank, message, status, time.time(), kind, type(error).__name__, phase, step)


def kind_of(error: Exception) -> Kind:
    """What a launcher has to know of an exception. The exceptions that it was raised from are asked too."""
    if isinstance(error, ValueError):
        return "mistake"
    for each in chain_of(error):
        names, text = {base.__name__ for base in type(each).__mro__}, str(each)
        if names & {*MEMORY} or (isinstance(each, RuntimeError) and MEMORY_TEXT.search(text)):
            return "memory"
        if names & {*NUMBERS}:
            return "numbers"
        if isinstance(each, RuntimeError) and OWN_DEVICE.search(text):
            return "crash"
        if names & {*PEERS} or (isinstance(each, (RuntimeError, ConnectionError)) and PEER_TEXT.search(text)):
            return "lost_peer"
        if type(each) is RuntimeError and raised_in_collective(each):
            return "lost_peer"
    if isinstance(error, OSError):
        return "storage"
    return "failure" if isinstance(error, RunFailure) else "crash"


def raised_in_collective(error: BaseException) -> bool:
    """Whether a collective raised it: backends say in many words that a peer is gone."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(place in frames[-1].filename for place in COLLECTIVES)


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An exception, that which it was raised from, and so on."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__
