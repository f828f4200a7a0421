"""Kernels against each other, against loops, and where there is nothing to attend to."""

import math

import pytest
import torch
from torch import Tensor

from framework.kernels.aten import aten_attention
from framework.kernels.attention import AttentionKernel, build_attention
from framework.kernels.config import AttentionConfig, resolve_attention
from framework.kernels.reference import reference_attention

KERNELS = [aten_attention, reference_attention]
MASK = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])


def draw(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q `3 4 2 6`, k and v `3 5 2 6`."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, length, 2, 6, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for length in (4, 5, 5)
    ]


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.zeros(3, 4, 2, 6, dtype=torch.float64)
    for b in range(3):
        keys = [j for j in range(5) if mask is None or mask[b, j]]
        for s in range(4):
            for h in range(2):
                weights = [math.exp((q[b, s, h] @ k[b, j, h]).item() / math.sqrt(6)) for j in keys]
                for weight, j in zip(weights, keys, strict=True):
                    out[b, s, h] += weight / sum(weights) * v[b, j, h].detach()
    return out


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_softmax_of_the_definition(kernel: AttentionKernel, mask: Tensor | None) -> None:
    q, k, v = draw()
    out = kernel(q, k, v, mask)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.detach(), by_loops(q, k, v, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
def test_gradients_agree(mask: Tensor | None) -> None:
    gradients = []
    for kernel in KERNELS:
        inputs = draw()
        (kernel(*inputs, mask) * torch.arange(288.0, dtype=torch.float64).view(3, 4, 2, 12)[..., :6]).sum().backward()
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_without_keys_gives_zeros_and_no_gradient(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    inputs = draw(dtype)
    out = kernel(*inputs, MASK)
    out.sum().backward()
    assert (out[1] == 0).all() and out.isfinite().all()
    assert all((x.grad[1] == 0).all() and x.grad.isfinite().all() for x in inputs)
    assert (inputs[2].grad[0, [1, 4]] == 0).all() and (inputs[2].grad[0, [0, 2, 3]] != 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_comes_back_as_bf16_near_the_exact_result(kernel: AttentionKernel) -> None:
    rounded = draw(torch.bfloat16)
    out = kernel(*rounded, MASK)
    assert out.dtype == torch.bfloat16
    exact = reference_attention(*(x.double() for x in rounded), MASK)
    assert (out - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_the_reference_scores_in_float32() -> None:
    """Two keys whose scores differ by less than bf16 can hold."""
    q = torch.tensor([8.0, 1.0], dtype=torch.bfloat16).view(1, 1, 1, 2)
    k = torch.tensor([[32.0, 0.0], [32.0, 0.5]], dtype=torch.bfloat16).view(1, 2, 1, 2)
    v = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16).view(1, 2, 1, 2)
    expected = 1 / (1 + math.exp(-0.5 / math.sqrt(2)))
    assert abs(reference_attention(q, k, v, None)[0, 0, 0, 0].item() - expected) < 2**-8


def test_auto_is_resolved_to_a_name_that_can_be_built() -> None:
    assert resolve_attention(AttentionConfig()) == AttentionConfig("aten")
    assert build_attention(AttentionConfig()) is aten_attention
    assert build_attention(AttentionConfig("reference")) is reference_attention
    with pytest.raises(ValueError, match="flashy"):
        AttentionConfig("flashy")  # type: ignore[arg-type]
