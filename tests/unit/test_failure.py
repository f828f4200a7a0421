"""What a failing rank says, and which of several ranks' records tells why."""

import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framework.failure import Failure, failure_of, first_failure, kind_of, read_failures, write_failure
from framework.launch.local import explain
from framework.run import RunFailure
from framework.storage.request import StoreError


class BadNumbers(RunFailure):
    """By its name."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:22334"


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (ValueError("mesh.dp=3"), "mistake", 2),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory", 1),
        (MemoryError(), "memory", 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "memory", 1),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), "memory", 1),
        (torch.distributed.DistBackendError("NCCL error: ncclUnhandledCudaError: unhandled cuda error"), "crash", 1),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"), "lost_peer", 1),
        (torch.distributed.DistNetworkError("recv failed"), "lost_peer", 1),
        (torch.distributed.DistStoreError("wait timeout after 10000ms"), "lost_peer", 1),
        (RuntimeError(GLOO), "lost_peer", 1),
        (RuntimeError("gloo/unbound_buffer.cc:81] Timed out waiting 3000ms for recv"), "lost_peer", 1),
        (RunFailure(f"saving step-00000002-0000 broke off: RuntimeError: {GLOO}"), "lost_peer", 1),
        (RunFailure("another rank couldn't save"), "lost_peer", 1),
        (ConnectionResetError(104, "Connection reset by peer"), "lost_peer", 1),
        (BadNumbers("10 updates in a row"), "numbers", 1),
        (OSError(28, "No space left on device"), "storage", 1),
        (StoreError("s3://a/b: 403"), "storage", 1),
        (RunFailure("some reason"), "failure", 1),
        (RuntimeError("mat1 and mat2 shapes"), "crash", 1),
        (KeyError("a"), "crash", 1),
        (caused(RuntimeError("the compiler failed"), torch.OutOfMemoryError("out of memory")), "memory", 1),
        (caused(RuntimeError("the run failed: x"), ValueError("x")), "crash", 1),
    ],
)
def test_kinds(error: Exception, kind: str, status: int) -> None:
    record = failure_of(error, rank=3, phase="step", step=7)
    assert (record.kind, record.status, record.error) == (kind, status, type(error).__name__)
    assert (record.rank, record.phase, record.step) == (3, "step", 7)


def test_what_is_shown() -> None:
    """One message where it explains, else the traceback."""
    assert failure_of(ValueError("seed=x"), rank=0).message == "error: seed=x"
    assert failure_of(OSError(28, "No space left", "f"), rank=0).message == "error: [Errno 28] No space left: 'f'"
    try:
        {}["absent"]
    except KeyError as error:
        shown = failure_of(error, rank=0).message
        assert shown.startswith("Traceback") and "test_failure.py" in shown and "KeyError: 'absent'" in shown


def test_a_consequence_never_hides_the_cause(tmp_path: Path) -> None:
    assert first_failure(tmp_path) is None
    lost = Failure(0, "lost", 1, 10.0, "lost_peer", "RuntimeError", "step", 4)
    write_failure(tmp_path, lost)
    write_failure(tmp_path, replace(lost, rank=2, time=9.0))
    assert first_failure(tmp_path) == replace(lost, rank=2, time=9.0), "the earliest, where there is nothing better"
    cause = Failure(1, "full", 1, 11.0, "storage", "OSError", "save", 4)
    write_failure(tmp_path, cause)
    write_failure(tmp_path, replace(cause, rank=3, time=12.0))
    assert first_failure(tmp_path) == cause
    assert [record.rank for record in read_failures(tmp_path)] == [1, 3, 2, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rank-{rank}.json" for rank in range(4)]


def test_an_abort_is_told_by_its_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NCCL aborts the others, perhaps before the rank that failed has ended; a kill from outside is a cause itself."""
    write_failure(tmp_path, Failure(1, "error: full", 1, 11.0, "storage", "OSError", "save", 4))
    for number, told in ((signal.SIGABRT, "error: full\n"), (signal.SIGKILL, "rank 0 was killed by SIGKILL")):
        assert explain(tmp_path, SimpleNamespace(returncode=-number), 0, []) == 1  # type: ignore[arg-type]
        assert told in capsys.readouterr().err
    write_failure(tmp_path, Failure(1, "error: lost", 1, 11.0, "lost_peer", "RuntimeError", "step", 4))
    explain(tmp_path, SimpleNamespace(returncode=-signal.SIGABRT), 0, [])  # type: ignore[arg-type]
    assert "rank 0 was killed by SIGABRT" in capsys.readouterr().err


def test_whatever_a_collective_raises_is_of_a_peer() -> None:
    place = {"where": "/x/torch/distributed/distributed_c10d.py"}
    code = compile("def wait():\n    raise RuntimeError('some new words')\n", place["where"], "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    with pytest.raises(RuntimeError) as error:
        names["wait"]()
    assert kind_of(error.value) == "lost_peer"
    with pytest.raises(RuntimeError) as other:
        raise RuntimeError("some new words")
    assert kind_of(other.value) == "crash"
