"""A machine with round numbers, for hand-worked seconds."""

import copy
from pathlib import Path
from typing import Any

from framework.plan.hardware import Hardware, read_hardware


def leaf(value: object) -> dict[str, object]:
    return {"value": value, "source": "made up"}


def tree(**changes: object) -> dict[str, Any]:
    """A plain tree of a description; changes: by dotted name with two underscores for a dot, None takes it out."""
    nothing, links = 1e-15, {"bandwidth": 1e15, "latency": 1e-15, "hop": 1e-15}
    made: dict[str, Any] = {
        "device": {
            "kind": "cpu",
            **{name: leaf(1e9) for name in ("memory", "context", "communicator")},
            "headroom": leaf(1.0),
            "peak": {"float32": leaf(2e6)},
            "matmul": {"float32": leaf(1e6)},
            "attention": {"aten": {"forward": leaf(1e6), "backward": leaf(0.5e6)}},
            **{name: leaf(1e15) for name in ("bandwidth", "update", "host_bandwidth", "host_memory")},
            **{"launch": leaf(nothing), "step": leaf(0), "price": leaf(0)},
        },
        "network": {
            "domain": leaf(8),
            **{side: {name: {"default": leaf(v)} for name, v in links.items()} for side in ("inside", "across")},
            "overlap": leaf(1.0),
        },
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        node = made
        for key in path:
            node = node.setdefault(key, {})
        if value is None:
            del node[last]
        else:
            node[last] = value if isinstance(value, dict | str) else leaf(value)
    return copy.deepcopy(made)


def machine(**changes: object) -> Hardware:
    """The machine of such a tree."""
    return read_hardware(tree(**changes), Path("made.yaml"))
