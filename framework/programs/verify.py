"""`cuboid verify`: whether a recipe computes the same on several meshes.

On each mesh the recipe's own step runs, on its own data, from its own initial weights, but for two things. The initial
zeros of the head and of the adapters' B would hide every gradient behind them, so these get known values. And AdamW's
eps is at least EPS: with a small one an update is g / |g| whatever the size of g, so that a gradient off by a factor
leaves the weights as they are, while the rounding of a g near zero moves them by a whole step. What is compared with
the first mesh:

    samples    which were drawn, and the bits of their latents, noise, noised latents, target and timesteps
    gradient   d(global mean loss) / d(global tensor) of the first step, after accumulation and reduction over zero,
               before clipping, put together from the engine's fragments
    norm, loss of every step;  weights after the last

How far apart two such runs may be stands in `evaluate/agreement.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from framework.batch import Batch, Noised
from framework.data.buckets import streams_of
from framework.ema import Ema
from framework.environment import Environment
from framework.evaluate.agreement import Observation
from framework.keys import key
from framework.models.config import LORA_B
from framework.models.layers import compute_dtype
from framework.optim import learning_rate
from framework.parallel.collectives import gather_fragments, gather_objects, summed
from framework.parallel.config import resolve_mesh
from framework.parallel.mesh import close_mesh
from framework.programs import build
from framework.programs.parts import Objective, Parts, build_parts
from framework.programs.train import accumulate
from framework.recipe import Recipe

HEAD = "proj_out.weight"
HEAD_STD = 0.1
EPS = 1e-2
# Each rank of a job may have a shrunk recipe, and its latents, in a folder of its own; the samples are compared anyway.
PATHS = ("run", "data.streams")


class RecordingFlow:
    """The objective, noting what it noised. Everything else is the inner one's."""

    def __init__(self, inner: Objective) -> None:
        self.samples: dict[str, str] = {}
        self.score, self.global_count = inner.score, inner.global_count
        self._inner = inner

    def noise(self, batch: Batch, *, step: int) -> Noised:
        """See `Flow.noise`."""
        noised = self._inner.noise(batch, step=step)
        for i, draw in enumerate(batch.draws):
            if draw:
                seen = (batch.latents[i], noised.latents[i], noised.target[i], noised.timesteps[i])
                self.samples[f"{step}:{draw}"] = digest(*seen)
        return noised


def digest(*tensors: Tensor) -> str:
    """A hash of the bits of some tensors."""
    data = (tensor.contiguous().cpu().numpy().tobytes() for tensor in tensors)
    return hashlib.blake2b(b"".join(data), digest_size=16).hexdigest()


def observe(recipe: Recipe, env: Environment, *, steps: int) -> Observation | None:
    """Run the recipe's first steps on this rank's mesh; the observation on rank 0, None elsewhere. A collective.

    steps: optimizer steps; 0 takes the first gradient only.
    """
    recipe = build.settle(recipe, env)
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, eps=max(recipe.optimizer.eps, EPS)))
    mesh = build.open_mesh(recipe, env, apart=PATHS)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    for fragment in engine.fragments():
        name = fragment.shard.name
        if fragment.state == "model" and (name == HEAD or name.endswith(f".{LORA_B}.weight")):
            generator = torch.Generator().manual_seed(key(recipe.seed, "verify", uid=name))
            fragment.copy_from(torch.randn(fragment.shard.global_shape, generator=generator) * HEAD_STD)
    engine.refresh(updates=0)
    needed = replace(recipe, train=replace(recipe.train, steps=max(1, steps)))
    ema = Ema([], recipe.ema)
    streams = streams_of(recipe)
    parts = build_parts(needed, mesh, engine, streams=streams, ema=ema, encoders=build.Encoders(recipe))
    flow = RecordingFlow(parts.flow)
    parts = replace(parts, flow=flow)
    losses: list[float] = []
    norms: list[float] = []
    gradients: dict[str, np.ndarray] = {}
    for step in range(max(1, steps)):
        loss, found = one_step(parts, gather=step == 0, update=step < steps)
        losses.append(loss)
        norms.append(found.norm)
        gradients = gradients or found.gradients
    parts.loader.close()
    weights = gather_fragments([f for f in engine.fragments() if f.state == "model"], mesh.control)
    everywhere = gather_objects(flow.samples, mesh.control)
    engine.destroy()
    close_mesh(mesh)
    if mesh.rank != 0:
        return None
    return Observation(
        samples=agreed(everywhere),
        gradients=gradients,
        weights={name: value.to(compute_dtype(value.dtype)).numpy() for name, value in weights.items()},
        losses=tuple(losses),
        norms=tuple(norms),
    )


def observe_all(recipes: Sequence[Recipe], env: Environment, *, steps: int) -> list[Observation]:
    """Every recipe on this job's ranks, one after the other; empty on all ranks but the first. Raises ValueError when
    one of the meshes hasn't the job's number of ranks.
    """
    for recipe in recipes:
        resolve_mesh(recipe.mesh, num_ranks=env.world_size, heads=recipe.model.num_attention_heads)
    found = [observe(recipe, env, steps=steps) for recipe in recipes]
    return [observation for observation in found if observation is not None]


@dataclass(frozen=True)
class Found:
    """Of a step: the gradient's norm as the engine tells it, and on rank 0 the gradient."""

    norm: float
    gradients: dict[str, np.ndarray]


def one_step(parts: Parts, *, gather: bool, update: bool) -> tuple[float, Found]:
    """A step of the loop, with a look at the gradient before the update. Returns the global mean loss."""
    work = parts.loader.next_work()
    losses = accumulate(parts, work)
    gradients = gather_fragments(parts.engine.gradients(), parts.mesh.control) if gather else {}
    lr = learning_rate(parts.recipe.optimizer, step=work.step) if update else 0.0
    stats = parts.engine.step(lr=lr)
    local = torch.stack([loss.double() for loss, _ in losses]).sum().cpu()
    total = summed(local, parts.mesh.control, "loss")
    return float(total) / parts.own_count(work), Found(
        stats.grad_norm, {name: value.numpy() for name, value in gradients.items()}
    )


def agreed(everywhere: list[dict[str, str]]) -> dict[str, str]:
    """The samples of all ranks; those that ranks of one replica saw differently are marked."""
    samples: dict[str, str] = {}
    for rank in everywhere:
        for draw, value in rank.items():
            if samples.setdefault(draw, value) != value:
                samples[draw] = "differs between ranks"
    return samples
