"""What goes over the wire, engines included: every collective of torch, seen where it is dispatched.

Bytes are what one rank sends by the bandwidth-optimal algorithm, for n ranks: all-gather and reduce-scatter (n-1)/n of
the full tensor, all-reduce twice that, a rooted reduce or broadcast (n-1)/n of its tensor, an all-to-all (n-1)/n of the
local tensor, a send what it sends.

Our own collectives count themselves (parallel/collectives.py); a ZeRO engine's don't pass through them, so what the
engine sends is the difference.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from framework.parallel.mesh import Mesh

# Operation -> its kind, the argument that holds the full (or local) tensor, and how often (n-1)/n of that is sent.
OPERATIONS: Final[Mapping[str, tuple[str, int, int]]] = MappingProxyType(
    {
        "allreduce_": ("all_reduce", 0, 2),
        "allreduce_coalesced_": ("all_reduce", 0, 2),
        "_allgather_base_": ("all_gather", 0, 1),
        "allgather_": ("all_gather", 0, 1),
        "allgather_into_tensor_coalesced_": ("all_gather", 0, 1),
        "_reduce_scatter_base_": ("reduce_scatter", 1, 1),
        "reduce_scatter_": ("reduce_scatter", 1, 1),
        "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 1),
        "reduce_": ("reduce", 0, 1),
        "broadcast_": ("broadcast", 0, 1),
        "alltoall_base_": ("all_to_all", 1, 1),
        "alltoall_": ("all_to_all", 1, 1),
    }
)
FREE: Final = ("recv_", "barrier", "monitored_barrier_")


class CollectiveMeter(TorchDispatchMode):
    """Counts calls and bytes by kind of collective while it is entered. AssertionError on a kind it doesn't know."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.num_bytes: defaultdict[str, Fraction] = defaultdict(Fraction)

    @property
    def total(self) -> Fraction:
        """Bytes of all kinds."""
        return sum(self.num_bytes.values(), Fraction())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        assert func.namespace != "_c10d_functional", f"{func} isn't counted"
        return func(*args, **(kwargs or {}))

    def _count(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        name = func.__name__.partition(".")[0]
        if name in FREE:
            return
        if name == "send":
            self._add("send", Fraction(num_bytes(args[0])))
            return
        assert name in OPERATIONS, f"{func} isn't counted"
        kind, place, times = OPERATIONS[name]
        size = next(dist.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject))
        self._add(kind, Fraction(times * (size - 1) * num_bytes(args[place]), size))

    def _add(self, kind: str, sent: Fraction) -> None:
        self.calls[kind] += 1
        self.num_bytes[kind] += sent


def num_bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of a list, nested or not, of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in leaves(tensors))


def leaves(tensors: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nested list."""
    if isinstance(tensors, torch.Tensor):
        yield tensors
    else:
        for inner in tensors:
            yield from leaves(inner)


def own_traffic(mesh: Mesh) -> dict[tuple[str, str], tuple[int, Fraction]]:
    """(group, purpose) -> (calls, bytes) of our own collectives so far, on a mesh and its splits."""
    groups = {id(group): group for each in (mesh, *mesh.splits.values()) for group in each.groups()}
    found: dict[tuple[str, str], tuple[int, Fraction]] = {}
    for group in groups.values():
        for purpose, calls in group.traffic.calls.items():
            before = found.get((group.name, purpose), (0, Fraction()))
            if group.size > 1:
                found[group.name, purpose] = before[0] + calls, before[1] + group.traffic.num_bytes[purpose]
    return found
