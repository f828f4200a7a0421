"""The mesh of ranks: degrees -> rank grid -> groups.

    rank = ((dp_index * ring + ring_index) * ulysses + ulysses_index) * tp + tp_index

that is `arange(world).view(dp, ring, ulysses, tp)`: tp innermost, then Ulysses (both inside the link domain), ring
across, dp outermost. Every group is a set of axes that vary while the others stay:

    tp | ulysses | ring | cp = ring x ulysses | replica = cp x tp (the ranks of one sample) | dp | zero = dp x cp |
    world

`control` is world on gloo, for flags and plans. Two groups with the same ranks share one process group, so the names
cost no communicator.

A bucket may have its own ring and ulysses. They cut the same ranks of dp x cp into other replicas, so they change which
ranks share a sample, and neither tp nor zero: no parameter moves. `Mesh.split` is the mesh seen by such a bucket.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import torch.distributed as dist

from framework.parallel.config import AXES, GROUP_AXES, MeshShape, split_shape

BACKGROUND = "background"  # what the process groups of `background_group` are called


@dataclass
class Traffic:
    """Calls and bytes by purpose, as one rank sends them by the bandwidth-optimal algorithm; exact, so (n-1)/n of a
    tensor may be a fraction of a byte.
    """

    calls: Counter[str] = field(default_factory=Counter)
    num_bytes: defaultdict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))

    def count(self, purpose: str, num_bytes: Fraction) -> None:
        self.calls[purpose] += 1
        self.num_bytes[purpose] += num_bytes


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other. index: this rank's place among them."""

    name: str
    ranks: tuple[int, ...]
    index: int
    process_group: dist.ProcessGroup | None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """All groups of this rank. Passed by hand: there is no global one. splits: the meshes of buckets whose ring and
    ulysses are their own.
    """

    shape: MeshShape
    rank: int
    tp: Group
    ulysses: Group
    ring: Group
    cp: Group
    replica: Group
    dp: Group
    zero: Group
    world: Group
    control: Group
    splits: Mapping[tuple[int, int], "Mesh"]

    def groups(self) -> tuple[Group, ...]:
        """All of them."""
        return tuple(getattr(self, name) for name in (*GROUP_AXES, "control"))

    def split(self, ring: int, ulysses: int) -> "Mesh":
        """The same ranks with other degrees of context parallelism, which `build_mesh` was told of."""
        own = (self.shape.ring, self.shape.ulysses)
        return self if (ring, ulysses) == own else self.splits[ring, ulysses]


def group_ranks(shape: MeshShape, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Every set of ranks that differ along `axes` only, each in rank order.

    >>> group_ranks(MeshShape(dp=2, ring=1, ulysses=2, tp=1), ("dp",))
    [(0, 2), (1, 3)]
    """
    grid = np.arange(shape.world_size).reshape(shape.dp, shape.ring, shape.ulysses, shape.tp)
    inside = [AXES.index(axis) for axis in axes]
    outside = [dim for dim in range(len(AXES)) if dim not in inside]
    rows = grid.transpose(outside + inside).reshape(-1, int(np.prod([grid.shape[dim] for dim in inside])))
    return [tuple(int(rank) for rank in row) for row in rows]


def new_group(
    ranks: tuple[int, ...],
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
    description: str | None = None,
) -> dist.ProcessGroup | None:
    """A process group of some ranks; None on the ranks outside it. A collective over the world."""
    group = dist.new_group(list(ranks), backend=backend, timeout=timeout, group_desc=description)
    return group if isinstance(group, dist.ProcessGroup) else None


def world_group(num_ranks: int, rank: int) -> Group:
    """All ranks, before there is a mesh; torch.distributed must be initialised."""
    return Group("world", tuple(range(num_ranks)), rank, dist.group.WORLD)


def build_mesh(shape: MeshShape, rank: int, splits: Iterable[tuple[int, int]] = (), *, control: str = "gloo") -> Mesh:
    """Make the groups; torch.distributed must be initialised with `shape.world_size` ranks. Collective over the world.

    splits: (ring, ulysses) of buckets with their own degrees; ring x ulysses divides dp x cp (`config.split_shape`).
    control: backend of the control group.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(shape.world_size)): dist.group.WORLD}
    groups = make_groups(shape, rank, made)
    world = groups["world"]
    on_host = Group("control", world.ranks, rank, new_group(world.ranks, backend=control))
    mesh = Mesh(shape=shape, rank=rank, control=on_host, splits={}, **groups)
    cut: dict[tuple[int, int], Mesh] = {}
    for ring, ulysses in dict.fromkeys(splits):
        other = split_shape(shape, ring, ulysses)
        if other != shape:
            own = make_groups(other, rank, made) | {name: groups[name] for name in ("tp", "zero", "world")}
            cut[ring, ulysses] = Mesh(shape=other, rank=rank, control=on_host, splits={}, **own)
    return replace(mesh, splits=MappingProxyType(cut))


def make_groups(shape: MeshShape, rank: int, made: dict[tuple[int, ...], dist.ProcessGroup | None]) -> dict[str, Group]:
    """This rank's groups by name; `made` holds the process groups that there are, and gains what is new."""
    groups: dict[str, Group] = {}
    for name, axes in GROUP_AXES.items():
        for ranks in group_ranks(shape, axes):
            if ranks not in made:
                made[ranks] = new_group(ranks)
            if rank in ranks:
                groups[name] = Group(name, ranks, ranks.index(rank), made[ranks])
    return groups


def close_mesh(mesh: Mesh) -> None:
    """Free the communicators of a mesh that another one follows; the world's stays. Collective over the world."""
    groups = {id(g.process_group): g.process_group for each in (mesh, *mesh.splits.values()) for g in each.groups()}
    for process_group in groups.values():
        if process_group is not None and process_group is not dist.group.WORLD:
            dist.destroy_process_group(process_group)


def lone_mesh() -> Mesh:
    """The mesh of one process without torch.distributed: every group is this rank alone."""
    groups = {name: Group(name, (0,), 0, None) for name in (*GROUP_AXES, "control")}
    return Mesh(shape=MeshShape(1, 1, 1, 1), rank=0, splits={}, **groups)


def set_patience(seconds: float) -> None:
    """From now on a collective of any group of this rank, the engine's own included, fails where it isn't done within
    so many seconds; those of `background_group` keep their own patience.

    A rank that hangs is an error on the others then, and not a silence.
    """
    # torch 2.11 has it under a private name alone.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for process_group in dist.distributed_c10d._world.pg_map:
        if process_group.group_desc != BACKGROUND:
            set_timeout(timedelta(seconds=seconds), process_group)


def background_group(mesh: Mesh, name: str, purpose: str) -> Group:
    """One of the mesh's groups once more, on the control group's backend and with a process group of its own, so that
    what the background sends and what the loop sends never wait for each other. Its patience is that of a store's
    outage. Collective over the world.
    """
    own: Group = getattr(mesh, name)
    if own.process_group is None:
        return own
    backend = dist.get_backend(mesh.control.process_group)
    for ranks in group_ranks(mesh.shape, GROUP_AXES[name]):
        process_group = None
        if len(ranks) > 1:
            process_group = new_group(ranks, backend=backend, timeout=timedelta(hours=1), description=BACKGROUND)
        if mesh.rank in ranks:
            own = Group(f"{purpose} {name}", ranks, ranks.index(mesh.rank), process_group)
    return own


def cut_zero_group(mesh: Mesh, size: int) -> tuple[Group, Group]:
    """The zero group cut into runs of `size` neighbours: (this rank's run, the ranks of its place in every run).

    ZeRO partitions inside a run and keeps one replica in each. Collective over the world.
    """
    inside, across = [], []
    for ranks in group_ranks(mesh.shape, GROUP_AXES["zero"]):
        inside += [ranks[start : start + size] for start in range(0, len(ranks), size)]
        across += [ranks[index::size] for index in range(size)]
    found = {}
    for name, places in (("partition", inside), ("replicate", across)):
        for ranks in places:
            # Made or not on every rank alike: the whole zero group is there already, on its members.
            process_group = mesh.zero.process_group if len(ranks) == mesh.zero.size else new_group(ranks)
            if mesh.rank in ranks:
                found[name] = Group(name, ranks, ranks.index(mesh.rank), process_group)
    return found["partition"], found["replicate"]
