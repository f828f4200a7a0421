"""Seconds of a call, on the device's clock, and the rates of matmuls and attention kernels at a model's own shapes.

A linear is three products, each timed by itself, since their rates differ: forward, gradient of the input, gradient of
the weight. An attention kernel is its pair.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel
from framework.plan.flops import attention_flops, linear_flops

# Calls are timed in blocks of about so many seconds, so that a launch is never longer than what is launched.
BLOCK_SECONDS, MAX_CALLS, REPEATS, WARMUP = 0.05, 1000, 5, 2


@dataclass(frozen=True)
class Rate:
    """A call. flops: model FLOPs of one, which for a backward of attention are twice the forward's."""

    name: str
    flops: float
    seconds: float

    @property
    def teraflops(self) -> float:
        return self.flops / self.seconds / 1e12


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: the median block's."""
    for _ in range(WARMUP):
        call()
    once = seconds_of_block(call, 1, device)
    num_calls = max(1, min(MAX_CALLS, round(BLOCK_SECONDS / once)))
    return statistics.median(seconds_of_block(call, num_calls, device) for _ in range(REPEATS)) / num_calls


def seconds_of_block(call: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Seconds of some calls, by the device's clock."""
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(num_calls):
            call()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(num_calls):
        call()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / 1e3


def draw(*shape: int, like: Tensor) -> Tensor:
    """Normal numbers: zeros would draw less power, and so run faster than anything real."""
    return torch.randn(shape, device=like.device, dtype=like.dtype)


def linear_rates(num_rows: int, in_dim: int, out_dim: int, like: Tensor) -> tuple[Rate, Rate, Rate]:
    """Forward, gradient of the input and gradient of the weight. like: gives device and dtype."""
    x, weight, dy = (draw(*shape, like=like) for shape in ((num_rows, in_dim), (out_dim, in_dim), (num_rows, out_dim)))
    calls = {
        "forward": lambda: torch.nn.functional.linear(x, weight),
        "input": lambda: dy @ weight,
        "weight": lambda: dy.t() @ x,
    }
    flops, name = linear_flops(num_rows, in_dim, out_dim), f"linear {num_rows} x {in_dim} x {out_dim}"
    forward, inputs, weights = (
        Rate(f"{name}, {part}", flops, seconds_of(call, like.device)) for part, call in calls.items()
    )
    return forward, inputs, weights


@dataclass(frozen=True)
class AttentionShape:
    """One call of a kernel: samples, queries, keys, heads, channels of a head."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Of the forward."""
        return self.batch * attention_flops(self.queries * self.keys, self.heads * self.head_dim)

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout."""
        lengths = (self.queries, self.keys, self.keys, self.queries)
        q, k, v, dout = (draw(self.batch, n, self.heads, self.head_dim, like=like) for n in lengths)
        return q, k, v, dout


def attention_rates(kernel: AttentionKernel, shape: AttentionShape, like: Tensor) -> tuple[Rate, Rate]:
    """Forward and backward of a kernel."""
    q, k, v, dout = shape.tensors(like)
    out, lse = kernel.forward(q, k, v, None)
    attended = Attended(q, k, v, out, lse)
    name = f"attention {shape.queries} x {shape.keys} x {shape.heads} heads of {shape.head_dim}"
    return (
        Rate(f"{name}, forward", shape.flops, seconds_of(lambda: kernel.forward(q, k, v, None), like.device)),
        Rate(
            f"{name}, backward", 2 * shape.flops, seconds_of(lambda: kernel.backward(dout, attended, None), like.device)
        ),
    )
