"""What this machine has of what a run needs, and what a recipe asks of it beyond that: `cuboid doctor`.

Each check says what it found; a warning is worth knowing, a problem will stop something. Both come with the fix.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from framework.environment import cache_places, visible_gpus
from framework.kernels.config import FLASH_DISTRIBUTIONS, installed_flash
from framework.launch.check import check_start, check_store
from framework.launch.config import HealthConfig
from framework.launch.node_checks import GB, Checked, check_disk, check_memory, check_shm
from framework.recipe import Recipe, load_recipe
from framework.run import git_commit, versions
from framework.storage.storage import open_source

Status = Literal["ok", "warning", "problem"]
SLURM: Final = ("sbatch", "srun", "squeue", "scontrol")
NETWORK_FILE_SYSTEMS: Final = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse.sshfs", "wekafs", "ceph")
PYTHON: Final = (3, 11)


@dataclass(frozen=True)
class Finding:
    """fix: what to do about it, of a warning or a problem. compared: whether machines that differ in it are a sign of
    trouble, as with versions, and not with free space.
    """

    name: str
    value: str
    status: Status = "ok"
    fix: str = ""
    compared: bool = True


def doctor_here(recipe: Path | None = None, scratch: str = "/tmp") -> list[Finding]:
    """All checks of this machine. Imports torch."""
    found = [
        *check_python(),
        *check_torch(),
        check_attention(),
        *check_compilers(),
        *check_caches(),
        *check_space(scratch),
        check_slurm(),
    ]
    return found if recipe is None else [*found, *check_recipe(recipe)]


def output_of(words: list[str]) -> str | None:
    """What a tool says; None where it's absent, fails, or hangs."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def check_python() -> list[Finding]:
    """The interpreter, the packages, the code."""
    is_old = sys.version_info < PYTHON
    fix = f"use Python {PYTHON[0]}.{PYTHON[1]} or newer" if is_old else ""
    found = [Finding("Python", f"{platform.python_version()} {sys.executable}", "problem" if is_old else "ok", fix)]
    try:
        found += [Finding(name, version) for name, version in versions().items()]
    except PackageNotFoundError as error:
        found.append(Finding("packages", f"{error.name} isn't installed", "problem", "pip install -e ."))
    commit = git_commit()
    if commit is None:
        found.append(Finding("code", "outside a git checkout"))
    elif commit.endswith("+"):
        found.append(Finding("code", f"{commit[:12]}, changed", "warning", "commit, or a run can't be made again"))
    else:
        found.append(Finding("code", commit[:12]))
    return found


def check_torch() -> list[Finding]:
    """What torch is built for, and what GPUs it and the driver see."""
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    found = [Finding("driver", driver.splitlines()[0])] if driver else []
    try:
        import torch
    except (ImportError, OSError) as error:
        text = (str(error).splitlines() or ["it can't be imported"])[0]
        return [*found, Finding("torch's import", text, "problem", "pip install --force-reinstall torch")]
    cuda, here, shown = torch.version.cuda, torch.cuda.is_available(), visible_gpus()
    found.append(Finding("torch's CUDA", cuda or "none, built for the CPU"))
    if not here and shown:
        fix = f"a driver for CUDA {cuda}, or a torch for this driver" if cuda else "install torch for CUDA"
        return [*found, Finding("GPUs", f"{shown} here, and torch sees none", "problem", fix)]
    if not here:
        return [*found, Finding("GPUs", "none: a run here uses the CPU")]
    found.append(Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    found.append(Finding("cuDNN", str(torch.backends.cudnn.version())))
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = [f"{one.name} {one.total_memory / GB:.0f} GB" for one in properties]
    text = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    fix = (
        "" if len(set(kinds)) == 1 else "a mesh of unlike GPUs is as slow as the slowest, with the memory of the least"
    )
    found.append(Finding("GPUs", text, "warning" if fix else "ok", fix))
    free = [torch.cuda.mem_get_info(index)[0] / one.total_memory for index, one in enumerate(properties)]
    if min(free) < 0.9:
        busy = f"GPU {free.index(min(free))} has {min(free):.0%} of its memory free"
        found.append(Finding("GPUs' memory", busy, "warning", "nvidia-smi shows who holds the rest", compared=False))
    return found


def check_attention() -> Finding:
    """Which kernels `attention.kernel=auto` can choose from."""
    flash = [FLASH_DISTRIBUTIONS[generation] for generation in installed_flash()]
    kernels = [*flash, *(["cudnn"] if visible_gpus() else []), "aten", "reference"]
    if visible_gpus() and not flash:
        fix = "pip install flash-attn-4 (Hopper, Blackwell), or flash-attn --no-build-isolation"
        return Finding("attention", ", ".join(kernels), "warning", f"for the fastest: {fix}")
    return Finding("attention", ", ".join(kernels))


def check_compilers() -> list[Finding]:
    """What DeepSpeed and torch.compile would build by, and what of DeepSpeed is built already."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    tools = [compiler, shutil.which("ninja"), shutil.which("nvcc")]
    fix = "" if compiler else "torch.compile (execution.compile) needs one: install g++"
    found = [
        Finding("compilers", ", ".join(filter(None, tools)) or "none", "ok" if compiler else "warning", fix),
    ]
    spec = find_spec("deepspeed")
    record = Path(spec.origin).with_name("git_version_info_installed.py") if spec and spec.origin else None
    if record is not None and record.is_file():
        built = re.findall(r"'(\w+)': True", record.read_text())
        found.append(Finding("DeepSpeed's ops", ", ".join(built) or "none prebuilt, and none is needed"))
    return found


def file_system(place: Path) -> str:
    """The kind that a path lies on, "" where nobody says."""
    mounts = Path("/proc/mounts")
    place = place.resolve()
    best = ("", "")
    for line in mounts.read_text().splitlines() if mounts.is_file() else []:
        _, mounted, kind, *_ = line.split()
        if place.is_relative_to(mounted) and len(mounted) >= len(best[0]):
            best = (mounted, kind)
    return best[1]


def check_caches() -> list[Finding]:
    """Where compiled kernels are kept: a place that all nodes share is slow, and ranks wait for each other's locks."""
    found = []
    for variable, place in cache_places().items():
        kind = file_system(Path(place))
        shared = kind in NETWORK_FILE_SYSTEMS
        fix = f"set {variable} to a directory on the node's own disk" if shared else ""
        found.append(Finding(variable, f"{place} ({kind})", "warning" if shared else "ok", fix))
    return found


def check_space(scratch: str) -> list[Finding]:
    """Disk, /dev/shm and memory, by a health check's limits."""
    limits = HealthConfig()

    def told(name: str, checked: Checked, fix: str) -> Finding:
        numbers = ", ".join(f"{value:g} GB free" for value in checked.numbers.values())
        if checked.problems:
            return Finding(name, checked.problems[0], "problem", fix, compared=False)
        return Finding(name, numbers or "not told", compared=False)

    return [
        told(f"scratch {scratch}", check_disk(Path(scratch), limits.disk), "free some, or name another scratch"),
        told("/dev/shm", check_shm(limits.shm), "delete dead jobs' files there; docker: --shm-size=16g or --ipc=host"),
        told("memory", check_memory(limits.host), "end what holds it: top"),
    ]


def check_slurm() -> Finding:
    """Whether jobs can be submitted from here."""
    there = [tool for tool in SLURM if shutil.which(tool)]
    missing = [tool for tool in SLURM if tool not in there]
    if not there:
        return Finding("Slurm", "none of its tools: no job can be submitted from here")
    version = output_of(["sbatch", "--version"]) if "sbatch" in there else None
    if missing:
        fix = "load Slurm's module, or put its bin on the PATH"
        return Finding("Slurm", f"{', '.join(missing)} not on the PATH", "warning", fix)
    if version is None:
        return Finding("Slurm", "sbatch doesn't work: no job can be submitted", "warning", "sbatch --version says why")
    return Finding("Slurm", version.removeprefix("slurm "))


def check_recipe(path: Path) -> list[Finding]:
    """What a recipe needs: its data, its checkpoints' place, and a start that can work."""
    try:
        recipe = load_recipe(path, [])
    except ValueError as error:
        return [Finding("recipe", str(error), "problem", f"mend {path}")]

    def told(name: str, value: str, check: Callable[[], object], fix: str) -> Finding:
        try:
            check()
        except (ValueError, OSError) as error:
            return Finding(name, str(error), "problem", fix)
        return Finding(name, value)

    return [
        *(
            told(
                "data", f"{url} can be read", open_source(url).check_readable, "see README: object stores, or the path"
            )
            for url in streams_in(recipe)
        ),
        told("checkpoints", "can be written", lambda: check_store(recipe), "see checkpoint.store and run"),
        told("start", "nothing is in its way", lambda: start(recipe), f"change {path}, or set key=value"),
    ]


def streams_in(recipe: Recipe) -> list[str]:
    """Where a run would read."""
    held_out = recipe.validation.shards if recipe.validation.every > 0 else []
    return list(dict.fromkeys([*(stream.path for stream in recipe.data.streams), *held_out]))


def start(recipe: Recipe) -> None:
    """Raises ValueError as a start would. Paths of a recipe are relative to where the command is called."""
    check_start(recipe, num_ranks=None, num_gpus=visible_gpus())
    if not os.access(Path(recipe.run).resolve().parent, os.W_OK) and not Path(recipe.run).exists():
        raise ValueError(f"run={recipe.run} can't be made here")
