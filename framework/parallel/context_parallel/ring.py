"""Ring attention: keys and values go round, queries stay (Ring Attention, arXiv 2310.01889).

Attention over a union of key blocks follows from each block's output and log-sum-exp (FlashAttention-2, arXiv
2307.08691, section 3.1), in at least float32:

    lse = log(exp(lse_a) + exp(lse_b))          out = out_a + w (out_b - out_a),  w = exp(lse_b - lse)

and a block's share of the gradients from the output and log-sum-exp of the whole. Where all tokens attend to each
other, every rank has the same work and no reordering of tokens is needed.

Under a pattern (kernels/pattern.py) the queries of a rank fall into parts that attend to the same spans of keys, and
for each span that a rank holds there is one call of the kernel; what doesn't attend is never computed. The messages
stay: all keys go to all ranks. Tokens stay in order too, so with block_causal the last rank has the most to do, up to
twice the mean.

While a kernel runs, the next keys and values are on their way, k and v in one message, r - 1 of them. In the backward
k and v go round again; the gradient of a block starts at the rank after its owner, is added to at every rank, and comes
home with the last of r - 1 messages: what the owner itself contributes never travels. It travels in k's dtype.

What a kernel or a message has given is the ring's own, so sums are formed in it: a tensor of megabytes that is
allocated anew costs more than the arithmetic (a merge of 2 MB: 2.5 ms with new tensors, 0.2 ms in place).

Padding at a rank's tail isn't computed: a rank may hold padding only, and its queries give zero.

Shapes: `B` samples, `S` tokens of a rank, `h` heads, `d` channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel
from framework.kernels.pattern import EVERY_TOKEN, Span, TokenPattern, reaches
from framework.parallel.collectives import ring_exchange
from framework.parallel.mesh import Group

Pair = tuple[Tensor, Tensor]


def ring_forward(
    kernel: AttentionKernel,
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshd: Tensor,
    valid: tuple[int, ...],
    group: Group,
    *,
    pattern: TokenPattern = EVERY_TOKEN,
) -> Pair:
    """Attention of this rank's queries over the valid tokens of all ranks: out `B S h d`, lse `B h S`.

    valid: real tokens of every rank. pattern: which tokens attend to each other.
    """
    precise = torch.promote_types(q_bshd.dtype, torch.float32)
    parts = ring_parts(pattern, valid, group.index)
    found: list[Pair | None] = [None] * len(parts)
    held = torch.stack([k_bshd, v_bshd]) if group.size > 1 else None
    k, v = k_bshd, v_bshd
    for step in range(group.size):
        receive = send_onward(held, group, last=step + 1 == group.size)
        for index, part in enumerate(parts):
            for keys in part.keys[(group.index - step) % group.size]:
                block = kernel.forward(q_bshd[:, part.queries], k[:, keys], v[:, keys], None)
                before = found[index]
                found[index] = block if before is None else merge(before, block, precise)
        if receive is not None:
            held = receive()
            k, v = held.unbind(0)
    batch, tokens, heads, _ = q_bshd.shape
    if not parts:
        return torch.zeros_like(q_bshd), q_bshd.new_full((batch, heads, tokens), -torch.inf, dtype=precise)
    merged = [pair for pair in found if pair is not None]
    assert len(merged) == len(parts), "every token attends to itself"
    out_bshd = join([out.to(q_bshd.dtype) for out, _ in merged], 1)
    lse_bhs = join([lse for _, lse in merged], 2)
    missing = tokens - lse_bhs.shape[2]
    lse_bhs = F.pad(lse_bhs, (0, missing), value=-torch.inf) if missing else lse_bhs
    return pad_tokens(out_bshd, tokens), lse_bhs


def ring_backward(
    kernel: AttentionKernel,
    dout_bshd: Tensor,
    attended: Attended,
    valid: tuple[int, ...],
    group: Group,
    *,
    pattern: TokenPattern = EVERY_TOKEN,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's tokens. attended: what `ring_forward` took and gave."""
    _, k_bshd, v_bshd, _, _ = attended
    backward = PartsBackward(kernel, dout_bshd, attended, ring_parts(pattern, valid, group.index))
    own: Pair | None = None
    held = torch.stack([k_bshd, v_bshd]) if group.size > 1 else None
    k, v = k_bshd, v_bshd
    coming: Callable[[], Tensor] | None = None
    for step in range(group.size):
        receive = send_onward(held, group, last=step + 1 == group.size)
        share = backward.of_keys(k, v, rank=(group.index - step) % group.size)
        if own is None:
            own = padded(share, k.shape[1])
        else:
            travelling = torch.stack(padded(share, k.shape[1])) if coming is None else add_share(coming(), share)
            coming = ring_exchange(travelling, group, "ring_gradients")
        if receive is not None:
            held = receive()
            k, v = held.unbind(0)
    assert own is not None
    if coming is not None:
        dk, dv = add_share(coming(), own).unbind(0)
        own = dk, dv
    return backward.of_queries(), *own


@dataclass(frozen=True)
class Part:
    """Queries of this rank that attend to the same keys. keys: of each rank those that it holds. All counted within the
    rank that holds them.
    """

    queries: slice
    keys: tuple[tuple[slice, ...], ...]


def ring_parts(pattern: TokenPattern, valid: tuple[int, ...], index: int) -> list[Part]:
    """What the queries of a rank attend to, on every rank; pairs that don't attend are in no part. Padding has none."""
    starts = tuple(accumulate(valid, initial=0))
    first, last = starts[index], starts[index + 1]

    def held(keys: tuple[Span, ...], rank: int) -> tuple[slice, ...]:
        begin, end = starts[rank], starts[rank + 1]
        spans = ((max(start, begin), min(stop, end)) for start, stop in keys)
        return tuple(slice(start - begin, stop - begin) for start, stop in spans if start < stop)

    return [
        Part(
            slice(reach.queries[0] - first, reach.queries[1] - first),
            tuple(held(reach.keys, rank) for rank in range(len(valid))),
        )
        for reach in reaches(pattern, starts[-1], (first, last))
    ]


class PartsBackward:
    """The backward of a rank's queries, rank by rank of the keys."""

    def __init__(self, kernel: AttentionKernel, dout_bshd: Tensor, attended: Attended, parts: list[Part]) -> None:
        q, _, _, out, lse = attended
        self._kernel, self._parts, self._q, self._precise = kernel, parts, q, lse.dtype
        self._rows = [
            (dout_bshd[:, s].contiguous(), q[:, s], out[:, s], lse[..., s].contiguous())
            for s in (part.queries for part in parts)
        ]
        self._dq: list[Tensor | None] = [None] * len(parts)

    def of_keys(self, k_bshd: Tensor, v_bshd: Tensor, *, rank: int) -> Pair:
        """The gradients of a rank's keys and values: of as many leading tokens as have some."""
        pieces = [(index, keys) for index, part in enumerate(self._parts) for keys in part.keys[rank]]
        most = max((keys.stop for _, keys in pieces), default=0)
        lone = len(pieces) == 1 and pieces[0][1].start == 0
        sums = None if lone else zeros_of((k_bshd[:, :most], v_bshd[:, :most]), self._precise)
        for index, keys in pieces:
            dout, q, out, lse = self._rows[index]
            dq, dk, dv = self._kernel.backward(dout, Attended(q, k_bshd[:, keys], v_bshd[:, keys], out, lse), None)
            if sum(len(each) for each in self._parts[index].keys) > 1:
                dq = dq.to(lse.dtype)
            before = self._dq[index]
            self._dq[index] = dq if before is None else before.add_(dq)
            if sums is None:
                return dk, dv
            sums[0][:, keys].add_(dk)
            sums[1][:, keys].add_(dv)
        assert sums is not None
        return sums[0].to(k_bshd.dtype), sums[1].to(v_bshd.dtype)

    def of_queries(self) -> Tensor:
        """dq `B S h d`, when the keys of all ranks have been seen."""
        if not self._parts:
            return torch.zeros_like(self._q)
        found = [dq.to(self._q.dtype) for dq in self._dq if dq is not None]
        assert len(found) == len(self._parts), "every token attends to itself"
        return pad_tokens(join(found, 1), self._q.shape[1])


def join(parts: list[Tensor], dim: int) -> Tensor:
    """One after the other; a lone one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def zeros_of(pair: Pair, dtype: torch.dtype) -> Pair:
    """Zeros of the shapes of both, to sum in."""
    return torch.zeros_like(pair[0], dtype=dtype), torch.zeros_like(pair[1], dtype=dtype)


def pad_tokens(x_bshd: Tensor, num_tokens: int) -> Tensor:
    """Zeros at the tail, up to `num_tokens` tokens."""
    missing = num_tokens - x_bshd.shape[1]
    return F.pad(x_bshd, (0, 0, 0, 0, 0, missing)) if missing else x_bshd


def padded(pair: Pair, num_tokens: int) -> Pair:
    """Both of a pair."""
    return pad_tokens(pair[0], num_tokens), pad_tokens(pair[1], num_tokens)


def add_share(travelling_2bshd: Tensor, share: Pair) -> Tensor:
    """Add a rank's gradients of k and v, of the leading tokens, to those that came here; in place."""
    for whole_bshd, part_bshd in zip(travelling_2bshd.unbind(0), share, strict=True):
        whole_bshd[:, : part_bshd.shape[1]].add_(part_bshd)
    return travelling_2bshd


def send_onward(held: Tensor | None, group: Group, *, last: bool) -> Callable[[], Tensor] | None:
    """Start to pass on the keys and values held here, unless they have been everywhere."""
    return None if last or held is None else ring_exchange(held, group, "ring")


def merge(a: Pair, b: Pair, dtype: torch.dtype) -> Pair:
    """Output and log-sum-exp over both key blocks; a's output is written over where it has the dtype."""
    lse_bhs = torch.logaddexp(a[1], b[1])
    weight_bsh1 = rearrange((b[1] - lse_bhs).exp(), "b h s -> b s h 1").to(dtype)
    return a[0].to(dtype).lerp_(b[0].to(dtype), weight_bsh1), lse_bhs
