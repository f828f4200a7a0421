"""Stand-ins for what computes attention on a GPU: flash-attn 2, 3 and 4, and torch's CUDA operators.

Signatures are those of the real ones (flash-attn 2.8.3, its repository of August 2026 for 3, 4.0.0b36; torch's
schemas): what has no default there has none here. Each checks shapes, strides and dtypes as the real one does, and
computes by the plain reference, in any dtype. Where there is nothing to attend to they leave what the real ones may:
infinities and garbage.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.reference import ReferenceAttention

REFERENCE = ReferenceAttention()
GARBAGE = 7e3


def checked(*tensors: Tensor, whole: bool = False) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        assert not whole or x.is_contiguous()
        assert not x.requires_grad or not torch.is_grad_enabled()


def spans(offsets: Tensor, total: int) -> list[slice]:
    """The segments of packed rows."""
    assert offsets.dtype == torch.int32 and offsets.is_contiguous()
    ends = offsets.tolist()
    assert ends[0] == 0 and ends[-1] == total and ends == sorted(ends)
    return [slice(a, b) for a, b in pairwise(ends)]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, most: Any) -> Any:
    """Dense or packed; lse `B H S` or `H T`."""
    checked(q, k, v)
    if cu_q is None:
        assert q.dim() == 4
        return REFERENCE.forward(q, k, v, None)
    assert cu_k is not None
    pairs = list(zip(spans(cu_q, q.shape[0]), spans(cu_k, k.shape[0]), strict=True))
    check_longest(pairs, most)
    out = torch.full_like(q, GARBAGE)
    lse = q.new_full((q.shape[1], q.shape[0]), torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for here, there in pairs:
        if q[here].numel() and k[there].numel():
            part, its_lse = REFERENCE.forward(q[here][None], k[there][None], v[there][None], None)
            out[here], lse[:, here] = part[0], its_lse[0]
    return out, lse


def flash_backward(
    dout: Tensor, attended: Attended, cu_q: Tensor | None, cu_k: Tensor | None, most: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = attended
    checked(dout, q, out, whole=True)
    checked(k, v)
    assert lse.is_contiguous()
    if cu_q is None:
        return REFERENCE.backward(dout, attended, None)
    assert cu_k is not None
    pairs = list(zip(spans(cu_q, q.shape[0]), spans(cu_k, k.shape[0]), strict=True))
    check_longest(pairs, most)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for here, there in pairs:
        if q[here].numel() and k[there].numel():
            block = Attended(q[here][None], k[there][None], v[there][None], out[here][None], lse[None, :, here])
            grads = REFERENCE.backward(dout[here][None], block, None)
            dq[here], dk[there], dv[there] = (x[0] for x in grads)
    return dq, dk, dv


def check_longest(pairs: list[tuple[slice, slice]], most: Any) -> None:
    longest = [max(s.stop - s.start for s in side) for side in zip(*pairs, strict=True)]
    assert all(isinstance(n, int) for n in most) and longest[0] <= most[0] and longest[1] <= most[1]


def write(into: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    for a, b in zip(into, gradients, strict=True):
        a.copy_(b)


def fake_flash_attn_2(deterministic: bool) -> ModuleType:
    """`flash_attn.flash_attn_interface` of 2.8.3."""

    def off(dropout_p: Any, scale: Any, causal: Any, left: Any, right: Any, softcap: Any, alibi: Any, d: int) -> None:
        assert (dropout_p, causal, left, right, softcap, alibi) == (0.0, False, -1, -1, 0.0, None)
        assert scale == d**-0.5

    def forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        off(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, q.shape[-1])
        assert not return_softmax
        return (*flash_forward(q, k, v, None, None, None), None, None)

    def varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        off(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, q.shape[-1])
        return (*flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)), None, None)

    asked = deterministic

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        off(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, q.shape[-1])
        assert deterministic == asked
        write((dq, dk, dv), flash_backward(dout, Attended(q, k, v, out, softmax_lse), None, None, None))

    def varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        off(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, q.shape[-1])
        assert deterministic == asked
        most = (max_seqlen_q, max_seqlen_k)
        attended = Attended(q, k, v, out, softmax_lse)
        write((dq, dk, dv), flash_backward(dout, attended, cu_seqlens_q, cu_seqlens_k, most))

    return module(
        _flash_attn_forward=forward,
        _flash_attn_varlen_forward=varlen_forward,
        _flash_attn_backward=backward,
        _flash_attn_varlen_backward=varlen_backward,
    )


def fake_flash_attn_3(deterministic: bool) -> ModuleType:
    """`flash_attn_interface` of 3."""

    def forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1,
        pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert softmax_scale == q.shape[-1] ** -0.5 and not causal
        out, lse = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        return out, lse, torch.tensor([]), torch.tensor([])

    asked = deterministic

    def backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert deterministic == asked and softmax_scale == q.shape[-1] ** -0.5 and not is_causal
        most = (max_seqlen_q, max_seqlen_k)
        attended = Attended(q, k, v, out, softmax_lse)
        write((dq, dk, dv), flash_backward(dout, attended, cu_seqlens_q, cu_seqlens_k, most))

    return module(_flash_attn_forward=forward, _flash_attn_backward=backward)


def fake_flash_attn_4(deterministic: bool) -> ModuleType:
    """`flash_attn.cute.interface` of 4.0.0b36; of its many keywords those that matter."""

    def forward(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert return_lse and softmax_scale == q.shape[-1] ** -0.5 and not torch.compiler.is_compiling()
        most = (max_seqlen_q, max_seqlen_k)
        return (*flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, most), None, None, None)

    asked = deterministic

    def backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert deterministic == asked and softmax_scale == q.shape[-1] ** -0.5
        attended = Attended(q, k, v, out, lse)
        return flash_backward(dout, attended, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))

    return module(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


def module(**names: Callable[..., Any]) -> ModuleType:
    made = ModuleType("fake")
    made.__dict__.update(names)
    return made


def install_flash(monkeypatch: pytest.MonkeyPatch, generation: int, *, deterministic: bool = False) -> None:
    """Put a stand-in where `flash_calls` imports the real one from."""
    if generation == 3:
        monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_flash_attn_3(deterministic))
        return
    package = ModuleType("flash_attn")
    package.__path__ = []  # a package
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    if generation == 2:
        inner = fake_flash_attn_2(deterministic)
        package.flash_attn_interface = inner  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", inner)
        return
    cute = ModuleType("flash_attn.cute")
    cute.interface = fake_flash_attn_4(deterministic)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", cute.interface)


def install_operators(monkeypatch: pytest.MonkeyPatch, *, stats_dim: int = 3) -> None:
    """Put stand-ins in the place of torch's CUDA operators. stats_dim: of cuDNN's statistics."""

    def torch_flash(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask):
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
        return (*flash_forward(q, k, v, cum_seq_q, cum_seq_k, (max_q, max_k)), None, None, None)

    def torch_flash_backward(
        grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused
    ):
        assert (rng_state.dtype, rng_state.shape, unused.shape) == (torch.uint64, (2,), ())
        attended = Attended(q, k, v, out, logsumexp)
        return flash_backward(grad_out, attended, cum_seq_q, cum_seq_k, (max_q, max_k))

    def efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False):
        assert compute_log_sumexp
        out, lse = biased_forward(q, k, v, attn_bias)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), None, None

    def efficient_backward(
        grad_out, q, k, v, attn_bias, out, logsumexp, seed, offset, dropout_p, grad_input_mask, is_causal=False
    ):
        assert logsumexp.shape[-1] % 32 == 0 and logsumexp.is_contiguous() and grad_input_mask == [True] * 3 + [False]
        lse = logsumexp[..., : q.shape[2]]
        return (*biased_backward(grad_out, Attended(q, k, v, out, lse), attn_bias), None)

    def cudnn(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False):
        assert compute_log_sumexp and k.shape[2] >= 2
        out, lse = biased_forward(q, k, v, spread(attn_bias, q, k))
        return out, lse if stats_dim == 3 else lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None

    def cudnn_backward(
        grad_out, q, k, v, out, logsumexp, seed, offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
        is_causal,
    ):  # fmt: skip
        assert (max_q, max_k, dropout_p, is_causal) == (q.shape[2], k.shape[2], 0.0, False)
        assert logsumexp.dim() == stats_dim and steps(grad_out) == steps(out)
        attended = Attended(q, k, v, out, logsumexp.reshape(q.shape[:3]))
        return biased_backward(grad_out, attended, spread(attn_bias, q, k))

    names = {
        "_flash_attention_forward": torch_flash,
        "_flash_attention_backward": torch_flash_backward,
        "_scaled_dot_product_efficient_attention": efficient,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
        "_scaled_dot_product_cudnn_attention": cudnn,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    }
    for name, stand_in in names.items():
        monkeypatch.setattr(torch.ops.aten, name, stand_in)


def spread(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """As cuDNN's operators do."""
    if bias is None:
        return None
    assert bias.shape == (q.shape[0], 1, 1, k.shape[2]) and bias.dtype == q.dtype
    return torch.nn.functional.pad(bias, (0, -k.shape[2] % 16))[..., : k.shape[2]].expand(*q.shape[:3], -1)


def steps(x: Tensor) -> list[int]:
    """The strides that matter."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check_bias(bias: Tensor, q: Tensor, k: Tensor) -> None:
    assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
    assert bias.stride(-1) == 1 and all(step % 16 == 0 for step in steps(bias)[:-1])


def biased_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`B H S d` operators with an additive mask."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        check_bias(bias, q, k)
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse.unsqueeze(-1)) @ v).to(q.dtype), lse


def biased_backward(dout: Tensor, attended: Attended, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = attended
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        check_bias(bias, q, k)
        scores = scores + bias
    p = torch.exp(scores - lse.unsqueeze(-1))
    ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout
