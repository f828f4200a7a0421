"""Attention by a pattern on a mesh, against a dense mask on one device, in float64."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from masked import CountingKernel, mask_of, masked_attention, name_of
from torch import Tensor

from framework.environment import Environment
from framework.kernels.aten import AtenAttention
from framework.kernels.config import PatternConfig
from framework.kernels.pattern import TokenPattern
from framework.parallel.config import MeshShape
from framework.parallel.context_parallel.attention import ContextAttention
from framework.parallel.context_parallel.tokens import token_layout
from framework.parallel.mesh import build_mesh

BATCH, HEADS, HEAD_DIM = 2, 4, 6


@dataclass(frozen=True)
class Case:
    """A pattern on clips of `frames` times `frame_tokens` tokens."""

    mesh: MeshShape
    pattern: PatternConfig
    frames: int
    frame_tokens: int

    def __str__(self) -> str:
        axes = f"r{self.mesh.ring}u{self.mesh.ulysses}tp{self.mesh.tp}"
        return f"{axes}-{name_of(self.pattern)}-{self.frames}x{self.frame_tokens}"


@dataclass(frozen=True)
class Found:
    """Worst errors of out, dq, dk, dv over the largest number of each. pairs: of the kernel's calls, forward and
    backward.
    """

    errors: dict[str, float]
    pairs: tuple[int, int]


def run_cases(env: Environment, cases: list[Case]) -> list[Found]:
    dist.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    return [run_case(case, env.rank) for case in cases]


def run_case(case: Case, rank: int) -> Found:
    mesh = build_mesh(case.mesh, rank)
    tokens = case.frames * case.frame_tokens
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(4, BATCH, tokens, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    q, k, v = (x.clone().requires_grad_() for x in whole[:3])
    out = masked_attention(q, k, v, mask_of(case.pattern, case.frames, case.frame_tokens))
    out.backward(whole[3])
    wanted = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    layout = token_layout(tokens, mesh, TokenPattern(case.pattern, case.frame_tokens))
    part = -(-tokens // mesh.replica.size) * mesh.tp.size
    first, heads = mesh.cp.index * part, HEADS // mesh.tp.size

    def mine(x: Tensor) -> Tensor:
        """The tokens of this rank of cp, with padding of ones that nobody may see, and the heads of this rank of tp."""
        held = x[:, first : first + part, mesh.tp.index * heads : (mesh.tp.index + 1) * heads]
        padding = torch.full((BATCH, part - held.shape[1], heads, HEAD_DIM), 1.0, dtype=x.dtype)
        return torch.cat([held, padding], 1)

    kernel = CountingKernel(AtenAttention())
    own = [mine(x).requires_grad_() for x in whole[:3]]
    got = ContextAttention(kernel)(*own, layout)
    got.backward(mine(whole[3]))
    found = {"out": got.detach(), "dq": own[0].grad, "dk": own[1].grad, "dv": own[2].grad}
    errors = {}
    for name, reference in wanted.items():
        assert reference is not None and found[name] is not None
        real = max(0, min(part, tokens - first))
        difference = found[name][:, :real] - mine(reference)[:, :real]  # type: ignore[index]
        errors[name] = float(difference.abs().max() / reference.abs().max()) if real else 0.0
    return Found(errors, (kernel.forwards, kernel.backwards))
