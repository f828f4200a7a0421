"""`cuboid plan --calibrate`: the ranks that measure this machine. Imports no torch."""

from pathlib import Path

from framework.environment import visible_gpus
from framework.launch.check import check_machine
from framework.launch.local import run_local
from framework.parallel.config import MeshShape
from framework.plan.hardware import Hardware, load_hardware


def calibrate(out: Path, ranks: int) -> Hardware:
    """Measure this machine with so many ranks, write its description to `out` and read it. Raises ValueError unless
    they are pairs, and as many as it can run; SystemExit with the status where a rank failed, which has said why.
    """
    if ranks < 2 or ranks % 2:
        raise ValueError(
            f"calibration with {ranks} ranks: links are measured in pairs, use 2, 4 or another even number"
        )
    check_machine(MeshShape(ranks, 1, 1, 1), num_gpus=visible_gpus())
    if status := run_local(["calibrate", "--out", str(out)], world_size=ranks):
        raise SystemExit(status)
    return load_hardware(str(out))
