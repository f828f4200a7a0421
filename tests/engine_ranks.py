"""What the ranks of the engines' tests do: some steps of a recipe, and what an engine then holds."""

import gc
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from ranks import moments, projection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from framework.config import OptimizerConfig
from framework.data.buckets import streams_of
from framework.environment import Environment
from framework.models.layers import compute_dtype
from framework.models.patchify import patchify
from framework.parallel.collectives import gather_fragments
from framework.parallel.config import MeshShape
from framework.parallel.context_parallel.tokens import split_tokens
from framework.parallel.fragments import ParameterShard
from framework.parallel.mesh import Mesh, build_mesh, lone_mesh
from framework.parallel.zero.config import PrecisionConfig, ZeroConfig
from framework.parallel.zero.engine import Engine
from framework.parallel.zero.fsdp2 import build_fsdp2
from framework.programs import build
from framework.recipe import Recipe, load_recipe, resolve_auto

Arrays = dict[str, np.ndarray]
Predictions = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Updates:
    """gradients: before each step, and states: after the last, gathered on the first rank. ranges: what this rank
    holds, key -> (start, number of elements, whether it writes them).
    """

    gradients: list[Arrays]
    states: dict[str, Arrays]
    norms: list[float]
    ranges: dict[str, tuple[int, int, bool]]


def open_engine(env: Environment, recipe_path: Path, overrides: list[str]) -> tuple[Recipe, Mesh, nn.Module, Engine]:
    """An engine with the initial weights, but for an output projection and adapters that aren't zero."""
    recipe = resolve_auto(load_recipe(recipe_path, overrides))
    mesh = build.open_mesh(recipe, env)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    for fragment in engine.fragments():
        name = fragment.shard.name
        if fragment.state == "model" and (name == "proj_out.weight" or name.endswith("lora_B.weight")):
            fragment.copy_from(projection(fragment.shard.global_shape))
    engine.refresh(updates=0)
    return recipe, mesh, model, engine


def backwards(recipe: Recipe, mesh: Mesh, engine: Engine, num_steps: int) -> Iterator[int]:
    """Forward and backward of steps; yields each step's number when its gradient is there."""
    streams = streams_of(recipe)
    meshes = build.bucket_meshes(recipe, mesh)
    schedule = build.build_schedule(recipe, streams, meshes)
    builder = build.build_builder(recipe, streams, build.Encoders(recipe), dropout=0.0)
    flow = build.build_flow(recipe)
    latents = [builder.latent_shape(b) for b in range(len(recipe.data.buckets))]
    for step in range(num_steps):
        work = schedule[step]
        for index, micro in enumerate(work.micro_batches):
            batch = builder.build(micro, step=step)
            patches = patchify(flow.noise(batch, step=step), recipe.model.patch_size)
            tokens = split_tokens(patches, meshes[batch.bucket], recipe.attention.pattern)
            loss = engine.scored(tokens, batch.condition, flow.score(tokens)).sum()
            count = flow.global_count(work.counts, latents, builder.channels)
            engine.backward(loss, global_count=count, last=index + 1 == work.num_micro)
        del batch, patches, tokens, loss  # with what they keep alive, for the tests of memory
        yield step


def gathered(engine: Engine, mesh: Mesh, state: str) -> Arrays:
    chosen = [f for f in (engine.gradients() if state == "grad" else engine.fragments()) if f.state == state]
    wide = {name: t.to(compute_dtype(t.dtype)) for name, t in gather_fragments(chosen, mesh.control).items()}
    return {name: tensor.numpy() for name, tensor in wide.items()}


def updates(env: Environment, recipe_path: Path, overrides: list[str], num_steps: int = 2) -> Updates:
    """Some optimizer steps with a constant learning rate."""
    recipe, mesh, _, engine = open_engine(env, recipe_path, overrides)
    gradients, norms = [], []
    for _ in backwards(recipe, mesh, engine, num_steps):
        gradients.append(gathered(engine, mesh, "grad"))
        stats = engine.step(lr=recipe.optimizer.lr)
        norms.append(stats.grad_norm)
        assert not stats.skipped
    states = {state: gathered(engine, mesh, state) for state in ("model", "exp_avg", "exp_avg_sq")}
    ranges = {f.key: (f.start, f.flat.numel(), f.shard.owner) for f in engine.fragments()}
    engine.destroy()
    return Updates(gradients, states, norms, ranges)


def written(env: Environment, recipe_path: Path, overrides: list[str]) -> tuple[dict[str, Arrays], *Predictions]:
    """Write weights and moments through the fragments: what is then held, and the prediction before and after.

    A forward without a backward comes first, so that stage 2 holds gathered weights that go stale.
    """
    recipe, mesh, _, engine = open_engine(env, recipe_path, overrides)
    streams = streams_of(recipe)
    schedule = build.build_schedule(recipe, streams, [lone_mesh()])
    builder = build.build_builder(recipe, streams, build.Encoders(recipe), dropout=0.0)
    batch = builder.build(schedule[0].micro_batches[0], step=0)
    tokens = patchify(build.build_flow(recipe).noise(batch, step=0), recipe.model.patch_size)
    with torch.no_grad():
        before = engine(tokens, batch.condition)
        for fragment in engine.fragments():
            fragment.copy_from(moments(fragment.state, fragment.shard.global_shape) * 0.1)
        engine.refresh(updates=3)
        after = engine(tokens, batch.condition)
    states = {state: gathered(engine, mesh, state) for state in ("model", "exp_avg", "exp_avg_sq")}
    return states, before.numpy(), after.numpy()


def both_gradients(env: Environment, recipe_path: Path, overrides: list[str]) -> tuple[Arrays, Arrays]:
    """The reduced gradient by our fragments, and by DeepSpeed's own gathering; on the first rank."""
    recipe, mesh, model, engine = open_engine(env, recipe_path, overrides)
    next(backwards(recipe, mesh, engine, 1))
    ours, theirs = gathered(engine, mesh, "grad"), {}
    for name, parameter in model.named_parameters():
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None
        theirs[name] = gradient.float().reshape(getattr(parameter, "ds_shape", parameter.shape)).numpy()
    return ours, theirs


def norm_over_tp(env: Environment, partition: int) -> tuple[float, float]:
    """The norm of a gradient of integers on dp 2 x tp 2, and what a step of clip 1 leaves of a bias' first moment.

    The weight is split over tp, with gradients 1 on tp rank 0 and 2 on rank 1; the bias is there twice, gradient 1.
    """
    dist.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    mesh = build_mesh(MeshShape(dp=2, ring=1, ulysses=1, tp=2), env.rank)
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    model.weight.tensor_model_parallel = True  # type: ignore[assignment]
    shards = [
        ParameterShard("weight", (6, 4), (3 * mesh.tp.index, 0), (3, 4)),
        replace(ParameterShard.whole("bias", (3,)), owner=mesh.tp.index == 0),
    ]
    zero, precision = ZeroConfig(engine="fsdp2", partition=partition), PrecisionConfig("float32")
    engine = build_fsdp2(
        model, shards, mesh, zero=zero, precision=precision, optimizer=OptimizerConfig(clip=1.0, betas=(0.0, 0.0))
    )
    engine.refresh(updates=0)
    loss = model(torch.full((1, 4), 1.0 + mesh.tp.index)).sum()
    engine.backward(loss, global_count=2.0, last=True)
    norm = engine.step(lr=1e-3).grad_norm
    moment = gather_fragments([f for f in engine.fragments() if f.state == "exp_avg"], mesh.control)
    return norm, float(moment["bias"][0]) if env.is_first else 0.0


def seen_dtypes(env: Environment, recipe_path: Path, overrides: list[str]) -> tuple[dict[str, str], Updates]:
    """Parameter -> dtype that its module's forward saw; and one update."""
    recipe, mesh, model, engine = open_engine(env, recipe_path, overrides)
    seen: dict[str, str] = {}

    def look(path: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            seen[f"{path}.{name}".lstrip(".")] = str(parameter.dtype).removeprefix("torch.")

    handles = [m.register_forward_pre_hook(lambda m, _, p=path: look(p, m)) for path, m in model.named_modules()]
    for _ in backwards(recipe, mesh, engine, 1):
        gradients = [gathered(engine, mesh, "grad")]
    for handle in handles:
        handle.remove()
    return seen, Updates(gradients, {}, [engine.step(lr=1e-2).grad_norm], {})


def live_bytes() -> int:
    """Bytes of every storage that a tensor of this process refers to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    plain = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors if not t.is_meta]
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in plain)}
    return sum(storages.values())


@dataclass(frozen=True)
class Held:
    """Bytes that this rank holds. total: of every tensor, more than before the engine, when the gradient is there.
    after: the same after the step. The others: by the storages of what the engine says it holds. num_parameters: those
    that are trained.
    """

    num_parameters: int
    num_frozen: int
    parameters: int
    masters: int
    moments: int
    total: int
    after: int


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def held_bytes(env: Environment, recipe_path: Path, overrides: list[str]) -> Held:
    """What an engine holds of a model in its second step, when every buffer has been made."""
    before = live_bytes()
    recipe, mesh, model, engine = open_engine(env, recipe_path, overrides)
    steps = backwards(recipe, mesh, engine, 2)
    next(steps)
    engine.step(lr=1e-3)
    next(steps)
    total = live_bytes() - before
    trained = [f for f in engine.fragments() if f.shard.trainable]
    fragments = {state: [f.flat for f in trained if f.state == state] for state in ("model", "exp_avg")}
    held = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    held = [p._local_tensor if isinstance(p, DTensor) else p for p in held]
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    engine.step(lr=1e-3)
    with_data = live_bytes()
    del steps
    after = live_bytes()
    return Held(
        sum(size for size, trains in sizes if trains),
        sum(size for size, trains in sizes if not trains),
        storage_bytes(held),
        storage_bytes(fragments["model"]),
        2 * storage_bytes(fragments["exp_avg"]),
        total - (with_data - after),
        after - before,
    )
