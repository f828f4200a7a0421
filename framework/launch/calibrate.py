"""`cuboid plan --calibrate`: the ranks that measure this machine. Imports no torch."""

from pathlib import Path

from framework.launch.local import run_local
from framework.plan.hardware import Hardware, load_hardware


def calibrate(out: Path, ranks: int) -> Hardware:
    """Measure this machine with so many ranks, write its description to `out` and read it. Raises ValueError on fewer
    than 2 ranks; SystemExit with the status where a rank failed, which has said why.
    """
    if ranks < 2:
        raise ValueError(f"calibration with {ranks} ranks: it needs at least 2, as one has no link to measure")
    if status := run_local(["calibrate", "--out", str(out)], world_size=ranks):
        raise SystemExit(status)
    return load_hardware(str(out))
