"""recipe -> mesh -> model -> engine: what the programs' openings have in common."""

import os
import socket
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import gettempdir
from threading import Lock

import torch
import torch.distributed as dist
from torch import nn

from framework.checkpoint.attempt import take_attempt
from framework.checkpoint.fence import Fence
from framework.checkpoint.source import CheckpointSource, check_config, fill, open_source
from framework.data.buckets import Stream, identity_of
from framework.data.budget import micro_sizes, plan_batches
from framework.data.builder import BatchBuilder, LatentForm, TextShape
from framework.data.cache import ShardCache
from framework.data.channel import Channel
from framework.data.device import Mover
from framework.data.loader import Loader
from framework.data.reader import Reader
from framework.data.report import report_of, to_json
from framework.data.schedule import Place, Schedule
from framework.data.shards import write_json
from framework.data.splits import resolve_degrees
from framework.data.stream import ShardStore, is_local
from framework.data.windows import Windows, data_steps
from framework.data.workers import DecodePool
from framework.diffusion.flow import Flow
from framework.environment import Environment
from framework.kernels.attention import build_attention
from framework.keys import key
from framework.models.dit import DiT
from framework.models.initialise import init_tensor
from framework.models.parallelize import parallelize
from framework.models.weights import DiffusersSource
from framework.parallel.collectives import broadcast_object, gather_objects, shared_failure
from framework.parallel.config import resolve_mesh
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import Group, Mesh, background_group, build_mesh, set_patience, world_group
from framework.parallel.zero.engine import Engine
from framework.recipe import Recipe, bucket_degrees, bucket_tokens, check_trained, flatten, resolve_auto
from framework.run import Run, RunFailure, store_recipe
from framework.storage.storage import Storage
from framework.text.config import text_length, text_masked
from framework.text.encoder import TextEncoder, build_text_encoder
from framework.tokenizer.config import tokenizer_channels, tokenizer_strides
from framework.tokenizer.tokenizer import Tokenizer, build_tokenizer


class Encoders:
    """What turns pixels and captions into what the transformer reads; made when first asked for, as a run on latents
    with stored texts needs neither. device: of their weights.
    """

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        self._recipe, self.device = recipe, torch.device(device)
        self._making = Lock()
        self._tokenizer: Tokenizer | None = None
        self._text: TextEncoder | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        with self._making:  # the loader's thread asks too
            if self._tokenizer is None:
                self._tokenizer = build_tokenizer(self._recipe.tokenizer, self.device)
            return self._tokenizer

    @property
    def text(self) -> TextEncoder:
        with self._making:
            if self._text is None:
                self._text = build_text_encoder(self._recipe.text, self.device)
            return self._text


@dataclass(frozen=True)
class Claim:
    """What rank 0 tells the others of the run: the attempt's number, or why there is none."""

    attempt: int = -1
    refusal: str | None = None
    mistake: bool = False


def open_mesh(recipe: Recipe, env: Environment, *, apart: tuple[str, ...] = ()) -> Mesh:
    """Join the process group, agree on the recipe and make the mesh. A collective over all ranks.

    apart: keys in which the ranks' recipes may differ.
    """
    shape = resolve_mesh(recipe.mesh, num_ranks=env.world_size, heads=recipe.model.num_attention_heads)
    # Newer torch renames collectives that torch 2.11 has under their old names alone; DeepSpeed uses those too.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if torch.cuda.is_available():
        torch.cuda.set_device(env.local_rank)
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():  # joined once, whatever number of meshes follow
        dist.init_process_group(
            backend,
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=recipe.watch.start),
            # NCCL's communicators are made now: a link that doesn't work is told here, and not in the first step.
            device_id=torch.device("cuda", env.local_rank) if torch.cuda.is_available() else None,
        )
    # Before any group is made: ranks that see different meshes would wait for each other.
    agree_on_recipe(recipe, world_group(env.world_size, env.rank), apart=apart)
    mesh = build_mesh(shape, env.rank, bucket_splits(recipe))
    set_patience(recipe.watch.start)
    return mesh


def bucket_splits(recipe: Recipe) -> list[tuple[int, int]]:
    """(ring, ulysses) of every bucket."""
    return [bucket_degrees(recipe, index) for index in range(len(recipe.data.buckets))]


def bucket_meshes(recipe: Recipe, mesh: Mesh) -> list[Mesh]:
    """The mesh as each bucket sees it."""
    return [mesh.split(ring, ulysses) for ring, ulysses in bucket_splits(recipe)]


def build_schedule(
    recipe: Recipe, streams: list[Stream], meshes: list[Mesh], *, stage: int = 0, first: int = 0
) -> Schedule:
    """What this rank does in each step. meshes: of each bucket. stage, first: of a run, and the data step at which it
    begins an order of its own.
    """
    text = text_length(recipe.text)  # which every rank of a replica has whole
    tokens = [bucket_tokens(recipe, index).num_tokens / mesh.cp.size + text for index, mesh in enumerate(meshes)]
    return Schedule(
        recipe.data,
        streams,
        seed=key(recipe.seed, "stage", step=stage) if stage else recipe.seed,
        batches=plan_batches(recipe),
        places=[Place(mesh.dp.index, mesh.dp.size) for mesh in meshes],
        micro_sizes=micro_sizes(recipe.data.micro_batch, tokens),
        first=first,
    )


def settle(recipe: Recipe, env: Environment) -> Recipe:
    """The recipe with what this machine and the number of ranks decide: kernel, degrees of buckets."""
    return resolve_degrees(
        resolve_auto(recipe),
        resolve_mesh(recipe.mesh, num_ranks=env.world_size, heads=recipe.model.num_attention_heads),
    )


def this_device() -> torch.device:
    """The GPU chosen for this rank, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def agree_on_recipe(recipe: Recipe, world: Group, *, apart: tuple[str, ...]) -> None:
    """Raises ValueError naming the ranks whose recipe differs from the first rank's, and the keys."""
    told = {name: value for name, value in flatten(recipe).items() if name not in apart}
    leaves = gather_objects(told, world)
    differing = {
        rank: sorted(name for name in leaves[0].keys() | other.keys() if leaves[0].get(name) != other.get(name))
        for rank, other in enumerate(leaves)
    }
    wrong = [f"rank {rank} in {', '.join(keys)}" for rank, keys in differing.items() if keys]
    if wrong:
        raise ValueError(f"the ranks were started with different recipes; against rank 0 differ: {'; '.join(wrong)}")


def open_run(
    recipe: Recipe,
    overrides: tuple[str, ...],
    mesh: Mesh,
    storage: Storage,
    *,
    claimed: int | None,
    stage: int | None = None,
) -> tuple[Run, Fence]:
    """Rank 0 takes the attempt that the launcher has claimed, or claims one, and stores the recipe before any weight
    exists. Where it claims, the others write to logs from now on; a launcher that claims has logs of its own.

    storage: of the checkpoints, whose fence gives the attempt's number. stage: of the attempt. Raises ValueError
    when another process of this machine holds the run, or nothing can be written; RunFailure when it can't be written
    any more.
    """
    path, told = Path(recipe.run), Claim()
    if mesh.rank == 0:
        try:
            told = Claim(attempt=take_attempt(path, storage, claimed).attempt)
            store_recipe(Run(path, told.attempt), recipe, overrides, dp=mesh.shape.dp, stage=stage)
        except (ValueError, OSError) as error:
            # A launcher that has claimed has tried the store: what it refuses now isn't the user's mistake.
            told = Claim(refusal=str(error), mistake=claimed is None or isinstance(error, ValueError))
    told = broadcast_object(told, mesh.control)
    if told.refusal is not None:  # on every rank, so that none waits for the others
        raise ValueError(told.refusal) if told.mistake else RunFailure(told.refusal)
    run = Run(path, told.attempt)
    if mesh.rank != 0 and claimed is None:
        log = os.open(run.attempt_path / "logs" / f"rank-{mesh.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
    return run, Fence(storage, run.attempt)


def begin(fence: Fence, step: int, group: Group, *, skipped: Windows = ()) -> None:
    """Put down where this attempt goes on, and which data it leaves out. A collective; raises RunFailure on every rank
    when that can't be done.
    """
    failure: str | None = None
    if group.index == 0:
        try:
            fence.begin(step, skipped)
        except OSError as error:
            failure = str(error)
    if (failure := shared_failure(failure, group)) is not None:
        raise RunFailure(failure)


def build_model(recipe: Recipe, mesh: Mesh) -> tuple[nn.Module, list[ParameterShard]]:
    """The transformer on the meta device, and what this rank holds of each parameter."""
    with torch.device("meta"):
        kernel = build_attention(recipe.attention, deterministic=recipe.train.deterministic)
        model = DiT(recipe.model, kernel, rope=recipe.rope)
    lora, patterns = recipe.lora, recipe.train.trainable
    return model, parallelize(model, mesh, recipe.execution, lora=lora, trainable=patterns)


def build_engine(recipe: Recipe, model: nn.Module, shards: list[ParameterShard], mesh: Mesh) -> Engine:
    """The ZeRO engine that the recipe names."""
    zero, precision, optimizer = recipe.zero, recipe.precision, recipe.optimizer
    match zero.engine:
        case "deepspeed":
            from framework.parallel.zero.deepspeed import build_deepspeed

            return build_deepspeed(model, shards, mesh, zero=zero, precision=precision, optimizer=optimizer)
        case "fsdp2":
            from framework.parallel.zero.fsdp2 import build_fsdp2

            return build_fsdp2(model, shards, mesh, zero=zero, precision=precision, optimizer=optimizer)


@torch.no_grad()
def initialise(fragments: list[Fragment], recipe: Recipe) -> None:
    """Fill the master and the frozen weights, each tensor from its own key, one at a time: the same on every mesh."""
    for fragment in fragments:
        if fragment.state == "model":
            name, shape = fragment.shard.name, fragment.shard.global_shape
            generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=name))
            fragment.copy_from(init_tensor(name, shape, generator, recipe.model))


def take_weights(fragments: list[Fragment], recipe: Recipe, shards: list[ParameterShard], group: Group) -> list[str]:
    """Fill what `init_from` has of the weights; each rank reads its own slices. Returns what a person should know of
    it. A collective; raises ValueError on every rank.
    """
    if not recipe.init_from:
        return []
    lines = []
    source: CheckpointSource | DiffusersSource | None = None
    failure: str | None = None
    try:
        source = open_source(recipe.init_from, recipe.init_weights)
        check_config(source, recipe.model)
        report = fill(fragments, source, {shard.name: shard.global_shape for shard in shards})
        lines = [*source.notes, *report.lines()]
    except (ValueError, OSError) as error:
        failure = str(error)
    if (failure := shared_failure(failure, group)) is not None:
        raise ValueError(failure)
    if isinstance(source, CheckpointSource):
        by_rank = gather_objects(source.reader.checked(), group)
        try:
            source.check_share(by_rank, index=group.index)
        except (ValueError, OSError) as error:
            failure = str(error)
        if (failure := shared_failure(failure, group)) is not None:
            raise ValueError(failure)
    return lines


def agree_on_data(recipe: Recipe, streams: list[Stream], group: Group) -> str:
    """What the order of samples follows from beside the recipe, as a hash. Raises ValueError where the ranks see other
    files.
    """
    identity = f"{identity_of(streams)}-{'.'.join(map(str, plan_batches(recipe).sizes))}"
    seen = gather_objects(identity, group)
    if wrong := [str(rank) for rank, other in enumerate(seen) if other != seen[0]]:
        paths = ", ".join(stream.config.path for stream in streams)
        raise ValueError(f"ranks {', '.join(wrong)} see other files in {paths} than rank 0: give every node the same")
    return identity


def check_same_data(recipe: Recipe, stored: str, identity: str) -> None:
    """Raises ValueError where a checkpoint was trained on other files than there are now, or with other draws though no
    key was allowed to change.
    """
    (files, _, sizes), (files_now, _, sizes_now) = stored.partition("-"), identity.partition("-")
    if stored and files != files_now and "data.streams" not in recipe.resume.allow:
        raise ValueError(
            f"the data have changed since the checkpoint of {recipe.run}: samples would be lost and repeated. Bring "
            f"the former files back, or go on with these by resume.allow=[data.streams]"
        )
    if stored and sizes != sizes_now and not recipe.resume.allow:
        raise ValueError(
            f"a draw of each bucket takes {sizes_now} samples, it took {sizes} when the checkpoint of {recipe.run} was "
            f"saved, by another release: go on with these by resume.allow=[data.rounds]"
        )


def describe_data(recipe: Recipe, streams: list[Stream], mesh: Mesh, run: Run) -> None:
    """What `cuboid data report` says, into the run directory, by rank 0."""
    if mesh.rank == 0:
        write_json(run.path / "data.json", to_json(report_of(recipe, streams, mesh.shape, steps=200)))


def build_builder(
    recipe: Recipe, streams: list[Stream], encoders: Encoders, *, dropout: float, workers: int = 0
) -> BatchBuilder:
    """The maker of batches. workers: processes that decode."""
    return BatchBuilder(
        streams,
        recipe.data.buckets,
        encoders=encoders,
        form=LatentForm(tokenizer_channels(recipe.tokenizer), tokenizer_strides(recipe.tokenizer)),
        text=TextShape(text_length(recipe.text), recipe.model.text_dim, text_masked(recipe.text)),
        dropout=dropout,
        seed=recipe.seed,
        device=encoders.device,
        pool=DecodePool(workers),
    )


def build_channel(builder: BatchBuilder, meshes: list[Mesh]) -> Channel:
    """The way of batches within replicas. meshes: of each bucket. A collective over the world."""
    groups = {id(mesh): background_group(mesh, "replica", "data") for mesh in meshes}
    return Channel(builder, [groups[id(mesh)] for mesh in meshes])


def build_loader(
    recipe: Recipe,
    streams: list[Stream],
    builder: BatchBuilder,
    schedule: Schedule,
    *,
    meshes: list[Mesh],
    start: int,
    skipped: Windows = (),
) -> Loader:
    """The batches from step `start`, without the data in `skipped`. meshes: of each bucket. A collective over the
    world.
    """
    data, channel = recipe.data, build_channel(builder, meshes)
    reads = any(channel.reads(bucket) for bucket in range(len(data.buckets)))
    hosts = gather_objects((socket.gethostname(), reads), meshes[0].control)
    read = [stream.shards for stream in streams] if reads else []
    cache = None
    if not all(is_local(shards) for shards in read):
        folder = Path(data.cache.path) if data.cache.path else Path(gettempdir()) / f"cuboid-cache-{os.getuid()}"
        limit, neighbours = int(data.cache.gigabytes * 1e9), hosts.count((socket.gethostname(), True))
        cache = ShardCache(folder, limit, ranks=neighbours, patience=data.cache.patience)
    store = ShardStore(read, cache, threads=data.cache.threads)
    return Loader(
        Reader(streams, builder, store, bad_shards=data.bad_shards),
        schedule,
        channel=channel,
        mover=Mover(this_device()),
        steps=data_steps(skipped, range(start, recipe.train.steps)),
        prefetch=data.prefetch,
    )


def build_flow(recipe: Recipe) -> Flow:
    """The objective."""
    check_trained(recipe)
    return Flow(
        recipe.flow,
        recipe.loss,
        seed=recipe.seed,
        patch_size=recipe.model.patch_size,
    )
