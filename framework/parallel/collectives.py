"""Collectives that take their group as an argument and count what they send.

Bytes are what one rank sends by the bandwidth-optimal algorithm: an all-reduce 2 (n-1)/n of its tensor, a rooted
broadcast (n-1)/n of it (the mean over the ranks).
"""

from collections import Counter
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from framework.parallel.fragments import Fragment
from framework.parallel.mesh import Group

T = TypeVar("T")


def all_reduce_sum(tensor: Tensor, group: Group, purpose: str) -> dist.Work:
    """Sum `tensor` over the group in place, without waiting: call `wait()` on what is returned before reading it."""
    group.traffic.count(purpose, 2 * (group.size - 1) * tensor.numel() * tensor.element_size() // group.size)
    work = dist.all_reduce(tensor, group=group.process_group, async_op=True)
    assert work is not None, "this rank is a member of the groups that it holds"
    return work


def broadcast_object(value: T | None, group: Group, *, source: int = 0) -> T:
    """The value that the group's member `source` holds, on every member. For plans and flags, not for tensors."""
    box: list[T | None] = [value]
    dist.broadcast_object_list(box, src=group.ranks[source], group=group.process_group)
    assert box[0] is not None
    return box[0]


def gather_objects(value: T, group: Group) -> list[T]:
    """Everybody's value, in the group's order, on every member. For plans and flags, not for tensors."""
    values: list[T] = [value] * group.size
    dist.all_gather_object(values, value, group=group.process_group)
    return values


def barrier(group: Group) -> None:
    """Wait for every member."""
    dist.barrier(group=group.process_group)


def gather_fragments(fragments: list[Fragment], group: Group) -> dict[str, Tensor]:
    """Fragments of one state -> whole tensors by name on the group's first rank, on the CPU; nothing on the others.

    For verification: the first rank holds the whole state. Every element must be there exactly once.
    """
    held = [
        (f.shard.name, f.shard.global_shape, o, v.cpu())
        for f in fragments
        if f.shard.owner
        for o, v in f.global_boxes()
    ]
    parts: list[list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]] | None = [[]] * group.size
    parts = parts if group.index == 0 else None
    dist.gather_object(held, parts, dst=group.ranks[0], group=group.process_group)
    full: dict[str, Tensor] = {}
    seen: Counter[str] = Counter()
    for name, shape, offset, values in (part for held in parts or [] for part in held):
        tensor = full.setdefault(name, values.new_zeros(shape))
        tensor[tuple(slice(o, o + s) for o, s in zip(offset, values.shape, strict=True))] = values
        seen[name] += values.numel()
    wrong = {name: seen[name] for name, tensor in full.items() if seen[name] != tensor.numel()}
    assert not wrong, f"elements that are missing or there twice: {wrong}"
    return full
