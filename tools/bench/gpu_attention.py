"""Attention kernels on one GPU: behind our seam against the same kernel called directly, and a ring's blocks against
one call.

    python tools/bench/gpu_attention.py [--tokens 8k 32k 75k] [--heads 40 5] [--kernels flash cudnn aten] [--json OUT]
    python tools/bench/gpu_attention.py --device cpu --tokens tiny --heads 2        # the machinery, anywhere

Full attention, d = 128, bfloat16, one sample. TFLOP/s are model FLOPs: 4 S L H d forward, twice that backward.

    seam      forward and backward of the kernel as the ring calls them
    direct    the library's own differentiable function (flash-attn's, or torch's with that backend), forward + backward
    share     direct / ours, seconds of forward and backward together, ours through autograd as a model calls it
    ring      a rank of 8: S / 8 queries, the keys in 8 blocks with their merge, no network, against one call over all.
              The goal is 95 %.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rates import AttentionShape, attention_rates, seconds_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel, attend, build_attention
from framework.kernels.config import (
    AttentionConfig,
    AttentionNeeds,
    check_attention,
    fitting_flash,
    installed_flash,
)
from framework.parallel.context_parallel import ring
from framework.parallel.mesh import Group

TOKENS = {"tiny": 96, "8k": 8_192, "32k": 32_760, "75k": 75_600}
RANKS, GOAL_SEAM, GOAL_RING = 8, 0.98, 0.95
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "aten": SDPBackend.FLASH_ATTENTION, "reference": SDPBackend.MATH}
Direct = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One kernel at one size. forward, backward: seconds of the pair; ours, direct: of both through autograd."""

    kernel: str
    tokens: int
    heads: int
    flops: float
    forward: float
    backward: float
    ours: float
    direct: float


@dataclass(frozen=True)
class RingRow:
    """A rank's blocks against one call; seconds of forward and backward."""

    kernel: str
    tokens: int
    heads: int
    one_shot: float
    blocks: float


def direct_call(kernel: str) -> Direct:
    """The function that a user of the library would call: `B S H d` in and out, differentiable."""
    if kernel == "flash":
        match fitting_flash(installed_flash(), torch.cuda.get_device_capability(), deterministic=False):
            case 2:
                from flash_attn import flash_attn_func
            case 3:
                from flash_attn_interface import flash_attn_func
            case _:
                from flash_attn.cute import flash_attn_func

        def call_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_func(q, k, v)
            result: Tensor = out[0] if isinstance(out, tuple) else out
            return result

        return call_flash

    def call_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[kernel]):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return call_torch


def both_ways(call: Direct, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """Forward and backward of a differentiable function."""
    q, k, v, dout = tensors
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> object:
        return torch.autograd.grad(call(*leaves), leaves, dout)

    return run


def measure(name: str, kernel: AttentionKernel, shape: AttentionShape, like: Tensor) -> Row:
    """A kernel at one size."""
    forward, backward = attention_rates(kernel, shape, like)
    ours = both_ways(lambda q, k, v: attend(kernel, q, k, v, None), shape.tensors(like))
    direct = both_ways(direct_call(name), shape.tensors(like))
    # In turn, so that a clock that falls with the heat slows both.
    seconds = [seconds_of(call, like.device) for call in (ours, direct, direct, ours)]
    return Row(
        kernel=name,
        tokens=shape.queries,
        heads=shape.heads,
        flops=3 * shape.flops,
        forward=forward.seconds,
        backward=backward.seconds,
        ours=(seconds[0] + seconds[3]) / 2,
        direct=(seconds[1] + seconds[2]) / 2,
    )


@contextmanager
def neighbour(blocks: Tensor) -> Iterator[None]:
    """A ring neighbour that hands on the next of `n 2 B S H d` at once, and returns gradients as they are."""
    step = 0

    def exchange(tensor: Tensor, group: Group, purpose: str) -> Callable[[], Tensor]:
        nonlocal step
        if purpose == "ring_gradients":
            return lambda: tensor
        step += 1
        there = blocks[-step % group.size]
        return lambda: there

    with patch.object(ring, "ring_exchange", exchange):
        yield


def measure_ring(name: str, kernel: AttentionKernel, shape: AttentionShape, like: Tensor) -> RingRow:
    """A rank of RANKS at one size: its queries against all keys, at once and in blocks."""
    part = shape.queries // RANKS
    q, k, v, dout = AttentionShape(1, part, part * RANKS, shape.heads, shape.head_dim).tensors(like)
    blocks = torch.stack([torch.stack(pair) for pair in zip(k.split(part, 1), v.split(part, 1), strict=True)])
    group, valid = Group("ring", tuple(range(RANKS)), 0, None), (part,) * RANKS

    def one_shot() -> None:
        out, lse = kernel.forward(q, k, v, None)
        kernel.backward(dout, Attended(q, k, v, out, lse), None)

    def in_blocks() -> None:
        with neighbour(blocks):
            out, lse = ring.ring_forward(kernel, q, *blocks[0], valid, group)
        with neighbour(blocks):
            ring.ring_backward(kernel, dout, Attended(q, *blocks[0], out, lse), valid, group)

    seconds = [seconds_of(call, like.device) for call in (one_shot, in_blocks, in_blocks, one_shot)]
    return RingRow(name, shape.queries, shape.heads, (seconds[0] + seconds[3]) / 2, (seconds[1] + seconds[2]) / 2)


def print_rows(rows: list[Row], rings: list[RingRow]) -> None:
    print(f"\n{'kernel':10}{'tokens':>8}{'heads':>6}{'forward':>9}{'backward':>9}{'both':>8}{'direct':>8}   share")
    for row in rows:
        thirds = (row.flops / 3 / row.forward, row.flops * 2 / 3 / row.backward)
        speeds = [speed / 1e12 for speed in (*thirds, row.flops / row.ours, row.flops / row.direct)]
        share = row.direct / row.ours
        print(
            f"{row.kernel:10}{row.tokens:8}{row.heads:6}{speeds[0]:9.2f}{speeds[1]:9.2f}{speeds[2]:8.2f}"
            f"{speeds[3]:8.2f}   {share:.1%} {verdict(share, GOAL_SEAM)}"
        )
    print(f"\n{'kernel':10}{'tokens':>8}{'heads':>6}{'one call':>11}{f'{RANKS} blocks':>11}   share (ms)")
    for ring_row in rings:
        share = ring_row.one_shot / ring_row.blocks
        print(
            f"{ring_row.kernel:10}{ring_row.tokens:8}{ring_row.heads:6}{1e3 * ring_row.one_shot:11.3f}"
            f"{1e3 * ring_row.blocks:11.3f}   {share:.1%} {verdict(share, GOAL_RING)}"
        )


def verdict(share: float, goal: float) -> str:
    return f"(goal {goal:.0%}: {'met' if share >= goal else 'MISSED'})"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", nargs="+", choices=list(TOKENS), default=["8k", "32k", "75k"])
    parser.add_argument("--heads", nargs="+", type=int, default=[40, 5], help="40 is Wan 14B, 5 a rank of Ulysses 8")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kernels", nargs="+", choices=["flash", "cudnn", "aten"], default=["flash", "cudnn", "aten"])
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    parser = build_parser()
    given = parser.parse_args()
    has_gpu = given.device == "cuda"
    if not has_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything has asked for a GPU
    elif not torch.cuda.is_available():
        parser.error("no GPU is visible: --device cpu --tokens tiny tries the machinery")
    needs = AttentionNeeds("bfloat16" if has_gpu else "float32", given.head_dim, deterministic=False, has_gpu=has_gpu)
    like = torch.empty(0, device=given.device, dtype=getattr(torch, needs.dtype))
    device = torch.cuda.get_device_name() if has_gpu else "cpu"
    print(f"one {device}, torch {torch.__version__}, {needs.dtype}, d = {given.head_dim}; TFLOP/s")
    rows, rings = [], []
    for name in given.kernels:
        try:
            check_attention(AttentionConfig(name), needs, installed_flash())
            kernel = build_attention(AttentionConfig(name))
        except ValueError as error:
            print(f"left out: {error}")
            continue
        for tokens in (TOKENS[word] for word in given.tokens):
            for heads in given.heads:
                shape = AttentionShape(1, tokens, tokens, heads, given.head_dim)
                rows.append(measure(name, kernel, shape, like))
                rings.append(measure_ring(name, kernel, shape, like))
    print_rows(rows, rings)
    if given.json:
        found = {"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(found | {"rings": [asdict(row) for row in rings]}, indent=1))


if __name__ == "__main__":
    main()
