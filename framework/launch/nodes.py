"""Which nodes are left out, and for how long: one JSON file for each cluster, which many jobs read and write.

    node -> count (of its failures), reason (of the last), since, until (Unix seconds)

A node is left out for `expiry` hours after its first failure and for twice as long after each further one, at most
LONGEST: a node that fails again and again costs a job its start each time, one that was repaired comes back by itself.
A count is forgotten when the node has been back for as long as it was last left out.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from framework.launch.config import ClusterConfig
from framework.run import write_atomically

HOUR = 3600.0
LONGEST = 30 * 24.0  # hours


@dataclass(frozen=True)
class BadNode:
    """count: of its failures. reason: of the last. since, until: when it was found bad, and when it's tried again."""

    node: str
    count: int
    reason: str
    since: float
    until: float

    def is_excluded(self, now: float) -> bool:
        return now < self.until

    def is_forgotten(self, now: float) -> bool:
        return now >= self.until + (self.until - self.since)


def nodes_path(cluster: ClusterConfig) -> Path:
    """Where a cluster's bad nodes are remembered."""
    if cluster.nodes_file:
        return Path(cluster.nodes_file).expanduser()
    return Path.home() / ".cuboid" / f"nodes-{cluster.name}.json"


def read_nodes(path: Path) -> list[BadNode]:
    """All that are remembered, by name. Raises ValueError for a file that isn't one of ours."""
    if not path.is_file():
        return []
    try:
        return sorted((BadNode(**fields) for fields in json.loads(path.read_text())), key=lambda bad: bad.node)
    except (TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} isn't a list of bad nodes: move it away, or name another nodes_file") from None


def excluded(path: Path, now: float) -> list[str]:
    """The nodes to leave out, by name."""
    return [bad.node for bad in read_nodes(path) if bad.is_excluded(now)]


def remember(path: Path, node: str, reason: str, now: float, expiry: float) -> BadNode:
    """A node was found bad. expiry: hours of its first exclusion. Raises OSError.

    Jobs that start together may find the same node bad: within an exclusion of the same reason nothing is counted.
    """
    with changed(path) as nodes:
        known = nodes.get(node)
        if known is not None and known.is_forgotten(now):
            known = None
        if known is not None and known.is_excluded(now) and known.reason == reason:
            return known
        count = 1 if known is None else known.count + 1
        hours = min(expiry * 2 ** min(count - 1, 30), max(LONGEST, expiry))
        bad = BadNode(node, count, reason, since=now, until=now + hours * HOUR)
        nodes[node] = replace(bad, until=max(bad.until, known.until if known else 0.0))
        for name in [name for name, each in nodes.items() if each.is_forgotten(now)]:
            del nodes[name]
        return nodes[node]


def forget(path: Path, node: str) -> bool:
    """A node is good again; whether it was remembered."""
    with changed(path) as nodes:
        return nodes.pop(node, None) is not None


@contextmanager
def changed(path: Path) -> Iterator[dict[str, BadNode]]:
    """The nodes by name, to be changed; written when the block ends. One writer at a time, where the file system knows
    locks; elsewhere the file is whole and of two writers at once one may win.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        before = {bad.node: bad for bad in read_nodes(path)}
        nodes = dict(before)
        yield nodes
        if nodes != before:
            text = ",\n".join(json.dumps(asdict(nodes[name])) for name in sorted(nodes))
            write_atomically(path, f"[\n{text}\n]\n")
