"""Which ranks stand where, and what that costs. Pure.

Rank r is on node r // R of the job's nodes in the order in which they are used (`order_hosts`), R ranks a node, and

    arange(world).view(dp, ring, ulysses, tp)

says who talks to whom. tp must stay inside a link domain (links.domain GPUs, a part of a node or several nodes): its
collectives stand in front of every linear. Ulysses should, and a ring should stay under one leaf switch: what crosses
is warned of with its cost, by the formulas of plan/traffic.py:

    tp        all its bytes go as slowly as the slowest link of the group
    ulysses   of its (u-1)/u each peer gets an equal part, so those outside get outside / (u-1) of all
    ring      all its bytes go to the next rank
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from framework.data.budget import micro_sizes, plan_batches
from framework.data.splits import resolve_degrees
from framework.launch.config import LinkConfig
from framework.parallel.config import MeshConfig, MeshShape, nearest_shapes, split_shape
from framework.plan.traffic import MicroShape, own_ledger
from framework.recipe import Recipe, bucket_degrees, bucket_timesteps, bucket_tokens
from framework.shapes import divisors, even_parts
from framework.text.config import text_length

GIGA = 1e9


@dataclass(frozen=True)
class Places:
    """Where ranks stand: R ranks a node."""

    ranks_per_node: int
    links: LinkConfig

    @property
    def domain_size(self) -> int:
        """Ranks of a link domain."""
        domain, node = self.links.domain or self.ranks_per_node, self.ranks_per_node
        return domain if domain <= node else domain // node * node

    def domain(self, rank: int) -> tuple[int, int]:
        """The link domain of a rank. One that is smaller than a node doesn't go beyond it."""
        outer = max(self.domain_size, self.ranks_per_node)
        return rank // outer, rank % outer // self.domain_size

    def switch(self, rank: int) -> int:
        """The leaf switch of a rank; all are under one where `links.switch` isn't known."""
        return rank // self.ranks_per_node // self.links.switch if self.links.switch else 0


def check_placement(shape: MeshShape, ranks_per_node: int, links: LinkConfig, recipe: Recipe) -> list[str]:
    """Warnings of what crosses the network and needn't, with its cost; for every split of the ranks that a bucket has.
    Raises ValueError where tp does.
    """
    places, recipe = Places(ranks_per_node, links), resolve_degrees(recipe, shape)
    check_tensor_parallel(shape, places, recipe)
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index in range(len(recipe.data.buckets)):
        buckets[bucket_degrees(recipe, index)].append(index)
    warnings = []
    for (ring, ulysses), indices in buckets.items():
        split = split_shape(shape, ring, ulysses)
        for warn in (warn_ulysses, warn_ring):
            group = "ulysses" if warn is warn_ulysses else "ring"
            sent, index = max((sent_bytes(recipe, shape, index, group), index) for index in indices)
            warnings += warn(split, places, sent, bucket_name(recipe, index))
    return warnings


def check_tensor_parallel(shape: MeshShape, places: Places, recipe: Recipe) -> None:
    """Raises ValueError for a tp group in more than one link domain, with its cost and the nearest meshes without."""
    if tp_fits(shape, places):
        return
    links, buckets = places.links, range(len(recipe.data.buckets))
    sent, index = max((sent_bytes(recipe, shape, index, "tp"), index) for index in buckets)
    nearest = "; ".join(str(mesh) for mesh in fitting_shapes(shape, places, recipe)) or "none of as many ranks"
    raise ValueError(
        f"mesh.tp={shape.tp} crosses the edge of a link domain, which has {places.domain_size} ranks "
        f"(ranks_per_node={places.ranks_per_node}, links.domain={links.domain}): {gigabytes(sent)} a rank and step of "
        f"{bucket_name(recipe, index)} would take {at_rate(sent, links.network)} and not {at_rate(sent, links.link)}; "
        f"the nearest meshes that fit: {nearest}"
    )


def tp_fits(shape: MeshShape, places: Places) -> bool:
    """Whether every tp group is inside one link domain."""
    starts = range(0, shape.world_size, shape.tp)
    return all(places.domain(start) == places.domain(start + shape.tp - 1) for start in starts)


def fitting_shapes(shape: MeshShape, places: Places, recipe: Recipe) -> list[MeshShape]:
    """The three nearest meshes of as many ranks that the model and the buckets allow and the link domains too."""
    heads, wanted = recipe.model.num_attention_heads, MeshConfig(shape.dp, shape.ring, shape.ulysses, shape.tp)
    own = [(b.ring or 1, b.ulysses or 1) for b in recipe.data.buckets if b.ring is not None or b.ulysses is not None]
    most = max((ulysses for _, ulysses in own), default=1)

    def allowed(mesh: MeshShape) -> bool:
        divides = all(mesh.dp * mesh.cp % (ring * ulysses) == 0 for ring, ulysses in own)
        return most <= heads // mesh.tp and divides and tp_fits(mesh, places)

    meshes = nearest_shapes(wanted, shape.world_size, heads=heads, count=shape.world_size**2)
    return [mesh for mesh in meshes if allowed(mesh)][:3]


def warn_ulysses(shape: MeshShape, places: Places, sent: float, bucket: str) -> list[str]:
    """Of a Ulysses group in several link domains. sent: bytes of a rank and step."""
    across = outside_share(shape, places) * sent
    if not across:
        return []
    links, cp = places.links, shape.cp
    fits = max(u for u in divisors(shape.ulysses) if not outside_share(with_cp(shape, cp // u, u), places))
    return [
        f"ulysses={shape.ulysses} with tp={shape.tp} crosses the edge of a link domain ({places.domain_size} ranks): "
        f"{gigabytes(across)} of the {gigabytes(sent)} that a rank sends in a step of {bucket} take "
        f"{at_rate(across, links.network)}; inside a domain all of it takes {at_rate(sent, links.link)}. What fits "
        f"inside: ring={cp // fits} ulysses={fits}"
    ]


def warn_ring(shape: MeshShape, places: Places, sent: float, bucket: str) -> list[str]:
    """Of a ring that can't stay under one leaf switch. sent: bytes of a rank and step."""
    links, nodes = places.links, math.ceil(shape.replica / places.ranks_per_node)
    if not links.switch or nodes <= links.switch or shape.ring == 1:
        return []
    crossing = max(
        sum(places.switch(a) != places.switch(b) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True))
        for ring in groups(shape, inner=shape.ulysses * shape.tp, size=shape.ring)
    )
    if not crossing:
        return []
    speed = (
        f"{at_rate(sent, links.spine)}, against {at_rate(sent, links.network)} under one"
        if links.spine
        else f"{at_rate(sent, links.network)}, and more where switches share fewer links (links.spine)"
    )
    return [
        f"ring={shape.ring}: a replica is {nodes} nodes, a leaf switch has {links.switch}, so {crossing} of its "
        f"{shape.ring} neighbours are under another: {gigabytes(sent)} a rank and step of {bucket} take {speed}"
    ]


def with_cp(shape: MeshShape, ring: int, ulysses: int) -> MeshShape:
    """The mesh with its context parallelism cut otherwise."""
    return MeshShape(shape.dp, ring, ulysses, shape.tp)


def groups(shape: MeshShape, *, inner: int, size: int) -> Iterator[list[int]]:
    """The groups of the axis below which `inner` ranks lie, each in the order of that axis."""
    for start in range(shape.world_size):
        if start // inner % size == 0:
            yield [start + index * inner for index in range(size)]


def outside_share(shape: MeshShape, places: Places) -> float:
    """The largest part of a rank's Ulysses peers that is outside of its link domain."""
    most = 0
    for group in groups(shape, inner=shape.tp, size=shape.ulysses):
        domains = [places.domain(rank) for rank in group]
        most = max(most, *(len(group) - domains.count(domain) for domain in set(domains)))
    return most / (shape.ulysses - 1) if most else 0.0


def sent_bytes(recipe: Recipe, shape: MeshShape, index: int, group: str) -> float:
    """Bytes that a rank sends in a group in a step of one bucket: of the first rank, which has the most heads."""
    ledger = own_ledger(recipe, shape, 0, step_micros(recipe, shape, index))
    return float(sum(sent for (name, _), (_, sent) in ledger.items() if name == group))


def step_micros(recipe: Recipe, shape: MeshShape, index: int) -> list[MicroShape]:
    """The micro-batches of a rank in a step whose draws are all of one bucket, its degrees resolved."""
    text, count = text_length(recipe.text), range(len(recipe.data.buckets))
    splits = [split_shape(shape, *bucket_degrees(recipe, i)) for i in count]
    tokens = [bucket_tokens(recipe, i).num_tokens / splits[i].cp + text for i in count]
    size = micro_sizes(recipe.data.micro_batch, tokens)[index]
    slots = math.ceil(plan_batches(recipe).sizes[index] * recipe.data.rounds / splits[index].dp)
    timesteps = bucket_timesteps(recipe, index)
    parts = even_parts(slots, math.ceil(slots / size))
    return [MicroShape(index, samples, text, timesteps=timesteps) for samples in parts]


def bucket_name(recipe: Recipe, index: int) -> str:
    """A bucket as a person knows it."""
    bucket = recipe.data.buckets[index]
    return f"data.buckets[{index}] ({bucket.name})"


def gigabytes(num_bytes: float) -> str:
    """Of 10^9."""
    return f"{num_bytes / GIGA:.3g} GB"


def at_rate(num_bytes: float, rate: float) -> str:
    """How long bytes take. rate: GB/s."""
    return f"{num_bytes / GIGA / rate:.3g} s at {rate:g} GB/s"


def order_hosts(addresses: Mapping[str, str], *, nodes_per_replica: int = 1) -> list[str]:
    """Nodes in the order in which they get their ranks. addresses: node -> its place in the network, outermost switch
    first (core.s0.node3).

    Nodes under one switch are neighbours, at every level; of switches those with most nodes come first. A replica of
    several nodes stays under one leaf switch where it can: a switch that isn't filled by whole replicas gives the rest
    to its parent, whose replicas are made of such rests. Nodes with no known place come last.
    """
    known: dict[str, tuple[str, ...]] = {}
    for node, address in addresses.items():
        switches = address.removesuffix(node) if address.endswith(node) else address.rpartition(".")[0]
        if switches.strip("."):
            known[node] = tuple(switches.strip(".").split("."))
    whole, rest = _gather(known, nodes_per_replica, depth=0)
    return [*whole, *rest, *sorted(addresses.keys() - known.keys(), key=by_number)]


def _gather(places: Mapping[str, tuple[str, ...]], size: int, *, depth: int) -> tuple[list[str], list[str]]:
    """(nodes of whole replicas, the rest) of those under one switch."""
    below: defaultdict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    here = []
    for node, switches in places.items():
        if len(switches) > depth:
            below[switches[depth]][node] = switches
        else:
            here.append(node)
    whole: list[str] = []
    rest: list[str] = []
    for _, nodes in sorted(below.items(), key=lambda item: (-len(item[1]), by_number(item[0]))):
        inner, left = _gather(nodes, size, depth=depth + 1)
        whole, rest = [*whole, *inner], [*rest, *left]
    rest += sorted(here, key=by_number)
    cut = len(rest) // size * size
    return [*whole, *rest[:cut]], rest[cut:]


def by_number(name: str) -> tuple[list[str | int], str]:
    """A key by which node9 comes before node10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def usable_nodes(
    available: int,
    ranks_per_node: int,
    mesh: MeshConfig,
    wanted: range,
    *,
    splits: Iterable[tuple[int, int]] = (),
) -> int:
    """The largest number of nodes in `wanted`, of those that are there, on which whole replicas fit:

        dp * ring * ulysses * tp == nodes * ranks_per_node

    splits: (ring, ulysses) of buckets with their own, whose product must divide dp * ring * ulysses. Raises ValueError
    with the numbers of nodes that would do.
    """
    replica, own = mesh.ring * mesh.ulysses * mesh.tp, [ring * ulysses for ring, ulysses in splits]

    def works(nodes: int) -> bool:
        ranks = nodes * ranks_per_node
        if ranks == 0 or ranks % replica or any(ranks // mesh.tp % cp for cp in own):
            return False
        return mesh.dp == "auto" or ranks == mesh.dp * replica

    usable = [nodes for nodes in wanted if nodes <= available and works(nodes)]
    if usable:
        return max(usable)
    step = math.lcm(replica, ranks_per_node, *(cp * mesh.tp for cp in own)) // ranks_per_node
    if mesh.dp == "auto":
        first = max(1, -(-min(wanted, default=1) // step))
        would = f"{', '.join(str(step * n) for n in range(first, first + 3))} nodes would do (multiples of {step})"
    elif mesh.dp * replica % ranks_per_node == 0 and works(mesh.dp * replica // ranks_per_node):
        would = f"{mesh.dp * replica // ranks_per_node} nodes would do, or mesh.dp=auto with multiples of {step}"
    else:
        would = f"no number of nodes does with mesh.dp={mesh.dp}: set mesh.dp=auto and use multiples of {step} nodes"
    raise ValueError(
        f"dp * ring * ulysses * tp == nodes * ranks_per_node doesn't hold for {mesh.dp} * {mesh.ring} * {mesh.ulysses} "
        f"* {mesh.tp} on {words(wanted)} nodes of {ranks_per_node} ranks, of which {available} are there: {would}"
    )


def words(wanted: range) -> str:
    """A range as a person writes it."""
    numbers = list(wanted)
    if len(numbers) < 2:
        return str(numbers[0]) if numbers else "no"
    return f"{numbers[0]}-{numbers[-1]}"
