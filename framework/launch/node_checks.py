"""What can be asked of a node without torch: its disks, its memory, and what its site's own command says.

A check returns its numbers, and problems in one line each: what was found, and the limit.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from framework.launch.config import HealthConfig

GB = 1e9
SHM = Path("/dev/shm")
MEMINFO = Path("/proc/meminfo")
PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Checked:
    """problems: a line each. numbers: name with unit -> value."""

    problems: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)


def check_disk(scratch: Path, limit: float) -> Checked:
    """limit: free gigabytes. A megabyte is written, read again and deleted."""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(scratch).free / GB
        with tempfile.NamedTemporaryFile(dir=scratch, prefix="cuboid-health-") as file:
            data = os.urandom(PROBE_BYTES)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            wrong = file.read() != data
    except OSError as error:
        return Checked((f"scratch {scratch} can't be written: {error}",))
    problems = [f"scratch {scratch} has {free:.1f} GB free, below disk={limit:g}"] if free < limit else []
    problems += [f"scratch {scratch} gives back other bytes than were written"] if wrong else []
    return Checked(tuple(problems), {"disk_gb": round(free, 1)})


def check_shm(limit: float, place: Path = SHM) -> Checked:
    """limit: free gigabytes. A machine without such a place passes."""
    if not place.is_dir():
        return Checked()
    free = shutil.disk_usage(place).free / GB
    problem = f"{place} has {free:.2f} GB free, below shm={limit:g}: dead jobs' files, or a container's default"
    return Checked((problem,) if free < limit else (), {"shm_gb": round(free, 2)})


def check_memory(limit: float, meminfo: Path = MEMINFO) -> Checked:
    """limit: available gigabytes. A machine that doesn't say passes."""
    if not meminfo.is_file():
        return Checked()
    words = next((line.split() for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    if words is None:
        return Checked()
    free = int(words[1]) * 1024 / GB
    problem = f"{free:.1f} GB of memory are available, below host={limit:g}: another process holds the rest"
    return Checked((problem,) if free < limit else (), {"memory_gb": round(free, 1)})


def check_command(command: str, timeout: float) -> Checked:
    """The site's own check: a shell's status other than 0 is a problem, told by its last line."""
    if not command:
        return Checked()
    with tempfile.TemporaryFile() as output:  # a file, for what the command leaves in the background may hold a pipe
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Checked((f"command: no end within {timeout:.0f} s: {command}",))
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    said = lines[-1].strip() if lines else "it said nothing"
    return Checked((f"command: status {status}: {said[:300]}",) if status else ())


def check_node(health: HealthConfig, scratch: Path) -> Checked:
    """All of them, in the order in which they're told."""
    found = [
        check_disk(scratch, health.disk),
        check_shm(health.shm),
        check_memory(health.host),
        check_command(health.command, health.timeout / 3),
    ]
    numbers = {name: value for each in found for name, value in each.numbers.items()}
    return Checked(tuple(problem for each in found for problem in each.problems), numbers)
