"""One rank of a large job, alone on one device: the product's own model, engine and token split, with neighbours that
aren't there.

The process group is torch's fake one: it has the job's size and this process as its first rank, so ZeRO partitions
over all ranks, and the tokens and heads of this one are those of the first in the job. What a collective would receive
is made by copies of as many bytes on the device:

    all-gather, reduce-scatter, all-to-all    the fake group copies this rank's part into every place
    ring exchange                             the fake group does nothing; here a clone stands in for the message
    all-reduce, broadcast                     nothing: in these jobs (tp 1) they are single numbers

So buffers and memory traffic are real and no network is waited for. Values are without meaning, but they are numbers
of ordinary size: weights are drawn, as zeros would run faster than anything real.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from unittest.mock import patch

import torch
import torch.distributed as dist
from rates import seconds_of_block
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from framework.batch import Condition, Noised
from framework.diffusion.flow import Flow
from framework.ema import Ema
from framework.models.config import ModelConfig
from framework.models.patchify import patchify
from framework.parallel.collectives import num_bytes
from framework.parallel.config import MeshShape
from framework.parallel.context_parallel import ring
from framework.parallel.context_parallel.tokens import split_tokens
from framework.parallel.mesh import Group, Mesh, Traffic, make_groups
from framework.parallel.zero.engine import Engine
from framework.programs import build
from framework.recipe import Recipe
from framework.shapes import LatentShape, token_shape

WEIGHT_STD = 0.02
LR = 1e-5


@dataclass(frozen=True)
class Work:
    """What a rank's step holds: one sample of this latent on its replica, and so many text tokens."""

    model: ModelConfig
    latent: LatentShape
    text: int

    @property
    def num_tokens(self) -> int:
        return token_shape(self.latent, self.model.patch_size).num_tokens


@dataclass(frozen=True)
class Measured:
    """seconds: of each timed step. reserved: peak bytes of the allocator, None on the CPU. sent: bytes by group.
    num_parameters: of the whole model.
    """

    seconds: tuple[float, ...]
    reserved: int | None
    sent: dict[str, int]
    num_parameters: int


def copied_exchange(tensor: Tensor, group: Group, purpose: str) -> Callable[[], Tensor]:
    """`ring_exchange` with a neighbour that sends what it is sent."""
    group.traffic.count(purpose, num_bytes(tensor))
    received = tensor.clone()
    return lambda: received


@contextmanager
def alone(shape: MeshShape) -> Iterator[Mesh]:
    """The mesh of the first rank of a job."""
    dist.init_process_group("fake", rank=0, world_size=shape.world_size, store=FakeStore())
    try:
        check_copies(shape.world_size)
        groups = make_groups(shape, 0, {tuple(range(shape.world_size)): dist.group.WORLD})
        control = replace(groups["world"], name="control", traffic=Traffic())
        with patch.object(ring, "ring_exchange", copied_exchange):
            yield Mesh(shape=shape, rank=0, control=control, splits={}, **groups)
    finally:
        dist.destroy_process_group()


def check_copies(world_size: int) -> None:
    """Raises RuntimeError where torch's fake group moves no bytes, as releases before 2.9 may: nothing would be
    measured.
    """
    parts = torch.zeros(world_size)
    dist.all_gather_into_tensor(parts, torch.ones(1))
    if parts.sum() != world_size:
        raise RuntimeError(f"the fake process group of torch {torch.__version__} doesn't copy: take a newer torch")


def draw_weights(engine: Engine) -> None:
    """Fill the master weights that this rank holds."""
    for fragment in engine.fragments():
        if fragment.state == "model":
            fragment.flat.normal_(0.0, WEIGHT_STD)
    engine.refresh(updates=0)


def draw_batch(work: Work, device: torch.device) -> tuple[Noised, Condition]:
    """One noised sample and its text."""
    model, latent = work.model, work.latent
    shape = (1, model.in_channels, latent.frames, latent.height, latent.width)
    noised = Noised(
        latents=torch.randn(shape, device=device),
        target=torch.randn(shape, device=device),
        timesteps=torch.full((1, latent.frames // model.patch_size[0]), 500.0, device=device),
        weights=torch.ones(1, device=device),
    )
    return noised, Condition(torch.randn(1, work.text, model.text_dim, device=device))


def build_step(recipe: Recipe, mesh: Mesh, engine: Engine, work: Work, *, ema: Ema) -> Callable[[], None]:
    """A step as the training loop makes it: tokens, forward, loss, backward, update, average; one micro-batch."""
    flow: Flow = build.build_flow(recipe)
    noised, condition = draw_batch(work, build.this_device())
    count = flow.global_count((mesh.dp.size,), [work.latent], work.model.out_channels)

    def step() -> None:
        tokens = split_tokens(patchify(noised, work.model.patch_size), mesh, recipe.attention.pattern)
        loss = engine.scored(tokens, condition, flow.score(tokens)).sum()
        engine.backward(loss, global_count=count, last=True)
        stats = engine.step(lr=LR)
        assert not stats.skipped, "the gradient's norm isn't finite, so nothing was updated"
        ema.update(step=1)

    return step


def measure(recipe: Recipe, shape: MeshShape, work: Work, *, num_steps: int, warmup: int) -> Measured:
    """Time the steps of one rank."""
    device = build.this_device()
    with alone(shape) as mesh:
        model, shards = build.build_model(recipe, mesh)
        engine = build.build_engine(recipe, model, shards, mesh)
        draw_weights(engine)
        ema = Ema(engine.fragments(), recipe.ema)
        step = build_step(recipe, mesh, engine, work, ema=ema)
        for _ in range(warmup):
            step()
        before = sent_by_group(mesh)
        step()
        sent = {name: after - before.get(name, 0) for name, after in sent_by_group(mesh).items()}
        seconds = tuple(seconds_of_block(step, 1, device) for _ in range(num_steps))
        # Of all steps, the first included: a run must live through its start too.
        reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
        engine.destroy()
    num_parameters = sum(prod(shard.global_shape) for shard in shards)
    return Measured(seconds, reserved, sent, num_parameters)


def sent_by_group(mesh: Mesh) -> dict[str, int]:
    """Bytes that our own collectives have sent; what the engine sends isn't among them."""
    return {group.name: int(sum(group.traffic.num_bytes.values())) for group in mesh.groups() if group.size > 1}
