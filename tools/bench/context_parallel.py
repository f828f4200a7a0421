"""Attention over several ranks: our Ulysses, ring and hybrid against what others offer, on the same kernel.

    python tools/bench/context_parallel.py [--ranks 2 4] [--tokens N] [--heads H] [--repeats N] [--json OUT]

For each number of ranks: all our layouts, and every peer of attention_peers.py over the same ranks, forward and
backward of one layer, interleaved in one run (interleave.py). First the result and the gradients of all must agree with
attention of all tokens in one process, in float64. A block's wall time is the slowest rank's, its CPU time the sum over
the ranks. Starts its ranks itself: on gloo, or with a GPU for each rank on NCCL.

A ratio is peer / ours: above 1 ours is faster. What a rank sends is as our groups counted it.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_peers import Attention, build_peers
from einops import rearrange
from interleave import Timing, interleave, ratio_lines, time_lines
from machine import machine
from ranks import Together, run_ranks, synchronise
from torch import Tensor

from framework.environment import Environment, read_environment
from framework.kernels.attention import build_attention
from framework.kernels.config import AttentionConfig
from framework.parallel.config import MeshShape
from framework.parallel.context_parallel.attention import ContextAttention
from framework.parallel.context_parallel.tokens import token_layout
from framework.parallel.mesh import Mesh, build_mesh
from framework.parallel.zero.deepspeed import quiet

WARMUP = 2
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}  # largest difference / largest value


@dataclass(frozen=True)
class Problem:
    """One layer's q, k, v and the gradient of its result: `B S H d` of all tokens."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """The same on every rank."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.tokens, self.heads, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))


def layouts(num_ranks: int) -> dict[str, MeshShape]:
    """Our ways to lay out the tokens over the ranks, by name: Ulysses inside, ring outside."""
    pairs = [(ring, num_ranks // ring) for ring in range(1, num_ranks + 1) if num_ranks % ring == 0]
    return {f"r{ring}u{ulysses}": MeshShape(1, ring, ulysses, 1) for ring, ulysses in pairs}


def ours(mesh: Mesh, num_tokens: int, kernel: ContextAttention) -> Attention:
    """The product's own self-attention."""
    return partial(kernel, layout=token_layout(num_tokens, mesh))


def differentiate(attention: Attention, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    out = attention(*inputs)
    return out, *torch.autograd.grad(out, inputs, dout)


def check(contestants: dict[str, Attention], problem: Problem, own: tuple[Tensor, ...], index: int) -> dict[str, float]:
    """The largest difference of out, dq, dk or dv from one process in float64, relative to its largest value."""
    num_ranks = problem.tokens // own[0].shape[1]
    *inputs, dout = (rearrange(x.double(), "b s h d -> b h s d") for x in problem.tensors(own[0].device))
    wanted = differentiate(F.scaled_dot_product_attention, [x.requires_grad_() for x in inputs], dout)
    parts = [rearrange(x, "b h s d -> b s h d").chunk(num_ranks, dim=1)[index] for x in wanted]
    worst = {}
    for name, attention in contestants.items():
        got = differentiate(attention, list(own[:3]), own[3])
        scaled = zip(got, parts, wanted, strict=True)
        worst[name] = max(float((a - b).detach().abs().max() / whole.detach().abs().max()) for a, b, whole in scaled)
        assert worst[name] <= TOLERANCE[problem.dtype], f"{name} differs from one process by {worst[name]}"
    return worst


@dataclass(frozen=True)
class Result:
    """One number of ranks. sends: bytes and collectives of a layer by our layouts. worst: difference of the check."""

    ranks: int
    problem: Problem
    sends: dict[str, tuple[int, int]]
    worst: dict[str, float]
    left_out: list[str]
    timings: dict[str, Timing]


def measure(env: Environment, problem: Problem, *, num_repeats: int, num_steps: int) -> Result:
    """Check and time the contestants on the ranks that there are. A collective."""
    device = torch.device("cuda", env.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    kernel = build_attention(AttentionConfig())
    meshes = {name: build_mesh(shape, env.rank) for name, shape in layouts(env.world_size).items()}
    own = tuple(x.chunk(env.world_size, dim=1)[env.rank].contiguous() for x in problem.tensors(device))
    for x in own[:3]:
        x.requires_grad_()
    world = next(iter(meshes.values())).world
    with ExitStack() as stack:
        contestants = {name: ours(mesh, problem.tokens, ContextAttention(kernel)) for name, mesh in meshes.items()}
        peers, left_out = build_peers(world, kernel, num_tokens=problem.tokens, num_heads=problem.heads, stack=stack)
        worst = check(contestants | peers, problem, own, env.rank)
        sends = {name: sent(mesh) for name, mesh in meshes.items()}  # counted by the check: one layer
        steps = {name: timed(attention, own) for name, attention in (contestants | peers).items()}
        timings = interleave(steps, num_repeats=num_repeats, num_steps=num_steps, warmup=WARMUP, timer=Together(world))
    return Result(env.world_size, problem, sends, worst, left_out, timings)


def timed(attention: Attention, own: tuple[Tensor, ...]) -> Callable[[], None]:
    def step() -> None:
        differentiate(attention, list(own[:3]), own[3])
        synchronise()

    return step


def sent(mesh: Mesh) -> tuple[int, int]:
    """Bytes and calls that this rank's groups have counted."""
    traffics = [group.traffic for group in (mesh.ulysses, mesh.ring)]
    return sum(sum(t.num_bytes.values()) for t in traffics), sum(sum(t.calls.values()) for t in traffics)


def lines(result: Result) -> Iterator[str]:
    """A number of ranks as text."""
    problem = result.problem
    yield (
        f"\n{result.ranks} ranks: {problem.batch} x {problem.tokens} tokens, {problem.heads} heads of "
        f"{problem.head_dim}, {problem.dtype}; all within {max(result.worst.values()):.1e} of one process in float64"
    )
    yield from result.left_out
    for name, (num_bytes, calls) in result.sends.items():
        yield f"{name}: a rank sends {num_bytes} bytes in {calls} collectives"
    yield from time_lines(result.timings, "ms a layer")
    peers = [name for name in result.timings if name not in result.sends]
    yield from ratio_lines(result.timings, [(peer, mine) for mine in result.sends for peer in peers])


def run_rank(env: Environment, given: argparse.Namespace) -> None:
    """A rank: measure, and as the first one print and write."""
    quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(env.local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=env.rank, world_size=env.world_size, timeout=timedelta(minutes=5))
    problem = Problem(given.batch, given.tokens, given.heads, given.head_dim, given.dtype)
    if problem.tokens % env.world_size:
        raise ValueError(f"--tokens must be a multiple of the ranks: {problem.tokens} % {env.world_size} != 0")
    result = measure(env, problem, num_repeats=given.repeats, num_steps=given.steps_a_repeat)
    if env.rank == 0:
        about = machine("deepspeed")
        print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
        print("\n".join(lines(result)), flush=True)
        if given.json:
            given.json.write_text(json.dumps({"machine": about, "results": [asdict(result)]}, indent=1))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--repeats", type=int, default=28, help="blocks of each contestant; at least 7 for a claim")
    parser.add_argument("--steps-a-repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    env = read_environment()
    if env is not None:
        run_rank(env, given)
        return
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in given.ranks:
            part = Path(folder) / f"{num_ranks}.json"
            run_ranks([*sys.argv[1:], "--json", str(part)], num_ranks)
            parts.append(json.loads(part.read_text()))
    if given.json:
        results = [result for part in parts for result in part["results"]]
        given.json.write_text(json.dumps({"machine": parts[0]["machine"], "results": results}, indent=1))


if __name__ == "__main__":
    main()
