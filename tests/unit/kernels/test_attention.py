"""Kernels against an explicit softmax in float64, alone and as blocks of a ring, and where there is nothing to see."""

import math

import pytest
import torch
from torch import Tensor

from framework.kernels.aten import AtenAttention
from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel, attend, build_attention
from framework.kernels.config import AttentionConfig
from framework.kernels.reference import ReferenceAttention

KERNELS = [AtenAttention(), ReferenceAttention()]
LENGTHS = torch.tensor([3, 0, 5])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(queries: int = 4, keys: int = 5) -> list[Tensor]:
    """q and dout `3 S 2 6`, k and v `3 L 2 6`, float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys, queries)
    return [torch.randn(3, length, 2, 6, dtype=torch.float64, generator=generator) for length in sizes]


def by_loops(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Out and lse, key by key and query by query, differentiable."""
    out, lse = torch.zeros_like(q), torch.full((3, 2, q.shape[1]), -math.inf, dtype=torch.float64)
    rows: list[list[list[Tensor]]] = []
    for b in range(3):
        num_keys = k.shape[1] if lengths is None else int(lengths[b])
        rows.append([])
        for s in range(q.shape[1]):
            rows[b].append([])
            for h in range(2):
                scores = torch.stack([q[b, s, h] @ k[b, j, h] for j in range(num_keys)]) / 6**0.5 if num_keys else None
                if scores is None:
                    rows[b][s].append(torch.zeros(6, dtype=torch.float64) * q[b, s, h].sum())
                    continue
                lse[b, h, s] = scores.detach().exp().sum().log()
                rows[b][s].append((scores.exp() / scores.exp().sum()) @ v[b, :num_keys, h])
    out = torch.stack([torch.stack([torch.stack(heads) for heads in queries]) for queries in rows])
    return out, lse


def expected(lengths: Tensor | None, queries: int = 4, keys: int = 5) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = draw(queries, keys)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = by_loops(q, k, v, lengths)
    gradients = torch.autograd.grad(out, (q, k, v), dout, allow_unused=True)
    return [out.detach(), lse, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
@pytest.mark.parametrize("sizes", [(4, 5), (1, 5), (7, 5)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=["aten", "reference"])
def test_a_pair_is_the_softmax_and_its_gradient(
    kernel: AttentionKernel, sizes: tuple[int, int], lengths: Tensor | None, dtype: torch.dtype
) -> None:
    q, k, v, dout = (x.to(dtype) for x in draw(*sizes))
    out, lse = kernel.forward(q, k, v, lengths)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    found = [out, lse, *kernel.backward(dout, Attended(q, k, v, out, lse), lengths)]
    for got, want in zip(found, expected(lengths, *sizes), strict=True):
        assert got.shape == want.shape and not got.isnan().any()
        finite = want.isfinite()
        assert (got.isneginf() == ~finite).all()
        error = (got.double() - want)[finite].abs().max() / want[finite].abs().max()
        assert error <= TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("kernel", KERNELS, ids=["aten", "reference"])
def test_a_block_of_keys_has_its_share_of_the_whole_gradient(kernel: AttentionKernel) -> None:
    q, k, v, dout = draw()
    out, lse = kernel.forward(q, k, v, None)
    whole = kernel.backward(dout, Attended(q, k, v, out, lse), None)
    cut = [(slice(0, 2)), slice(2, 5)]
    dq, dk, dv = zip(*(kernel.backward(dout, Attended(q, k[:, s], v[:, s], out, lse), None) for s in cut), strict=True)
    parts = (sum(dq), torch.cat(dk, 1), torch.cat(dv, 1))
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS, ids=["aten", "reference"])
def test_attend_is_differentiable(kernel: AttentionKernel) -> None:
    q, k, v, _ = (x.requires_grad_() for x in draw())
    assert torch.autograd.gradcheck(lambda *x: attend(kernel, *x, LENGTHS), (q, k, v))


@pytest.mark.parametrize("kernel", KERNELS, ids=["aten", "reference"])
def test_what_lies_beyond_the_length_has_no_weight(kernel: AttentionKernel) -> None:
    q, k, v, dout = draw()
    hidden = torch.arange(5) >= LENGTHS[:, None]
    out, lse = kernel.forward(q, k, v, LENGTHS)
    far = [x.masked_fill(hidden[:, :, None, None], 1e6) for x in (k, v)]
    again, _ = kernel.forward(q, *far, LENGTHS)
    assert torch.equal(out, again)
    _, dk, dv = kernel.backward(dout, Attended(q, k, v, out, lse), LENGTHS)
    assert (dk[hidden] == 0).all() and (dv[hidden] == 0).all()


def test_a_kernel_is_built_by_its_name() -> None:
    assert isinstance(build_attention(AttentionConfig("aten")), AtenAttention)
    assert isinstance(build_attention(AttentionConfig("reference")), ReferenceAttention)
    with pytest.raises(AssertionError, match="auto is resolved where a run starts"):
        build_attention(AttentionConfig())
