"""What is refused before any rank starts: mesh, kernel, checkpoint to resume from, data. Imports no torch."""

import math
import os
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from framework.checkpoint.fence import check_owner
from framework.checkpoint.find import check_source, newest, store_of
from framework.data.buckets import bucket_views, check_held_out, streams_of
from framework.data.config import StreamConfig
from framework.data.splits import resolve_degrees
from framework.environment import gpu_memory, gpu_name
from framework.forecast.memory import plan_memory
from framework.models.config import is_adapter
from framework.parallel.config import MeshShape, resolve_mesh, split_shape
from framework.plan.hardware import gpu_of, load_hardware
from framework.plan.parameters import parameter_shapes
from framework.recipe import Recipe, bucket_degrees, check_kernel, check_trained
from framework.run import run_identity
from framework.storage.storage import open_source

# Without GPUs ranks are for trying things out; beyond this they only starve each other.
RANKS_A_CORE = 8


def check_store(recipe: Recipe) -> int:
    """Whether checkpoints can be written where the recipe says, and gone on from. Raises ValueError. Reads a listing
    and one manifest. Returns the steps that are done.
    """
    storage = store_of(recipe)
    storage.check()
    check_owner(storage, run_identity(Path(recipe.run)))
    found = newest(storage, fall_back=recipe.resume.fall_back)
    if found is None and recipe.init_from:
        check_source(recipe.init_from)
    return 0 if found is None else found.entry.step


def check_start(recipe: Recipe, *, num_ranks: int | None, num_gpus: int) -> MeshShape:
    """The resolved mesh of a start that can work. Raises ValueError with what can't, the values and the fix.

    num_gpus: that each of its machines shows.
    """
    check_trained(recipe)
    shape = resolve_mesh(recipe.mesh, num_ranks=num_ranks, num_gpus=num_gpus, heads=recipe.model.num_attention_heads)
    recipe = resolve_degrees(recipe, shape)
    for index in range(len(recipe.data.buckets)):
        split_shape(shape, *bucket_degrees(recipe, index))
    recipe.zero.partition_size(shape.dp * shape.cp)
    check_table(recipe)
    check_kernel(recipe, num_gpus=num_gpus)
    check_boards(recipe)
    check_samples(recipe)
    if num_ranks is None and num_gpus:
        check_memory(recipe, shape, gpu_name(), num_bytes=gpu_memory())
    if num_ranks is None:  # ranks see for themselves, with more patience
        check_data(recipe)
    return shape


def check_data(recipe: Recipe) -> None:
    """Whether the data are there and fit. Raises ValueError, within 10 s where a server can't be read."""
    validates = recipe.validation.every > 0
    for path in [*(each.path for each in recipe.data.streams), *(recipe.validation.shards if validates else [])]:
        if "://" in path:
            open_source(path).check_readable()
    streams = streams_of(recipe)
    bucket_views(streams, recipe.data.buckets)
    if validates:
        held_out = streams_of(recipe, [StreamConfig(path) for path in recipe.validation.shards])
        bucket_views(held_out, recipe.data.buckets)
        if recipe.validation.held_out:
            check_held_out(streams, held_out)


def check_boards(recipe: Recipe) -> None:
    """Raises ValueError where metrics go to a service whose package isn't here."""
    if recipe.log.wandb and find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={recipe.log.wandb} needs a package that isn't installed: pip install 'cuboid[wandb]'"
        )


def check_samples(recipe: Recipe) -> None:
    """Raises ValueError where videos are to be sampled without what embeds a prompt, or decodes a latent."""
    names = {"tokenizer.name": recipe.tokenizer.name, "text.name": recipe.text.name}
    absent = [f"{key}={name}" for key, name in names.items() if name in ("latents", "stored")]
    if recipe.samples.every and absent:
        raise ValueError(
            f"samples.every={recipe.samples.every} with {' and '.join(absent)}: nothing here embeds a prompt or makes "
            "pixels of latents; set samples.every=0"
        )


def check_table(recipe: Recipe) -> None:
    """Raises ValueError for a rule of the precision table that no parameter matches, and for two rows in a module, its
    adapter included, whose parameters FSDP2 gathers together.
    """
    names = [parameter.name for parameter in parameter_shapes(recipe.model, lora=recipe.lora)]
    precision = recipe.precision
    for rule in precision.table:
        if not any(fnmatchcase(name, rule.pattern) for name in names):
            raise ValueError(
                f"precision.table, pattern {rule.pattern!r} matches no parameter of the model: names are like "
                f"{names[1]} and {names[-1]}"
            )
    first: dict[str, str] = {}
    for name in names:
        module = name.rpartition(".")[0]
        other = first.setdefault(module.rpartition(".")[0] if is_adapter(name) else module, name)
        if recipe.zero.engine == "fsdp2" and precision.of(name) != precision.of(other):
            raise ValueError(
                f"precision.table gives parameters of one module two rows: {other} {precision.of(other)}, {name} "
                f"{precision.of(name)}; FSDP2 gathers them together: give both the same"
            )


def check_memory(recipe: Recipe, shape: MeshShape, gpu: str, *, num_bytes: float = math.inf) -> None:
    """Raises ValueError where a rank needs more than its GPU has. gpu: its name, as NVIDIA H100 80GB HBM3. num_bytes:
    that it has. Where neither the GPU is described nor the recipe's hardware, nobody knows.
    """
    described = gpu_of(gpu) or recipe.hardware.name
    if not described:
        return
    hardware = load_hardware(described)
    if hardware.device.kind != "gpu":
        return
    memory = plan_memory(recipe, shape, hardware)
    memory = replace(memory, capacity=min(num_bytes, memory.capacity))
    if not memory.fits:
        raise ValueError(f"{memory.refusal()} ({shape}, {hardware.name})")


def check_machine(shape: MeshShape, *, num_gpus: int) -> None:
    """Raises ValueError when this machine is too small for the ranks of a mesh."""
    cores = os.cpu_count() or 1
    if num_gpus and shape.world_size > num_gpus:
        raise ValueError(f"{shape} needs {shape.world_size} GPUs, this machine shows {num_gpus}: lower mesh.dp")
    if not num_gpus and shape.world_size > RANKS_A_CORE * cores:
        raise ValueError(f"{shape} needs {shape.world_size} ranks, too many for {cores} CPU cores: lower mesh.dp")
