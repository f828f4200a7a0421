"""What is asked of a rank's device: a product whose answer is known, its speed, and its free memory.

The product is that of a Hadamard matrix (Sylvester's, entries 1 and -1) with its transpose: H H^T = n I. Every product
and every partial sum of it is an integer that bfloat16 operands and float32 sums hold exactly, and each of the n^2
answers depends on n multiplications: one that goes wrong shows. Summing in any order gives the same.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

GPU_SIZE = 8192
CPU_SIZE = 256
TIMED = 40  # products in a row: 60 ms of an H100
CHECKED = 40
GB = 1e9


@dataclass(frozen=True)
class Product:
    """wrong: elements that aren't the known answer, of `total`. tflops: 10^12 operations a second."""

    wrong: int
    total: int
    tflops: float


def this_device(local_rank: int) -> torch.device:
    """The local rank's GPU, also where a scheduler shows each rank its own alone; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def hadamard(size: int, device: torch.device) -> Tensor:
    """`size size`, a power of two: H_2n = [[H, H], [H, -H]]."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b: apart, so that a broken device can be put in its place."""
    torch.mm(a, b, out=out)


def check_product(device: torch.device) -> Product:
    """Many products, first for the speed, then each compared with the answer."""
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    a = hadamard(size, device)
    b, out = a.T.contiguous(), torch.empty_like(a)
    multiply(a, b, out)
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(TIMED):
        multiply(a, b, out)
    synchronize(device)
    seconds = (time.perf_counter() - begin) / TIMED
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(CHECKED):
        multiply(a, b, out)
        out.diagonal().sub_(size)
        wrong += (out != 0).sum()  # not a number is not 0 either
    return Product(int(wrong), CHECKED * size * size, 2 * size**3 / seconds / 1e12)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> float | None:
    """Gigabytes of a GPU that nobody holds; None of the CPU. Asked before this process has made its own tensors."""
    return torch.cuda.mem_get_info(device)[0] / GB if device.type == "cuda" else None
