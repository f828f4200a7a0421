"""The only reader of os.environ: what a launcher tells a rank, and what signals ask of it.

The contract is torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Our own launchers
add

    CUBOID_FAILURES   a directory into which a failing rank writes one message, so that it is shown once and not once a
                      rank
    CUBOID_RUN        the run directory, CUBOID_ATTEMPT the attempt at it that the launcher has claimed for these ranks
    CUBOID_LAUNCHED   when they were started, Unix seconds
    CUBOID_NODE       the scheduler's name of this node, CUBOID_SWITCH its place in the network (core.s0.node3)

A rank reads nothing else: what a scheduler sets (SLURM_*) is translated by the job script, and read here for the
supervisor alone.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Final

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
DUMP_SIGNAL = signal.SIGUSR1  # asks a rank for its stacks (stacks.py)
REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Of every rank, here and on a cluster.
RANK_DEFAULTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what train.deterministic needs of cuBLAS
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that NCCL's flight recorder keeps (stacks.py)
    }
)


@dataclass(frozen=True)
class Environment:
    """One rank's place. attempt: that the launcher has claimed, None where rank 0 is to claim it. run: of that attempt.
    launched: when the launcher started this rank, Unix seconds; None where there is no such launcher.
    """

    rank: int
    world_size: int
    local_rank: int
    failures: Path | None
    run: Path | None = None
    attempt: int | None = None
    launched: float | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_environment() -> Environment | None:
    """This rank's place, or None where no launcher has set one. Raises ValueError when only a part of it is set."""
    missing = [name for name in REQUIRED if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return None
    if missing:
        raise ValueError(
            f"the environment sets a rank but not {', '.join(missing)}: set all of {', '.join(REQUIRED)} or none"
        )
    failures = os.environ.get("CUBOID_FAILURES")
    places = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for name, text in places.items():
        if not text.isdecimal():
            raise ValueError(f"the environment variable {name}={text!r} isn't a number")
    rank, world_size, local_rank = (int(text) for text in places.values())
    run, attempt, launched = (os.environ.get(f"CUBOID_{name}") for name in ("RUN", "ATTEMPT", "LAUNCHED"))
    return Environment(
        rank,
        world_size,
        local_rank,
        failures=Path(failures) if failures else None,
        run=Path(run) if run else None,
        attempt=int(attempt) if attempt else None,
        launched=float(launched) if launched else None,
    )


def node_name() -> str:
    """This node's name, as its scheduler calls it."""
    return os.environ.get("CUBOID_NODE") or socket.gethostname()


def local_world_size() -> int:
    """How many ranks this node has; 1 where no launcher says so."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the environment variable LOCAL_WORLD_SIZE={text!r} isn't a number of ranks")
    return int(text)


def master_address() -> tuple[str, int]:
    """Host and port at which the first rank is met."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def switch_address() -> str:
    """Where this node stands in the network, outermost switch first, joined by dots; "" where nobody knows."""
    return os.environ.get("CUBOID_SWITCH", "")


@dataclass(frozen=True)
class Allocation:
    """What the scheduler has given a batch script. nodes: as it writes them, node[0-3]. restart: how often the job has
    come back. user: who runs it.
    """

    job: str
    nodes: str
    restart: int
    user: str


def read_allocation() -> Allocation:
    """The nodes of this batch script. Raises ValueError outside one."""
    names = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST")
    if any(name not in os.environ for name in names):
        raise ValueError(f"this isn't a batch script of Slurm: {' and '.join(names)} aren't set")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return Allocation(job, os.environ["SLURM_JOB_NODELIST"], restart, os.environ.get("USER", "user"))


def step_variables(own: dict[str, str]) -> dict[str, str]:
    """The environment of a step that this process starts. A step takes its own shape from its words alone: what the job
    was submitted with isn't handed on.
    """
    shape = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK")
    return {name: value for name, value in os.environ.items() if name not in shape} | own


def rank_variables(*, rank: int, world_size: int, port: int, failures: Path) -> dict[str, str]:
    """The environment of a local rank.

    The machine's cores are shared out as threads, unless OMP_NUM_THREADS is set. Where there is no GPU, DeepSpeed is
    told so, or it searches and warns.
    """
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    return {
        **RANK_DEFAULTS,
        "OMP_NUM_THREADS": threads,
        **({} if visible_gpus() else {"DS_ACCELERATOR": "cpu"}),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUBOID_FAILURES": str(failures),
    }


def cache_places() -> dict[str, str]:
    """Variable -> where what is compiled is kept, for those who don't set it too."""
    user = os.environ.get("USER") or str(os.getuid())
    home = os.path.expanduser("~")
    places = {
        "TRITON_CACHE_DIR": f"{home}/.triton/cache",
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{user}",
        "TORCH_EXTENSIONS_DIR": f"{home}/.cache/torch_extensions",
    }
    return {name: os.environ.get(name, default) for name, default in places.items()}


def worker_variables(folder: str) -> dict[str, str]:
    """The environment of a process that works for this one: one thread, and this one's modules. folder: where the
    package lies, should this process no longer have it on its path.
    """
    path = [entry for entry in sys.path if entry]
    path = path if folder in path else [folder, *path]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def be_first_rank() -> None:
    """Say in this process's environment that it is a first rank, as no launcher did: DeepSpeed looks there."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not visible_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_after_failure() -> None:
    """A failed collective of NCCL is reported to this process, and doesn't end it."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")


def visible_gpus() -> int:
    """GPUs of this machine that a process would see, counted without importing torch: those it is told of, else the
    driver's, else the device files that a container was given.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([name for name in listed.split(",") if name.strip() not in ("", "-1")])
    folder = Path("/proc/driver/nvidia/gpus")
    if folder.is_dir():
        return len(list(folder.iterdir()))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of this machine's first GPU; None where the driver's tool can't tell."""
    major, _, minor = ask_driver("compute_cap").partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def gpu_name() -> str:
    """What the driver calls this machine's first GPU, "" where its tool can't tell."""
    return ask_driver("name")


def gpu_memory() -> float:
    """Bytes of this machine's first GPU, infinite where the driver's tool can't tell."""
    mebibytes = ask_driver("memory.total").partition(" ")[0]
    return float(mebibytes) * 2**20 if mebibytes.isdecimal() else math.inf


def ask_driver(what: str) -> str:
    """One property of the first GPU, by the driver's own tool."""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.strip().partition("\n")[0]


def pass_over_notices() -> None:
    """For a process that has nothing to save: what schedulers send ahead of the end doesn't end it."""
    for number in (signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGHUP or SIGUSR2 (what schedulers send ahead of the end); the loop finishes its step,
    saves and ends.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
