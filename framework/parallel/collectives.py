"""Collectives that take their group as an argument and count what they send.

Bytes are what one rank sends by the bandwidth-optimal algorithm, for n ranks: an all-reduce 2 (n-1)/n of its tensor, an
all-gather and a reduce-scatter (n-1)/n of the full tensor, an all-to-all (n-1)/n of the local tensor, a ring exchange
what it sends.

A pair of them is differentiable where the model needs it. Every rank of a group has its own loss, the gradient is that
of their sum, and so a backward is the transpose of its forward:

    gather <-> reduce-scatter        sum <-> sum (each rank's result reaches every loss)        copy <-> sum

Those on tokens and gradients return their tensor as it is in a group of one rank, and count nothing.
"""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from framework.parallel.fragments import Fragment
from framework.parallel.mesh import Group

T = TypeVar("T")


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def sent(num_bytes: int, group: Group) -> Fraction:
    """(n-1)/n of a tensor's bytes."""
    return Fraction((group.size - 1) * num_bytes, group.size)


def all_reduce_sum(tensor: Tensor, group: Group, purpose: str) -> dist.Work:
    """Sum `tensor` over the group in place, without waiting: call `wait()` on what is returned before reading it."""
    group.traffic.count(purpose, 2 * sent(num_bytes(tensor), group))
    work = dist.all_reduce(tensor, group=group.process_group, async_op=True)
    assert work is not None, "this rank is a member of the groups that it holds"
    return work


def summed(tensor: Tensor, group: Group, purpose: str) -> Tensor:
    """The sum over the group, as a new tensor."""
    if group.size == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    all_reduce_sum(total, group, purpose).wait()
    return total


def all_gather_tokens(x_bsd: Tensor, group: Group, purpose: str) -> Tensor:
    """Every rank's tokens in rank order: `B s D` -> `B (n s) D`."""
    if group.size == 1:
        return x_bsd
    parts = x_bsd.new_empty((group.size * x_bsd.shape[0], *x_bsd.shape[1:]))
    group.traffic.count(purpose, sent(num_bytes(parts), group))
    dist.all_gather_into_tensor(parts, x_bsd.contiguous(), group=group.process_group)
    return rearrange(parts, "(n b) s d -> b (n s) d", n=group.size)


def reduce_scatter_tokens(x_bsd: Tensor, group: Group, purpose: str) -> Tensor:
    """This rank's tokens of the sum over the group: `B (n s) D` -> `B s D`."""
    if group.size == 1:
        return x_bsd
    parts = rearrange(x_bsd, "b (n s) d -> (n b) s d", n=group.size).contiguous()
    out_bsd = parts.new_empty((x_bsd.shape[0], *parts.shape[1:]))
    group.traffic.count(purpose, sent(num_bytes(x_bsd), group))
    dist.reduce_scatter_tensor(out_bsd, parts, group=group.process_group)
    return out_bsd


def all_to_all(flat: Tensor, send: list[int], receive: list[int], group: Group, purpose: str) -> Tensor:
    """Element ranges of sizes `send` to the group's ranks in order; what came, of sizes `receive`, likewise."""
    out = flat.new_empty(sum(receive))
    group.traffic.count(purpose, sent(num_bytes(flat), group))
    dist.all_to_all_single(out, flat, receive, send, group=group.process_group)
    return out


def ring_exchange(tensor: Tensor, group: Group, purpose: str) -> Callable[[], Tensor]:
    """Send `tensor` to the next rank and take the previous one's. Starts at once; call what is returned for the result.

    On a GPU that call makes the stream wait, not the host.
    """
    out = torch.empty_like(tensor)
    onward, back = (group.ranks[(group.index + step) % group.size] for step in (1, -1))
    group.traffic.count(purpose, Fraction(num_bytes(tensor)))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, onward, group.process_group),
            dist.P2POp(dist.irecv, out, back, group.process_group),
        ]
    )

    def receive() -> Tensor:
        for work in works:
            work.wait()
        return out

    return receive


class GatherTokens(torch.autograd.Function):
    """Forward: all-gather. Backward: reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x_bsd: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_tokens(x_bsd, group, "gather_tokens")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_tokens(grads[0], ctx.group, "scatter_tokens"), None


class ScatterTokens(torch.autograd.Function):
    """Forward: reduce-scatter. Backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x_bsd: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_tokens(x_bsd, group, "scatter_tokens")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_tokens(grads[0], ctx.group, "gather_tokens"), None


class SumGradient(torch.autograd.Function):
    """Forward: the tensor as it is. Backward: sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0], ctx.group, "replicated"), None


def gather_tokens(x_bsd: Tensor, group: Group) -> Tensor:
    """This rank's tokens -> the group's tokens, `B s D` -> `B (n s) D`; the gradients of the copies are summed."""
    return x_bsd if group.size == 1 else GatherTokens.apply(x_bsd, group)


def scatter_tokens(x_bsd: Tensor, group: Group) -> Tensor:
    """Partial sums of the group's tokens -> this rank's tokens summed, `B (n s) D` -> `B s D`."""
    return x_bsd if group.size == 1 else ScatterTokens.apply(x_bsd, group)


def sum_gradient(x: Tensor, group: Group) -> Tensor:
    """A tensor that every rank of the group holds alike and uses on its own tokens: its gradients are summed."""
    return x if group.size == 1 else SumGradient.apply(x, group)


def broadcast_tensor(tensor: Tensor, group: Group, purpose: str) -> None:
    """Fill a contiguous tensor with that of the group's first rank."""
    group.traffic.count(purpose, sent(num_bytes(tensor), group))
    dist.broadcast(tensor, src=group.ranks[0], group=group.process_group)


def broadcast_object(value: T | None, group: Group, *, source: int = 0) -> T:
    """The value that the group's member `source` holds, on every member. For plans and flags, not for tensors."""
    if group.process_group is None:  # one process without torch.distributed
        assert value is not None
        return value
    box: list[T | None] = [value]
    dist.broadcast_object_list(box, src=group.ranks[source], group=group.process_group)
    assert box[0] is not None
    return box[0]


def gather_objects(value: T, group: Group) -> list[T]:
    """Everybody's value, in the group's order, on every member. For plans and flags, not for tensors."""
    if group.process_group is None:  # one process without torch.distributed
        return [value]
    values: list[T] = [value] * group.size
    dist.all_gather_object(values, value, group=group.process_group)
    return values


def gather_floats(values: list[float], group: Group) -> list[list[float]]:
    """Everybody's few numbers, in the group's order, on every member."""
    here = torch.tensor(values, dtype=torch.float64)
    parts = here.new_empty(group.size * len(values))
    group.traffic.count("floats", sent(num_bytes(parts), group))
    dist.all_gather_into_tensor(parts, here, group=group.process_group)
    found: list[list[float]] = parts.view(group.size, len(values)).tolist()
    return found


def shared_failure(failure: str | None, group: Group) -> str | None:
    """The failure of the first member that had one, on every member: what one can't do, none goes on from."""
    return next((each for each in gather_objects(failure, group) if each is not None), None)


def barrier(group: Group) -> None:
    """Wait for every member."""
    if group.process_group is not None:
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
