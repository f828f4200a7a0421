"""What the rank of the peak's test does: a step of a recipe as the first rank of a mesh that isn't there, counted."""

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_ranks import backwards, live_bytes
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
from framework.recipe import Recipe, load_recipe, resolve_auto


@dataclass(frozen=True)
class Counted:
    """Bytes. states: after a step's backward. peak: the most until then, states included, host apart; step: and until
    the update is done.
    """

    shape: MeshShape
    micros: tuple[MicroShape, ...]
    num_parameters: int
    states: int
    peak: int
    step: int
    host: int
    where: str


class PeakMeter(TorchDispatchMode):
    """While inside, bytes of every storage that an operation has seen and that is still there, after each operation;
    what is on the host by `offload` apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[int, bool]] = {}  # a storage's address -> weak reference, whether on the host
        self.peak, self.host, self.where = 0, 0, ""
        self._on_host: set[int] = set()
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thing in gc.get_objects():
                if issubclass(type(thing), Tensor):
                    self._note(thing)

    def put_on_host(self, tensor: Tensor) -> None:
        self._on_host.add(tensor.untyped_storage()._cdata)

    def _note(self, tensor: Tensor) -> None:
        plain = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if plain.is_meta:
            return
        storage = plain.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage._weak_ref()

    def _measure(self, name: str) -> None:
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
        self.host = max(self.host, host)
        if total > self.peak:
            self.peak, self.where = total, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self._measure(str(func))
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
    to_host = offload.to_host
    with PeakMeter() as meter:

        def noted(tensor: Tensor) -> Tensor:
            out = to_host(tensor)
            meter.put_on_host(out)
            return out

        offload.to_host = noted
        next(steps)
        backward = meter.peak
        held = live_bytes()
        engine.step(lr=1e-3)
        offload.to_host = to_host
    with_data = live_bytes()
    del steps
    work = build.build_schedule(recipe, streams_of(recipe), build.bucket_meshes(recipe, mesh))[2]
    micros = tuple(MicroShape(micro.bucket, len(micro.slots), 16) for micro in work.micro_batches)
    sizes = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    states = held - (with_data - live_bytes()) - before
    engine.destroy()
    return Counted(mesh.shape, micros, sizes, states, backward - before, meter.peak - before, meter.host, meter.where)


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
