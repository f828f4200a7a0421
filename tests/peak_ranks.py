"""What the rank of the peak's test does: a step of a recipe as the first rank of a mesh that isn't there, counted."""

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_ranks import backwards, live_bytes, storage_bytes
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framework.data.buckets import streams_of
from framework.data.splits import resolve_degrees
from framework.environment import Environment, be_first_rank
from framework.models import offload
from framework.parallel.config import MeshShape, resolve_mesh
from framework.parallel.fake import fake_mesh
from framework.parallel.mesh import Mesh
from framework.plan.traffic import MicroShape
from framework.programs import build
from framework.recipe import Recipe, bucket_timesteps, load_recipe, resolve_auto

TO_HOST = offload.to_host


@dataclass(frozen=True)
class Counted:
    """Bytes. states: of parameters, master weights and moments. peak: the most until a step's last backward, these
    included, host apart; step: and until the update is done.
    """

    shape: MeshShape
    micros: tuple[MicroShape, ...]
    num_parameters: int
    states: int
    peak: int
    step: int
    host: int


class PeakMeter(TorchDispatchMode):
    """While inside, bytes of every storage that an operation has seen and that is still there, after each operation
    that makes one or changes one's size; what is on the host by `offload` apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, int] = {}  # a storage's address -> weak reference
        self._on_host: set[int] = set()
        self.peak, self.host = 0, 0
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thing in gc.get_objects():
                if issubclass(type(thing), Tensor):
                    self._note(thing)

    def to_host(self, tensor: Tensor) -> Tensor:
        """In the place of `offload.to_host`."""
        out = TO_HOST(tensor)
        self._on_host.add(out.untyped_storage()._cdata)
        return out

    def _note(self, tensor: Tensor) -> bool:
        """Whether its storage is new here."""
        plain = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if plain.is_meta:
            return False
        storage = plain.untyped_storage()
        new = storage._cdata not in self._seen
        if new:
            self._seen[storage._cdata] = storage._weak_ref()
        return new

    def _measure(self) -> None:
        total = host = 0
        for address, weak in list(self._seen.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak)
            if storage is None:
                torch.UntypedStorage._free_weak_ref(weak)
                del self._seen[address]
                self._on_host.discard(address)
            elif address in self._on_host:
                host += storage.nbytes()
            else:
                total += storage.nbytes()
        self.host, self.peak = max(self.host, host), max(self.peak, total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func is torch.ops.aten.detach.default:
            return out
        leaves = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if sum(self._note(leaf) for leaf in leaves) or func.namespace in ("c10d", "fsdp"):
            self._measure()
        return out


def count(recipe: Recipe, mesh: Mesh, before: int) -> Counted:
    """The third step of a recipe."""
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    engine.refresh(updates=0)
    steps = backwards(recipe, mesh, engine, 3)
    for _ in range(2):
        next(steps)
        engine.step(lr=1e-3)
    with PeakMeter() as meter:
        offload.to_host = meter.to_host
        next(steps)
        backward = meter.peak
        engine.step(lr=1e-3)
        offload.to_host = TO_HOST
    del steps
    held = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    held = [p._local_tensor if isinstance(p, DTensor) else p for p in held]
    states = storage_bytes([*held, *(fragment.flat for fragment in engine.fragments())])
    work = build.build_schedule(recipe, streams_of(recipe), build.bucket_meshes(recipe, mesh))[2]
    micros = tuple(
        MicroShape(micro.bucket, len(micro.slots), 16, timesteps=bucket_timesteps(recipe, micro.bucket))
        for micro in work.micro_batches
    )
    sizes = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine.destroy()
    return Counted(mesh.shape, micros, sizes, states, backward - before, meter.peak - before, meter.host)


def count_cells(env: Environment, recipe_path: Path, cells: list[tuple[list[str], int]]) -> list[Counted]:
    """Each (words, ranks) of them."""
    be_first_rank()
    found = []
    for words, num_ranks in cells:
        recipe = resolve_auto(load_recipe(recipe_path, words))
        shape = resolve_mesh(recipe.mesh, num_ranks=num_ranks)
        gc.collect()
        before = live_bytes()
        with fake_mesh(shape, build.bucket_splits(recipe)) as mesh:
            found.append(count(resolve_degrees(recipe, shape), mesh, before))
    return found
