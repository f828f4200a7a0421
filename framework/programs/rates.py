"""What one rank's device reaches, measured: matrix products, attention, a block's other operations, the update.

The numbers are for the formulas of plan/work.py. A block's time that isn't products or attention is kernels * launch +
bytes / bandwidth: with few tokens the first, with many the second, so that one gives the other.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from framework.config import OptimizerConfig
from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel, build_attention
from framework.kernels.config import AttentionConfig
from framework.models.config import ModelConfig
from framework.models.dit import Block, Context
from framework.optim import adamw
from framework.parallel.config import MeshShape
from framework.plan.flops import attention_flops, block_flops
from framework.plan.traffic import MicroShape
from framework.plan.work import ATTENTION_BACKWARD, BACKWARD_BYTES, BACKWARD_KERNELS, block_kernels, moved_bytes
from framework.plan.work import update_bytes as bytes_of_update
from framework.recipe import Recipe

REPEATS = 7
BATCH_SECONDS = 0.02  # of a repeat; on a GPU many calls are needed to fill its queue
TEXT = 64


@dataclass(frozen=True)
class Scale:
    """Sizes to measure at: of a machine without a GPU, and of one. width, hidden: of the block. tokens: few, many."""

    heads: int
    head_dim: int
    hidden: int
    few: int
    many: int
    products: tuple[tuple[int, int, int], ...]  # rows, in, out
    update: int  # elements


ON_CPU = Scale(4, 64, 1024, 16, 768, ((768, 256, 256), (768, 256, 1024), (2048, 512, 512)), 3_000_000)
ON_GPU = Scale(40, 128, 13824, 64, 9360, ((9360, 5120, 5120), (9360, 5120, 13824), (9360, 13824, 5120)), 200_000_000)


@dataclass(frozen=True)
class BlockTimes:
    """Of a block forward and backward, beside its products and attention: seconds with few and with many tokens,
    kernels, and bytes moved for many.
    """

    few: float
    many: float
    kernels: int
    moved: float

    @property
    def launch(self) -> float:
        """Seconds of the host for a kernel."""
        return self.few / self.kernels

    def bandwidth(self, launch: float) -> float:
        """Bytes/s, where a kernel takes the host so long. launch: 0 where the host runs ahead."""
        return self.moved / max(0.05 * self.many, self.many - launch * self.kernels)


@dataclass(frozen=True)
class Rates:
    """See plan/hardware.py. matmul: by dtype. kernel: whose attention it is."""

    matmul: dict[str, float]
    kernel: str
    attention: tuple[float, float]
    block: "BlockTimes"
    update: float
    host_bandwidth: float
    host_memory: float


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call. On a CPU the thread's own, which leaves out what other processes take."""
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    call()
    wait(device)
    begin = clock()
    call()
    wait(device)
    count = max(1, int(BATCH_SECONDS / max(1e-6, clock() - begin)))
    found = []
    for _ in range(REPEATS):
        begin = clock()
        for _ in range(count):
            call()
        wait(device)
        found.append((clock() - begin) / count)
    return statistics.median(found)


def wait(device: torch.device) -> None:
    """For what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(device: torch.device, kernel: str) -> Rates:
    """Of this rank's device. kernel: of attention, by its name."""
    scale = ON_GPU if device.type == "cuda" else ON_CPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    matmul = {each: product_rate(scale, getattr(torch, each), device) for each in ("float32", "bfloat16")}
    attend = build_attention(AttentionConfig(kernel))  # type: ignore[arg-type]
    attention = attention_rates(scale, attend, dtype, device)
    return Rates(
        matmul=matmul,
        kernel=kernel,
        attention=attention,
        block=block_times(scale, attend, device, matmul[name], attention),
        update=update_rate(scale, device),
        host_bandwidth=copy_rate(device),
        host_memory=2 * copy_rate(torch.device("cpu")),  # read and written
    )


def product_rate(scale: Scale, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of linears, forward and backward, of a block's shapes together."""
    flops, spent = 0.0, 0.0
    for rows, in_dim, out_dim in scale.products:
        linear = nn.Linear(in_dim, out_dim, device=device, dtype=dtype)
        x = torch.randn(rows, in_dim, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, out_dim, device=device, dtype=dtype)

        def both(linear: nn.Linear = linear, x: Tensor = x, grad: Tensor = grad) -> None:
            torch.autograd.grad(linear(x), (x, linear.weight), grad)

        spent += seconds_of(both, device)
        flops += 3 * 2 * rows * in_dim * out_dim
    return flops / spent


def attention_rates(
    scale: Scale, kernel: AttentionKernel, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """FLOP/s of the kernel's forward, and of its backward counted as 2.5 times the FLOPs."""
    shape = (1, scale.many, scale.heads, scale.head_dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    out, lse = kernel.forward(q, k, v, None)
    flops = attention_flops(scale.many**2, scale.heads * scale.head_dim)
    forward = seconds_of(lambda: kernel.forward(q, k, v, None), device)
    backward = seconds_of(lambda: kernel.backward(dout, Attended(q, k, v, out, lse), None), device)
    return flops / forward, ATTENTION_BACKWARD * flops / backward


def block_times(
    scale: Scale, kernel: AttentionKernel, device: torch.device, product: float, attention: tuple[float, float]
) -> BlockTimes:
    """Of a block of the model. product, attention: the FLOP/s that were measured."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = ModelConfig(
        num_attention_heads=scale.heads, attention_head_dim=scale.head_dim, ffn_dim=scale.hidden, num_layers=1
    )
    recipe = precise_recipe(Recipe(model=model), str(dtype).removeprefix("torch."))
    with torch.device(device):
        block = Block(model, kernel).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)

    def rest(tokens: int) -> float:
        flops = block_flops(model, tokens=tokens, text=TEXT)
        known = 3 * flops.linears / product
        known += flops.attention * (1 / attention[0] + ATTENTION_BACKWARD / attention[1])
        return max(1e-9, seconds_of(block_call(block, tokens, dtype, device), device) - known)

    moved = moved_bytes(recipe, MeshShape(1, 1, 1, 1), MicroShape(0, 1, TEXT), scale.many) * (1 + BACKWARD_BYTES)
    return BlockTimes(rest(scale.few), rest(scale.many), block_kernels(recipe) * (1 + BACKWARD_KERNELS), moved)


def precise_recipe(recipe: Recipe, dtype: str) -> Recipe:
    """The recipe in a dtype."""
    assert dtype in ("float32", "bfloat16", "float64")
    return replace(recipe, precision=replace(recipe.precision, parameters=dtype))  # type: ignore[arg-type]


def block_call(block: Block, tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A block's forward and backward on one sample of so many tokens."""
    width, wide = block.attn1.to_q.in_features, torch.promote_types(dtype, torch.float32)
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    modulation = torch.randn(1, 1, 6, width, device=device, dtype=wide, requires_grad=True)
    text = torch.randn(1, TEXT, width, device=device, dtype=dtype, requires_grad=True)
    angles = torch.zeros(1, tokens, 1, block.attn1.head_dim // 2, device=device)
    rotation, grad = torch.polar(torch.ones_like(angles), angles), torch.randn_like(x)
    inputs = (x, modulation, text, *block.parameters())

    def call() -> object:
        out = block(x, modulation, None, rotation, Context(text, None, None), None)
        return torch.autograd.grad(out, inputs, grad)

    return call


def update_rate(scale: Scale, device: torch.device) -> float:
    """Bytes/s of AdamW and the average, on one flat tensor."""
    weight = nn.Parameter(torch.zeros(scale.update, device=device))
    weight.grad = torch.full_like(weight, 1e-3)
    average = torch.zeros_like(weight, requires_grad=False)
    optimizer = adamw([("weight", weight)], OptimizerConfig())

    def step() -> None:
        assert weight.grad is not None
        torch.linalg.vector_norm(weight.grad)
        weight.grad.mul_(1.0)
        optimizer.step()
        average.lerp_(weight.detach(), 0.5)

    # What is left out beside: the cast and the cleared gradient.
    return scale.update * (bytes_of_update(Recipe()) - 3 * 4) / seconds_of(step, device)


def copy_rate(device: torch.device) -> float:
    """Bytes/s from host memory to the device."""
    size = 1 << 28 if device.type == "cuda" else 1 << 24
    here = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return size / seconds_of(lambda: there.copy_(here, non_blocking=True), device)
