"""Which rank is slow: each one's own time for the same small piece of work.

The time of a step tells nothing of that. Ranks wait for each other in every collective, so all of them take as long as
the slowest, and its neighbours only spend the difference waiting. A matrix product of a fixed shape waits for nobody: a
GPU that is throttled, or a core that is shared, is the one that takes longer for it. What a rank waited for its data is
gathered beside it, since a slow disk isn't a slow GPU.
"""

import time

import torch

from framework.parallel.collectives import gather_floats
from framework.parallel.mesh import Group

REPEATS = 3  # of which the fastest counts: an interruption isn't slowness
CPU_SIDE = 256  # 2 * 256^3 = 34 MFLOP in float32, about 1 ms of one core
GPU_SIDE = 4096  # 2 * 4096^3 = 137 GFLOP in bfloat16, 0.2 ms of an H100 and 100 MB of its memory


class Probe:
    """Measures this rank. The operands are made anew each time, so that between measurements it holds no memory."""

    def __init__(self, device: torch.device, group: Group) -> None:
        """group: on the host, of all ranks."""
        self._device, self._group = device, group

    def gather(self, waited: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(seconds for the piece of work, `waited`) of every rank. A collective."""
        everywhere = gather_floats([self.measure(), waited], self._group)
        return tuple(seconds for seconds, _ in everywhere), tuple(each for _, each in everywhere)

    def measure(self) -> float:
        """This rank's seconds for the piece of work."""
        on_gpu = self._device.type == "cuda"
        side, dtype = (GPU_SIDE, torch.bfloat16) if on_gpu else (CPU_SIDE, torch.float32)
        a, out = (torch.ones(side, side, dtype=dtype, device=self._device) for _ in range(2))
        torch.mm(a, a, out=out)  # the first one may choose a kernel
        return min((time_on_gpu if on_gpu else time_here)(a, out) for _ in range(REPEATS))


def time_here(a: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds of one product on the CPU."""
    begin = time.perf_counter()
    torch.mm(a, a, out=out)
    return time.perf_counter() - begin


def time_on_gpu(a: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds of one product on the GPU, by its own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.mm(a, a, out=out)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
