"""Ring attention: keys and values go round, queries stay (Ring Attention, arXiv 2310.01889).

Attention over a union of key blocks follows from each block's output and log-sum-exp (FlashAttention-2, arXiv
2307.08691, section 3.1), in at least float32:

    lse = log(exp(lse_a) + exp(lse_b))          out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

and a block's share of the gradients from the output and log-sum-exp of the whole. Attention is bidirectional, so every
rank has the same work and no reordering of tokens is needed.

While a kernel runs, the next keys and values are on their way, k and v in one message, r - 1 of them. In the backward
k and v go round again; the gradient of a block starts at the rank after its owner, is added to at every rank, and comes
home with the last of r - 1 messages: what the owner itself contributes never travels. It travels in k's dtype.

Padding at a rank's tail isn't computed: a rank may hold padding only, and its queries give zero.

Shapes: `B` samples, `S` tokens of a rank, `h` heads, `d` channels of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel
from framework.parallel.collectives import ring_exchange
from framework.parallel.mesh import Group

Pair = tuple[Tensor, Tensor]


def ring_forward(
    kernel: AttentionKernel, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, valid: tuple[int, ...], group: Group
) -> Pair:
    """Attention of this rank's queries over the valid tokens of all ranks: out `B S h d`, lse `B h S`.

    valid: real tokens of every rank.
    """
    here = valid[group.index]
    precise = torch.promote_types(q_bshd.dtype, torch.float32)
    q = q_bshd[:, :here]
    merged: Pair | None = None
    held = torch.stack([k_bshd, v_bshd]) if group.size > 1 else None
    k, v = k_bshd, v_bshd
    for step in range(group.size):
        receive = send_onward(held, group, last=step + 1 == group.size)
        there = valid[(group.index - step) % group.size]
        if here and there:
            block = kernel.forward(q, k[:, :there], v[:, :there], None)
            merged = merge(merged, block) if merged is not None else start(block, group, precise)
        if receive is not None:
            held = receive()
            k, v = held.unbind(0)
    if merged is None:
        batch, tokens, heads, _ = q_bshd.shape
        return torch.zeros_like(q_bshd), q_bshd.new_full((batch, heads, tokens), -torch.inf, dtype=precise)
    out_bshd, lse_bhs = merged
    missing = q_bshd.shape[1] - here
    lse_bhs = F.pad(lse_bhs, (0, missing), value=-torch.inf) if missing else lse_bhs
    return pad_tokens(out_bshd.to(q_bshd.dtype), q_bshd.shape[1]), lse_bhs


def ring_backward(
    kernel: AttentionKernel,
    dout_bshd: Tensor,
    attended: Attended,
    valid: tuple[int, ...],
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's tokens. attended: what `ring_forward` took and gave."""
    q_bshd, k_bshd, v_bshd, out_bshd, lse_bhs = attended
    here = valid[group.index]
    q, out, dout = q_bshd[:, :here], out_bshd[:, :here], dout_bshd[:, :here].contiguous()
    lse = lse_bhs[..., :here].contiguous()
    dq_bshd: Tensor | None = None
    own: Pair | None = None
    held = torch.stack([k_bshd, v_bshd]) if group.size > 1 else None
    k, v = k_bshd, v_bshd
    coming: Callable[[], Tensor] | None = None
    for step in range(group.size):
        receive = send_onward(held, group, last=step + 1 == group.size)
        there = valid[(group.index - step) % group.size]
        if here and there:
            dq, dk, dv = kernel.backward(dout, Attended(q, k[:, :there], v[:, :there], out, lse), None)
            dq_bshd = add_query_gradient(dq_bshd, dq, group, lse.dtype)
        else:
            dk, dv = k_bshd[:, :0], v_bshd[:, :0]
        if step == 0:
            own = pad_tokens(dk, k.shape[1]), pad_tokens(dv, v.shape[1])
        elif coming is None:
            coming = ring_exchange(
                torch.stack([pad_tokens(dk, k.shape[1]), pad_tokens(dv, v.shape[1])]), group, "ring_gradients"
            )
        else:
            travelling = coming()
            for sum_bshd, share in zip(travelling, (dk, dv), strict=True):
                sum_bshd[:, : share.shape[1]] += share
            coming = ring_exchange(travelling, group, "ring_gradients")
        if receive is not None:
            held = receive()
            k, v = held.unbind(0)
    assert own is not None
    if coming is not None:
        dk, dv = coming().unbind(0)
        own = own[0] + dk, own[1] + dv
    grad_q = torch.zeros_like(q_bshd) if dq_bshd is None else pad_tokens(dq_bshd.to(q_bshd.dtype), q_bshd.shape[1])
    return grad_q, *own


def pad_tokens(x_bshd: Tensor, num_tokens: int) -> Tensor:
    """Zeros at the tail, up to `num_tokens` tokens."""
    missing = num_tokens - x_bshd.shape[1]
    return F.pad(x_bshd, (0, 0, 0, 0, 0, missing)) if missing else x_bshd


def send_onward(held: Tensor | None, group: Group, *, last: bool) -> Callable[[], Tensor] | None:
    """Start to pass on the keys and values held here, unless they have been everywhere."""
    return None if last or held is None else ring_exchange(held, group, "ring")


def start(block: Pair, group: Group, dtype: torch.dtype) -> Pair:
    """The first block, in the dtype that others are merged in where there are any."""
    out_bshd, lse_bhs = block
    return (out_bshd.to(dtype) if group.size > 1 else out_bshd), lse_bhs


def merge(merged: Pair, block: Pair) -> Pair:
    """Output and log-sum-exp over both key blocks, `merged`'s output being written over.

    Two passes over the output, and the block's is read in its own dtype: of a memory-bound step, passes are the price.
    """
    lse_bhs = torch.logaddexp(merged[1], block[1])
    kept, added = (rearrange((lse - lse_bhs).exp(), "b h s -> b s h 1") for lse in (merged[1], block[1]))
    return merged[0].mul_(kept).addcmul_(block[0], added), lse_bhs


def add_query_gradient(sum_bshd: Tensor | None, dq_bshd: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The sum over the blocks so far, in `dtype` where there are several."""
    if sum_bshd is None:
        return dq_bshd.to(dtype) if group.size > 1 else dq_bshd
    sum_bshd += dq_bshd
    return sum_bshd
