"""Ranks that aren't there: one process takes the place of the first of up to many thousand.

Torch's fake process group answers every collective at once, without a peer: sizes, calls and bytes are those of the
real thing, values are not. What would be received it leaves unwritten (torch 2.11; later releases only in a ring); it
is filled with zeros here, so that no chance NaN stops an optimizer step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from framework.parallel.config import MeshShape
from framework.parallel.mesh import Mesh, build_mesh

LEFT_UNWRITTEN: Final = ("recv_", "_allgather_base_", "_reduce_scatter_base_", "alltoall_base_")


class ZerosReceived(TorchDispatchMode):
    """While inside, what fake peers send is zero."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and func.__name__.partition(".")[0] in LEFT_UNWRITTEN:
            for tensor in args[0] if isinstance(args[0], list) else [args[0]]:
                tensor.zero_()
        return out


@contextmanager
def fake_mesh(shape: MeshShape, splits: Sequence[tuple[int, int]] = ()) -> Iterator[Mesh]:
    """The first rank of a mesh, in a process that has joined no process group."""
    dist.init_process_group("fake", rank=0, world_size=shape.world_size, store=FakeStore())
    try:
        with ZerosReceived():
            yield build_mesh(shape, 0, splits, control="fake")
    finally:
        dist.destroy_process_group()
