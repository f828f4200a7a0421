"""Seconds of collectives on links: the alpha-beta model, with domains.

A collective of n ranks, of which l share a link domain, that sends b bytes from each rank:

    latency + (n - n/l) hop_inside + (n/l - 1) hop_across + b / bandwidth

as NCCL's own model has it for a ring (src/graph/tuning.cc); the hops of a small all-reduce are a tree's, 2 log2. A
ring that leaves a domain does so on l ports at once, each with 1/l of the bytes, so its bandwidth is min(inside, l
across): four nodes of 8 ports of 47 GB/s all-reduce at 376 GB/s a rank. An all-to-all sends (n-l)/(n-1) of its bytes
across, each rank by its own port. In a ring exchange some rank always sends to another domain, and the others wait for
it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from framework.plan.hardware import Link, Network, rate

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ring", "reduce"]


@dataclass(frozen=True)
class Place:
    """A group's size, and how many of its ranks share a link domain."""

    size: int
    local: int

    @property
    def domains(self) -> int:
        return -(-self.size // self.local)


def place_of(size: int, stride: int, world: int, domain: int) -> Place:
    """Of a group of `size` ranks that are `stride` apart, in a world whose domains are runs of `domain` ranks.

    Where groups and domains don't divide each other, the group that is cut worst counts.
    """
    if world <= domain:
        return Place(size, size)
    shared = math.gcd(size * stride, domain)
    return Place(size, min(size, max(1, shared // stride)))


def seconds(network: Network, place: Place, kind: Kind, calls: float, sent: float) -> float:
    """Of `calls` collectives that send so many bytes together from each rank; 0 in a group of one."""
    if place.size == 1 or not calls:
        return 0.0
    inside, across = network.inside, network.across
    domains = place.domains
    far = domains > 1
    latency = max(rate(link.latency, kind, "network.latency") for link in ((inside, across) if far else (inside,)))
    hops = hop_seconds(inside, kind, steps(kind, place.local)) * (domains if kind in RINGS else 1)
    hops += hop_seconds(across, kind, steps(kind, domains)) if far else 0.0
    return calls * (latency + hops) + sent * per_byte(network, place, kind)


RINGS = ("all_gather", "reduce_scatter", "reduce")


def steps(kind: Kind, size: int) -> float:
    """Steps from rank to rank among so many."""
    if kind == "ring":
        return 1.0 if size > 1 else 0.0
    return 2 * math.log2(size) if kind == "all_reduce" else size - 1.0


def hop_seconds(link: Link, kind: Kind, count: float) -> float:
    """So many steps."""
    return count * rate(link.hop, kind, "network.hop") if count else 0.0


def per_byte(network: Network, place: Place, kind: Kind) -> float:
    """Seconds for each byte that a rank sends."""
    inside = rate(network.inside.bandwidth, kind, "network.inside.bandwidth")
    if place.domains == 1:
        return 1 / inside
    across = rate(network.across.bandwidth, kind, "network.across.bandwidth")
    if kind == "ring":
        return 1 / across
    if kind == "all_to_all":
        share = (place.size - place.local) / (place.size - 1)
        return max(share / across, (1 - share) / inside)
    return 1 / min(inside, place.local * across)
