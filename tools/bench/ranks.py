"""Benchmarks on several ranks: start them on this machine, time a block by its slowest rank.

A benchmark's command starts itself once more for each rank, with a place in the environment (environment.py), unless a
launcher has set one already. On a rank, `Together` is the timer of interleave.py: all ranks begin a block together; its
wall time is the slowest rank's, its CPU time the sum over the ranks.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from interleave import time_block

from framework.environment import rank_variables
from framework.launch.local import die_with_parent, free_port, wait
from framework.parallel.collectives import barrier, gather_objects
from framework.parallel.mesh import Group


def run_ranks(arguments: list[str], world_size: int) -> None:
    """Run this Python script with `arguments` on `world_size` local ranks; rank 0 has the terminal.

    RuntimeError with the end of its output when a rank fails.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, port = Path(name), free_port()
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world_size):
                output = None if rank == 0 else (folder / f"{rank}.log").open("wb")
                ranks.append(
                    subprocess.Popen(
                        # The libraries' warnings, of every rank, would drown the table.
                        [sys.executable, "-W", "ignore", sys.argv[0], *arguments],
                        env=rank_variables(rank=rank, world_size=world_size, port=port, failures=folder),
                        stdout=output,
                        stderr=output,
                        preexec_fn=die_with_parent,
                    )
                )
            failed = wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        log = folder / f"{failed}.log"
        if failed is not None:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else "see above"
            raise RuntimeError(f"rank {failed} of {world_size} ended with {ranks[failed].returncode}: {tail}")


@dataclass(frozen=True)
class Together:
    """Seconds a step of a block that all ranks of `group` run: (the slowest rank's wall time, CPU time of all)."""

    group: Group

    def __call__(self, step: Callable[[], None], num_steps: int) -> tuple[float, float]:
        barrier(self.group)
        times = gather_objects(time_block(step, num_steps), self.group)
        return max(wall for wall, _ in times), sum(cpu for _, cpu in times)


def synchronise() -> None:
    """Wait for the GPU, if there is one: what was started on it belongs to the step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
