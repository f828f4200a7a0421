"""What the ranks of the distributed tests do. Imported by the fork server, so importing this warms a rank up."""

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

# Imported for their warmth alone: what a rank would otherwise import at its first step takes 4 s of each.
import deepspeed.runtime.zero.muon.muon_optimizer
import mutations
import numpy as np
import streaming.base.format  # noqa: F401
import torch
import torch._dynamo
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

import framework.parallel.zero.deepspeed  # noqa: F401
from framework.checkpoint import writer
from framework.cli import train_rank
from framework.data.buckets import streams_of
from framework.environment import Environment
from framework.evaluate.agreement import Observation
from framework.heartbeat import Heart, process_began
from framework.models.patchify import patchify
from framework.parallel.collectives import gather_fragments
from framework.parallel.context_parallel.tokens import split_tokens
from framework.programs import build, verify
from framework.programs import train as program
from framework.recipe import Recipe, load_recipe, resolve_auto
from framework.run import Verdict, resolve_invocation

torch.set_num_threads(1)


@dataclass(frozen=True)
class Death:
    """Where a rank kills itself: before it takes the data of step `step` (from 0), or in the save after it, before it
    writes or commits.
    """

    step: int
    place: Literal["step", "write", "commit"] = "step"


def train(
    env: Environment, recipe: Path, overrides: list[str], death: Death | None = None, stage: int | None = None
) -> Verdict:
    """`cuboid train` on this rank."""
    if death is not None:
        arrange(death)
    return program.train(resolve_invocation(recipe, overrides), env, stage=stage)


def train_all(env: Environment, recipe: Path, overrides: list[str]) -> None:
    """The same where nobody says which stage: all that are left, in this process."""
    heart = Heart(begin=process_began(), writes=env.is_first)
    train_rank(resolve_invocation(recipe, overrides), env, heart, None)


def arrange(death: Death) -> None:
    """Put the death in the way."""

    def before(module: ModuleType, name: str, due: Callable[..., bool]) -> None:
        original = getattr(module, name)

        def fatal(*args: Any, **kwargs: Any) -> Any:
            if due(*args, **kwargs):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, fatal)

    saved = f"step-{death.step:08}"
    match death.place:
        case "step":
            before(program, "optimizer_step", lambda parts, work, **_: work.step == death.step)
        case "write":
            before(writer, "write_file", lambda store, name, *_: name.startswith(saved))
        case "commit":
            before(writer, "encode_manifest", lambda manifest: manifest.progress.step == death.step)


@dataclass(frozen=True)
class FirstStep:
    """What a rank saw of step 0. samples: draw -> digest of latents, noised latents, target and timesteps."""

    samples: dict[str, str]
    gradients: dict[str, np.ndarray]
    loss: float
    grad_norm: float


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def first_step(env: Environment, recipe_path: Path, overrides: list[str], step: int = 0) -> FirstStep:
    """Forward and backward of one step from the initial weights, with an output projection that isn't zero."""
    recipe: Recipe = resolve_auto(load_recipe(recipe_path, overrides))
    mesh = build.open_mesh(recipe, env)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    for fragment in engine.fragments():
        if fragment.key == "model.proj_out.weight":
            fragment.copy_from(projection(fragment.shard.global_shape))
    engine.refresh(updates=0)
    streams = streams_of(recipe)
    meshes = build.bucket_meshes(recipe, mesh)
    schedule = build.build_schedule(recipe, streams, meshes)
    builder = build.build_builder(recipe, streams, build.Encoders(recipe), dropout=recipe.text.dropout)
    flow = build.build_flow(recipe)
    loader = build.build_loader(
        replace(recipe, train=replace(recipe.train, steps=step + 1)),
        streams,
        builder,
        schedule,
        meshes=meshes,
        start=step,
    )
    work, samples, loss_sum = loader.next_work(), {}, 0.0
    latents = [builder.latent_shape(b) for b in range(len(recipe.data.buckets))]
    count = flow.global_count(work.counts, latents, builder.channels)
    for index, batch in enumerate(loader.batches(work)):
        noised = flow.noise(batch, step=step)
        for i, draw in enumerate(batch.draws):
            if draw:
                samples[draw] = digest(batch.latents[i], noised.latents[i], noised.target[i], noised.timesteps[i])
        tokens = split_tokens(patchify(noised, recipe.model.patch_size), meshes[batch.bucket], recipe.attention.pattern)
        loss = flow.losses(engine(tokens, batch.condition), tokens).sum()
        engine.backward(loss, global_count=count, last=index + 1 == work.num_micro)
        loss_sum += float(loss.detach())
    gradients = gather_fragments(engine.gradients(), mesh.control)
    stats = engine.step(lr=0.0)
    total = torch.tensor(loss_sum, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    loader.close()
    return FirstStep(
        samples,
        {k: g.numpy() for k, g in gradients.items()},
        float(total) / count,
        stats.grad_norm,
    )


def projection(shape: tuple[int, ...]) -> Tensor:
    """Values for proj_out, whose initial zeros would hide every gradient behind it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.1


@dataclass(frozen=True)
class EngineState:
    """What DeepSpeed itself says of its state, and the flat ranges that our fragments claim on this rank.

    full: state -> tensor name -> values, on rank 0, by DeepSpeed's own gathering. low: the gathered parameters in their
    computing precision. ranges: key -> (start, number of elements).
    """

    full: dict[str, dict[str, np.ndarray]]
    low: dict[str, np.ndarray]
    ranges: dict[str, tuple[int, int]]


def engine_state(env: Environment, recipe_path: Path, overrides: list[str]) -> EngineState:
    """Fill weights and moments through the fragments, and read it all back by DeepSpeed's own means."""
    recipe = resolve_auto(load_recipe(recipe_path, overrides))
    mesh = build.open_mesh(recipe, env)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    for fragment in engine.fragments():
        if fragment.state != "model":
            fragment.copy_from(moments(fragment.state, fragment.shard.global_shape))
    engine.refresh(updates=3)
    if recipe.zero.stage < 3:
        # DeepSpeed itself looks for the moments at its first step only.
        engine._engine.optimizer._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]
    getters = {
        "model": safe_get_full_fp32_param,
        "exp_avg": lambda p: safe_get_full_optimizer_state(p, "exp_avg"),
        "exp_avg_sq": lambda p: safe_get_full_optimizer_state(p, "exp_avg_sq"),
    }
    full: dict[str, dict[str, np.ndarray]] = {state: {} for state in getters}
    low = {}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for state in full:
            full[state][name] = getters[state](parameter).float().reshape(shape).numpy().copy()
        with deepspeed.zero.GatheredParameters([parameter], enabled=recipe.zero.stage == 3):
            low[name] = parameter.detach().float().reshape(shape).numpy().copy()
    ranges = {f.key: (f.start, f.flat.numel()) for f in engine.fragments()}
    engine.destroy()
    return EngineState(full if env.is_first else {}, low if env.is_first else {}, ranges)


def moments(state: str, shape: tuple[int, ...]) -> Tensor:
    """Known values for a moment."""
    generator = torch.Generator().manual_seed(len(state) + sum(shape))
    return torch.rand(shape, generator=generator)


def bad_step(env: Environment, recipe_path: Path, overrides: list[str]) -> tuple[bool, bool, bool, bool]:
    """A step whose loss isn't a number on the last rank, then a good one.

    (skipped, every weight and moment untouched, the good step not skipped, weights changed by it)
    """
    recipe = resolve_auto(load_recipe(recipe_path, overrides))
    mesh = build.open_mesh(recipe, env)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    engine.refresh(updates=0)
    streams = streams_of(recipe)
    meshes = build.bucket_meshes(recipe, mesh)
    schedule = build.build_schedule(recipe, streams, meshes)
    builder = build.build_builder(recipe, streams, build.Encoders(recipe), dropout=0.0)
    flow = build.build_flow(recipe)

    def step(factor: float) -> tuple[bool, list[Tensor]]:
        work = schedule[0]
        for index, micro in enumerate(work.micro_batches):
            batch = builder.build(micro, step=0)
            noised = flow.noise(batch, step=0)
            tokens = split_tokens(
                patchify(noised, recipe.model.patch_size), meshes[batch.bucket], recipe.attention.pattern
            )
            loss = flow.losses(engine(tokens, batch.condition), tokens).sum() * factor
            engine.backward(loss, global_count=4.0, last=index + 1 == work.num_micro)
        skipped = engine.step(lr=1e-2).skipped
        return skipped, [fragment.flat.clone() for fragment in engine.fragments()]

    before = [fragment.flat.clone() for fragment in engine.fragments()]
    bad, after_bad = step(torch.nan if env.rank == env.world_size - 1 else 1.0)
    good, after_good = step(1.0)
    untouched = all(torch.equal(a, b) for a, b in zip(before, after_bad, strict=True))
    changed = any(not torch.equal(a, b) for a, b in zip(after_bad, after_good, strict=True))
    finite = all(torch.isfinite(flat).all() for flat in after_good)
    return bad, untouched, not good, changed and finite


def observe(env: Environment, recipe: Path, cells: list[tuple[list[str], int]]) -> list[Observation | None]:
    """What `cuboid verify` observes of (overrides, steps), one after the other in the same ranks."""
    return [verify.observe(load_recipe(recipe, overrides), env, steps=steps) for overrides, steps in cells]


def observe_mutant(env: Environment, recipe: Path, cell: tuple[list[str], int], mutation: str) -> Observation | None:
    """The same with a mistake put in (mutations.py)."""
    mutations.put_in(mutation)
    return observe(env, recipe, [cell])[0]
