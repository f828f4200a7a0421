"""Attention over tokens that lie on several ranks, as others do it: for context_parallel.py.

    torch_allgather   torch's context parallel, `_templated_ring_attention`, keys and values by one all-gather
    torch_alltoall    the same, keys and values passed on by permutations
    torch_public      torch's context parallel as its users call it: `context_parallel` around `F.sdpa`
    deepspeed         DeepSpeed-Ulysses, `deepspeed.sequence.layer.DistributedAttention`
    all_gather        a plain one: gather keys and values, attend, reduce-scatter their gradients

All take and give this rank's equal part of the tokens, in rank order, over one process group. Attention is
bidirectional: torch's load balancing, which is for causal masks, is off.

Shapes: `B` samples, `s` tokens of a rank, `S` of all, `H` heads, `d` channels of a head.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.sequence.layer import DistributedAttention
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_cp

from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel, attend
from framework.parallel.mesh import Group

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v `B s H d` -> out `B s H d`


class TorchRing(torch.autograd.Function):
    """torch's own ring, forward and backward, on the CPU's flash operator, which its dispatcher doesn't know."""

    @staticmethod
    def forward(
        ctx: Any, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, group: dist.ProcessGroup, method: str
    ) -> Tensor:
        set_rotate_method(method)
        q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = torch_cp._templated_ring_attention(group, 2, operator, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.method = group, method
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        set_rotate_method(ctx.method)
        gradients = torch_cp._templated_ring_attention_backward(
            ctx.group,
            2,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
            grads[0].transpose(1, 2),
            "grad_out",
            *ctx.saved_tensors,
            False,
            dropout_p=0.0,
        )
        return (*(x.transpose(1, 2) for x in gradients), None, None)


def torch_ring(group: dist.ProcessGroup, method: str) -> Attention:
    """method: allgather or alltoall."""

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        out: Tensor = TorchRing.apply(q_bshd, k_bshd, v_bshd, group, method)
        return out

    return attention


def torch_public(mesh: DeviceMesh, num_tokens: int, method: str, stack: ExitStack) -> Attention:
    """`F.scaled_dot_product_attention` inside torch's context manager, which `stack` leaves. It replaces the function
    for the whole process.
    """
    set_rotate_method(method)
    buffer = torch.zeros(num_tokens, 1, device=mesh.device_type)
    stack.enter_context(context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]))

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        set_rotate_method(method)
        q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attention


class LocalModule(nn.Module):
    """The kernel as the module that DeepSpeed asks for."""

    def __init__(self, kernel: AttentionKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        return attend(self.kernel, q_bshd, k_bshd, v_bshd, None)


def deepspeed_ulysses(group: dist.ProcessGroup, kernel: AttentionKernel) -> Attention:
    """Tokens are gathered along dim 1 while heads are scattered along dim 2."""
    deepspeed.init_distributed(dist_backend=dist.get_backend(group), auto_mpi_discovery=False, verbose=False)
    module = DistributedAttention(LocalModule(kernel), group, scatter_idx=2, gather_idx=1)

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        out: Tensor = module(q_bshd, k_bshd, v_bshd, 0)
        return out

    return attention


class AllGathered(torch.autograd.Function):
    """Keys and values of all ranks in one all-gather, kept for the backward; their gradients in one reduce-scatter."""

    @staticmethod
    def forward(
        ctx: Any, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, group: Group, kernel: AttentionKernel
    ) -> Tensor:
        held_2bshd = torch.stack([k_bshd, v_bshd])
        parts = held_2bshd.new_empty((group.size * 2, *k_bshd.shape))
        dist.all_gather_into_tensor(parts, held_2bshd, group=group.process_group)
        k, v = rearrange(parts, "(n two) b s h d -> two b (n s) h d", two=2).unbind(0)
        out_bshd, lse_bhs = kernel.forward(q_bshd, k, v, None)
        ctx.save_for_backward(q_bshd, k, v, out_bshd, lse_bhs)
        ctx.group, ctx.kernel = group, kernel
        return out_bshd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group = ctx.group
        dq, dk, dv = ctx.kernel.backward(grads[0], Attended(*ctx.saved_tensors), None)
        parts = rearrange(torch.stack([dk, dv]), "two b (n s) h d -> n two b s h d", n=group.size).contiguous()
        own_2bshd = parts.new_empty(parts.shape[1:])
        dist.reduce_scatter_tensor(own_2bshd, parts.flatten(0, 1), group=group.process_group)
        return (dq, *own_2bshd.unbind(0), None, None)


def all_gather(group: Group, kernel: AttentionKernel) -> Attention:
    """The plain one."""

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        out: Tensor = AllGathered.apply(q_bshd, k_bshd, v_bshd, group, kernel)
        return out

    return attention


def build_peers(
    group: Group, kernel: AttentionKernel, *, num_tokens: int, num_heads: int, stack: ExitStack
) -> tuple[dict[str, Attention], list[str]]:
    """The peers that run here, and why others don't. stack: frees what they hold."""
    assert group.process_group is not None
    _cp_options.enable_load_balance = False
    peers: dict[str, Attention] = {}
    left_out = []
    if torch.cuda.is_available():
        mesh = DeviceMesh.from_group(group.process_group, "cuda")
        for method in ("allgather", "alltoall"):
            peers[f"torch_{method}"] = torch_public(mesh, num_tokens, method, stack)
    else:
        for method in ("allgather", "alltoall"):
            peers[f"torch_{method}"] = torch_ring(group.process_group, method)
        why = try_torch_public(DeviceMesh.from_group(group.process_group, "cpu"), num_heads)
        if why:
            left_out.append(f"torch_public can't run here: {why}")
    if num_heads % group.size:
        left_out.append(f"deepspeed can't run here: {num_heads} heads on {group.size} ranks")
    else:
        peers["deepspeed"] = deepspeed_ulysses(group.process_group, kernel)
    peers["all_gather"] = all_gather(group, kernel)
    return peers, left_out


def try_torch_public(mesh: DeviceMesh, num_heads: int) -> str:
    """Why the public interface can't do a forward and backward on this device, or nothing."""
    with ExitStack() as stack:
        attention = torch_public(mesh, 8 * mesh.size(), "allgather", stack)
        q, k, v = (torch.randn(1, 8, num_heads, 16, device=mesh.device_type, requires_grad=True) for _ in range(3))
        stage = "forward"
        try:
            out = attention(q, k, v)
            stage = "backward"
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        except NotImplementedError as error:
            return f"its {stage} raises {type(error).__name__}: {error}"
    return ""
