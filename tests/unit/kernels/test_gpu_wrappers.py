"""The kernels of a GPU with stand-ins for what computes there (fake_kernels.py): shapes, layouts, lengths, blocks."""

from collections.abc import Callable

import pytest
import torch
from fake_kernels import install_flash, install_operators
from torch import Tensor

from framework.kernels import aten
from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel, attend
from framework.kernels.cudnn import CudnnAttention
from framework.kernels.flash import FlashAttention, TorchFlash
from framework.kernels.flash_calls import FlashAttn2, FlashAttn3, FlashAttn4
from framework.kernels.lengths import padding_apart
from framework.kernels.reference import ReferenceAttention

LENGTHS = torch.tensor([3, 0, 5])
NAMES = ["flash 2", "flash 3", "flash 4", "aten half", "aten float32", "cudnn 3", "cudnn 4"]
Build = Callable[[str], AttentionKernel]


class Efficient:
    """aten's float32 pair on a GPU, as a kernel."""

    forward = staticmethod(aten.efficient_forward)
    backward = staticmethod(aten.efficient_backward)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    def build_one(name: str, deterministic: bool = False) -> AttentionKernel:
        kind, _, number = name.partition(" ")
        if kind == "flash":
            install_flash(monkeypatch, int(number), deterministic=deterministic)
            calls = {"2": FlashAttn2, "3": FlashAttn3, "4": FlashAttn4}[number]
            return FlashAttention(calls(deterministic=deterministic))
        install_operators(monkeypatch, stats_dim=int(number) if kind == "cudnn" else 3)
        if kind == "cudnn":
            return CudnnAttention()
        return FlashAttention(TorchFlash()) if number == "half" else Efficient()

    return build_one


def draw(queries: int, keys: int) -> list[Tensor]:
    """q and dout `3 S 2 8`, k and v `3 L 2 8`, float64, with gaps in memory as slices have."""
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys, queries)
    return [torch.randn(3, n + 2, 2, 8, dtype=torch.float64, generator=generator)[:, :n] for n in sizes]


@pytest.mark.parametrize("lengths", [None, LENGTHS, LENGTHS * 0], ids=["all", "lengths", "none"])
@pytest.mark.parametrize("sizes", [(4, 5), (1, 7), (37, 5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_the_reference(build: Build, name: str, sizes: tuple[int, int], lengths: Tensor | None) -> None:
    kernel, (q, k, v, dout) = build(name), draw(*sizes)
    out, lse = kernel.forward(q, k, v, lengths)
    found = [out, lse, *kernel.backward(dout, Attended(q, k, v, out, lse), lengths)]
    reference = ReferenceAttention()
    out, lse = reference.forward(q, k, v, lengths)
    wanted = [out, lse, *reference.backward(dout, Attended(q, k, v, out, lse), lengths)]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_of_keys_has_its_share_of_the_whole_gradient(build: Build, name: str) -> None:
    """As the ring calls it, down to a single key."""
    kernel, (q, k, v, dout) = build(name), draw(4, 5)
    out, lse = ReferenceAttention().forward(q, k, v, None)
    whole = ReferenceAttention().backward(dout, Attended(q, k, v, out, lse), None)
    parts = []
    for s in (slice(0, 1), slice(1, 5)):
        kernel.forward(q, k[:, s], v[:, s], None)
        parts.append(kernel.backward(dout, Attended(q, k[:, s], v[:, s], out, lse), None))
    dq, dk, dv = zip(*parts, strict=True)
    for got, want in zip((sum(dq), torch.cat(dk, 1), torch.cat(dv, 1)), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_attend_is_differentiable(build: Build, name: str) -> None:
    kernel = build(name)
    q, k, v, _ = (x.requires_grad_() for x in draw(2, 5))
    assert torch.autograd.gradcheck(lambda *x: attend(kernel, *x, LENGTHS), (q, k, v))


@pytest.mark.parametrize("generation", [2, 3, 4])
def test_flash_is_told_to_be_deterministic(build: Build, generation: int) -> None:
    """The stand-in compares the argument with what it was installed with."""
    kernel, (q, k, v, dout) = build(f"flash {generation}", deterministic=True), draw(4, 5)  # type: ignore[call-arg]
    out, lse = kernel.forward(q, k, v, None)
    for lengths in (None, LENGTHS):
        kernel.backward(dout, Attended(q, k, v, out, lse), lengths)


@pytest.mark.parametrize("name", ["flash 2", "flash 4", "cudnn 3"])
def test_attend_in_a_compiled_block(build: Build, name: str) -> None:
    """As cross-attention stands in a block that torch.compile has seen."""
    kernel, (q, k, v, dout) = build(name), draw(4, 5)
    leaves = [x.contiguous().requires_grad_() for x in (q, k, v)]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * attend(kernel, q * 1.0, k, v, LENGTHS)

    results = [
        torch.autograd.grad(run(*leaves), leaves, dout) for run in (block, torch.compile(block, backend="eager"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_segments_by_hand() -> None:
    segments = padding_apart(torch.tensor([3, 0, 5]), 4, 5)
    assert segments.queries.tolist() == [0, 4, 4, 8, 8, 12, 12]
    assert segments.keys.tolist() == [0, 3, 5, 5, 10, 15, 15]
    assert segments.queries.dtype == segments.keys.dtype == torch.int32


def test_the_operators_take_what_they_are_given() -> None:
    """Torch's own shape functions: the schemas of the installed release, no numbers."""
    q, k, v = (torch.empty(3, n, 2, 8, dtype=torch.bfloat16, device="meta") for n in (4, 5, 5))
    for kernel in (FlashAttention(TorchFlash()), CudnnAttention(), Efficient()):
        for lengths in (None, LENGTHS.to("meta")):
            out, lse = kernel.forward(q, k, v, lengths)
            assert (out.shape, out.dtype) == (q.shape, q.dtype), kernel
            assert (lse.shape, lse.dtype) == ((3, 2, 4), torch.float32), kernel
            gradients = kernel.backward(out, Attended(q, k, v, out, lse), lengths)
            assert [g.shape for g in gradients] == [x.shape for x in (q, k, v)], kernel
