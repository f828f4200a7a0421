"""What the links between ranks do, measured: seconds of collectives, what of them hides, how ranks drift apart.

A collective is timed after a little computing, as cores that sleep are slower to answer. After much computing it takes
longer by what ranks wait for the slowest of them, which is measured apart, as a share of the computing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from framework.parallel.collectives import (
    all_gather_tokens,
    all_reduce_sum,
    all_to_all,
    barrier,
    gather_floats,
    reduce_scatter_tokens,
    ring_exchange,
)
from framework.parallel.mesh import Group, Mesh
from framework.plan.links import Kind, steps
from framework.programs.rates import wait

SMALL = 1 << 12  # bytes of a tensor; 64 times as many on a GPU's link
LARGE = 1 << 22
REPEATS = 15
BURST = 8  # collectives of a repeat
STRETCH = 64  # matrix products between two of them, where there is much computing
DRIFTING: Final = ("all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class LinkTimes:
    """Of one kind of collective, seconds and bytes/s. hop: for each rank beyond two."""

    latency: float
    hop: float
    bandwidth: float


def collectives() -> dict[Kind, Callable[[Tensor, Group], object]]:
    """Collectives on a flat tensor of the rank's own, by kind."""

    def exchange(flat: Tensor, group: Group) -> object:
        part = flat.numel() // group.size
        return all_to_all(flat, [part] * group.size, [part] * group.size, group, "calibrate")

    return {
        "all_gather": lambda flat, g: all_gather_tokens(flat.view(g.size, -1)[:1].unsqueeze(0), g, "calibrate"),
        "reduce_scatter": lambda flat, g: reduce_scatter_tokens(flat.view(1, g.size, -1), g, "calibrate"),
        "all_reduce": lambda flat, g: all_reduce_sum(flat, g, "calibrate").wait(),
        "reduce": lambda flat, g: dist.reduce(flat, g.ranks[0], group=g.process_group),
        "all_to_all": exchange,
        "ring": lambda flat, g: ring_exchange(flat, g, "calibrate")(),
    }


def sent_of(kind: Kind, num_bytes: int, size: int) -> float:
    """Bytes that a rank sends of a tensor."""
    share = (size - 1) / size
    return num_bytes * {"all_reduce": 2 * share, "ring": 1.0}.get(kind, share)


def link_times(kind: Kind, mesh: Mesh, turns: float, device: torch.device) -> LinkTimes:
    """Of a kind of collective, in pairs of ranks alone on the machine, and among all ranks. A collective."""
    call = collectives()[kind]
    scale = 64 if device.type == "cuda" else 1
    found: dict[tuple[int, int], float] = {}
    for group, alone in ((mesh.ulysses, True), (mesh.world, False)):
        for num_bytes in (SMALL * scale, LARGE * scale):
            flat = torch.ones(num_bytes // 4 // group.size * group.size, device=device)
            barrier(mesh.control)
            mine = not alone or mesh.rank in (0, 1)
            spent, _ = slowest(lambda f=flat, g=group: call(f, g), group if mine else None, mesh, device)  # type: ignore[misc]
            found.setdefault((group.size, num_bytes), spent / (1.0 if alone else turns))
    size, few, many = mesh.world.size, SMALL * scale, LARGE * scale
    bandwidths = [
        sent_of(kind, many - few, n) / max(1e-9, found[n, many] - found[n, few]) for n in dict.fromkeys((2, size))
    ]
    bandwidth = statistics.harmonic_mean(bandwidths)
    latencies = {n: max(1e-7, found[n, few] - sent_of(kind, few, n) / bandwidth) for n in (2, size)}
    more = steps(kind, size) - steps(kind, 2)
    hop = max(1e-7, (latencies[size] - latencies[2]) / more) if more else 1e-7
    return LinkTimes(max(1e-7, latencies[2] - hop * steps(kind, 2)), hop, bandwidth)


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call that all ranks of a group make together."""
    call()
    return statistics.median(once(call, device) for _ in range(REPEATS))


def once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, with what it queues."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def slowest(
    call: Callable[[], object], group: Group | None, mesh: Mesh, device: torch.device, *, stretch: int = 1
) -> tuple[float, float]:
    """(seconds that a collective of a group adds to `stretch` matrix products before it, seconds of the products), of
    the slowest rank. group: None on a rank that only waits. A collective.
    """
    mine = [0.0, 0.0] if group is None else list(stretch_seconds(call, group, device, stretch))
    both, computed = (max(each) for each in zip(*gather_floats(mine, mesh.control), strict=True))
    return max(0.0, both - computed), computed


def stretch_seconds(
    call: Callable[[], object], group: Group, device: torch.device, stretch: int
) -> tuple[float, float]:
    """Of this rank: (of a collective and the products before it, of the products)."""
    side = 1024 if device.type == "cuda" else 128  # some 50 us
    a = torch.randn(side, side, device=device)

    def products() -> None:
        for _ in range(BURST * stretch):
            torch.mm(a, a)

    def both() -> None:
        for _ in range(BURST):
            for _ in range(stretch):
                torch.mm(a, a)
            call()

    both()
    spent: dict[Callable[[], object], list[float]] = {products: [], both: []}
    for _ in range(REPEATS):
        for each, found in spent.items():
            barrier(group)
            found.append(once(each, device))
    return statistics.median(spent[both]) / BURST, statistics.median(spent[products]) / BURST


def measure_skew(mesh: Mesh, turns: float, device: torch.device) -> dict[str, float]:
    """skew: of the time computed between two collectives, what ranks wait for the slowest. stretch: that time, where
    `turns` ranks take turns on a core. A collective.
    """
    flat = torch.ones(SMALL // 4, device=device)
    found, stretches = [], []
    for kind in DRIFTING:
        call = collectives()[kind]
        for group, mine in ((mesh.ulysses, mesh.rank in (0, 1)), (mesh.world, True)):
            member = group if mine else None
            few, _ = slowest(lambda c=call, g=group: c(flat, g), member, mesh, device)  # type: ignore[misc]
            many, computed = slowest(lambda c=call, g=group: c(flat, g), member, mesh, device, stretch=STRETCH)  # type: ignore[misc]
            found.append(max(0.0, many - few) / computed)
            stretches.append(computed / (turns if group.size > 2 else 1.0))
    return {"skew": statistics.median(found), "stretch": statistics.median(stretches)}


def measure_overlap(mesh: Mesh, device: torch.device) -> float:
    """Share of a ring exchange that hides behind matrix products which take as long. A collective."""
    flat = torch.ones(LARGE * (64 if device.type == "cuda" else 1) // 4, device=device)
    side = 4096 if device.type == "cuda" else 384
    a = torch.randn(side, side, device=device)

    def exchange() -> None:
        ring_exchange(flat, mesh.world, "calibrate")()

    barrier(mesh.control)
    message = median_seconds(exchange, device)
    one = median_seconds(lambda: torch.mm(a, a), device)
    (message, one) = (max(each) for each in zip(*gather_floats([message, one], mesh.control), strict=True))
    count = max(1, round(message / one))

    def products() -> None:
        for _ in range(count):
            torch.mm(a, a)

    def both() -> None:
        receive = ring_exchange(flat, mesh.world, "calibrate")
        products()
        receive()

    barrier(mesh.control)
    times = [median_seconds(each, device) for each in (exchange, products, both)]
    spent, computed, together = (
        statistics.median(each) for each in zip(*gather_floats(times, mesh.control), strict=True)
    )
    return min(1.0, max(0.0, (spent + computed - together) / min(spent, computed)))
