"""Nodes that are slower than the others, by what every rank needs for the same piece of work (programs/probe.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low


@dataclass(frozen=True)
class SlowNode:
    """The slowest node, by its slowest rank, against the median of the nodes."""

    node: str
    factor: float


def slowest_node(compute: Sequence[float], nodes: Sequence[str]) -> SlowNode | None:
    """compute: seconds of each rank for the same work, ranks of node i from i ranks_per_node on. Each node by its
    slowest rank; None for fewer than two nodes, or ranks that don't divide among them.
    """
    if len(nodes) < 2 or not compute or len(compute) % len(nodes):
        return None
    each = len(compute) // len(nodes)
    slow = [max(compute[i * each : (i + 1) * each]) for i in range(len(nodes))]
    worst = max(range(len(nodes)), key=slow.__getitem__)
    usual = median_low(slow)  # of two nodes the faster
    return SlowNode(nodes[worst], slow[worst] / usual) if usual > 0 else None


class Stragglers:
    """Watches an attempt's measurements. limit: factor above which a node is slow, 0 = never; times: measurements in a
    row until it is said.
    """

    def __init__(self, nodes: Sequence[str], *, limit: float, times: int) -> None:
        self._nodes, self._limit, self._times = nodes, limit, times
        self._latest: tuple[float, ...] = ()
        self._slow: SlowNode | None = None
        self._count = 0

    def see(self, compute: tuple[float, ...]) -> SlowNode | None:
        """Take the newest measurement, which may be the one before again. The node that has now been slow for long
        enough; said once.
        """
        if compute == self._latest or not self._limit:
            return None
        self._latest, before, worst = compute, self._slow, slowest_node(compute, self._nodes)
        if worst is None or worst.factor <= self._limit:
            self._slow, self._count = None, 0
            return None
        same = before is not None and before.node == worst.node
        self._slow, self._count = worst, self._count + 1 if same else 1
        return worst if self._count == self._times else None
