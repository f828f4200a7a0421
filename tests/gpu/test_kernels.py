"""Every attention kernel that this GPU has against the float64 reference: out, lse and gradients; lengths; long clips.

A kernel that isn't installed is skipped with the reason that a user would be told.
"""

import pytest
import torch
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.attention import AttentionKernel, attend, build_attention
from framework.kernels.config import AttentionConfig, AttentionNeeds, KernelName, check_attention, installed_flash
from framework.kernels.reference import ReferenceAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KERNELS: list[KernelName] = ["flash", "cudnn", "aten"]
# bfloat16 keeps 8 bits: half an ulp of each input and of the result is 2^-9 relative, sums of many average it out.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
LSE_TOLERANCE = {torch.bfloat16: 2e-3, torch.float32: 1e-4}
Shape = tuple[int, int, int, int, int]  # B S L H d


def kernel_or_skip(
    name: KernelName, dtype: torch.dtype, head_dim: int, *, deterministic: bool = False
) -> AttentionKernel:
    needs = AttentionNeeds(str(dtype).removeprefix("torch."), head_dim, deterministic, has_gpu=True)
    try:
        check_attention(AttentionConfig(name), needs, installed_flash())
        return build_attention(AttentionConfig(name), deterministic=deterministic)
    except ValueError as error:
        pytest.skip(str(error))


def draw(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and dout."""
    batch, queries, keys, heads, head_dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = (queries, keys, keys, queries)
    return [torch.randn(batch, n, heads, head_dim, device="cuda", dtype=dtype, generator=generator) for n in lengths]


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the difference against the norm, where the expected is finite; infinities must match."""
    assert got.shape == want.shape and not got.isnan().any()
    finite = want.isfinite()
    assert torch.equal(got.isneginf(), ~finite)
    got, want = got.double()[finite], want.double()[finite]
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def compare(kernel: AttentionKernel, shape: Shape, dtype: torch.dtype, lengths: Tensor | None) -> None:
    q, k, v, dout = draw(shape, dtype)
    out, lse = kernel.forward(q, k, v, lengths)
    assert out.dtype == dtype and lse.dtype == torch.float32
    found = [out, lse, *kernel.backward(dout, Attended(q, k, v, out, lse), lengths)]
    reference = ReferenceAttention()
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    out, lse = reference.forward(q, k, v, lengths)
    wanted = [out, lse, *reference.backward(dout, Attended(q, k, v, out, lse), lengths)]
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        limit = LSE_TOLERANCE[dtype] if name == "lse" else TOLERANCE[dtype]
        if shape[2] == 1 and name in ("dq", "dk"):  # the weight of a single key is 1, whatever q and k are
            assert got.double().norm() <= limit * dout.norm(), name
        else:
            assert (error := relative(got, want)) <= limit, (name, error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [None, (5, 0, 129)], ids=["all", "lengths"])
@pytest.mark.parametrize(
    "shape", [(3, 64, 130, 4, 64), (3, 1, 129, 5, 128), (3, 997, 131, 5, 128), (3, 100, 300, 2, 32)], ids=str
)
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_reference(
    name: KernelName, shape: Shape, lengths: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    kernel = kernel_or_skip(name, dtype, shape[-1])
    compare(kernel, shape, dtype, None if lengths is None else torch.tensor(lengths, device="cuda"))


@pytest.mark.parametrize("name", KERNELS)
def test_a_single_key(name: KernelName) -> None:
    """A ring whose last rank holds one token."""
    compare(kernel_or_skip(name, torch.bfloat16, 128), (2, 65, 1, 3, 128), torch.bfloat16, None)


def some_rows(x: Tensor, dim: int, count: int = 64) -> Tensor:
    """A part of a long dimension, spread over it, the last included."""
    rows = torch.linspace(0, x.shape[dim] - 1, count, device=x.device).long()
    return x.index_select(dim, rows)


@pytest.mark.parametrize("tokens", [8_191, 32_760, 75_600])
@pytest.mark.parametrize("name", KERNELS)
def test_long_clips(name: KernelName, tokens: int) -> None:
    """Some queries and some keys of a clip that is too long for a float64 score matrix.

    The rows of out, lse and dq follow from some queries and all keys; those of dk and dv from some keys, all queries
    and the kernel's own lse, which is checked.
    """
    kernel = kernel_or_skip(name, torch.bfloat16, 128)
    q, k, v, dout = draw((1, tokens, tokens, 2, 128), torch.bfloat16)
    out, lse = kernel.forward(q, k, v, None)
    dq, dk, dv = kernel.backward(dout, Attended(q, k, v, out, lse), None)
    reference = ReferenceAttention()
    few_q, few_dout = (some_rows(x, 1).double() for x in (q, dout))
    want_out, want_lse = reference.forward(few_q, k.double(), v.double(), None)
    want_dq, *_ = reference.backward(few_dout, Attended(few_q, k.double(), v.double(), want_out, want_lse), None)
    few_k, few_v = (some_rows(x, 1).double() for x in (k, v))
    whole = Attended(q.double(), few_k, few_v, out.double(), lse.double())
    _, want_dk, want_dv = reference.backward(dout.double(), whole, None)
    for got, want, dim, limit in (
        (out, want_out, 1, 2e-2),
        (lse, want_lse, 2, 1e-3),
        (dq, want_dq, 1, 2e-2),
        (dk, want_dk, 1, 2e-2),
        (dv, want_dv, 1, 2e-2),
    ):
        assert (error := relative(some_rows(got, dim), want)) <= limit, error


@pytest.mark.parametrize("name", KERNELS)
def test_blocks_of_keys_add_up(name: KernelName) -> None:
    """A block's backward with the output and lse of the whole, as the ring calls it, on slices of a longer tensor."""
    kernel = kernel_or_skip(name, torch.bfloat16, 128)
    q, k, v, dout = draw((2, 256, 640, 3, 128), torch.bfloat16)
    out, lse = kernel.forward(q, k, v, None)
    whole = kernel.backward(dout, Attended(q, k, v, out, lse), None)
    cuts = (slice(0, 200), slice(200, 201), slice(201, 640))
    parts = []
    for cut in cuts:
        kernel.forward(q, k[:, cut], v[:, cut], None)
        parts.append(kernel.backward(dout, Attended(q, k[:, cut], v[:, cut], out, lse), None))
    dq, dk, dv = zip(*parts, strict=True)
    summed = (sum(x.float() for x in dq), torch.cat(dk, 1), torch.cat(dv, 1))
    for got, want in zip(summed, whole, strict=True):
        assert isinstance(got, Tensor) and relative(got, want) <= 1e-2


@pytest.mark.parametrize("name", KERNELS)
def test_the_deterministic_backward_repeats_itself(name: KernelName) -> None:
    kernel = kernel_or_skip(name, torch.bfloat16, 128, deterministic=True)
    q, k, v, dout = draw((2, 2048, 4096, 4, 128), torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = kernel.forward(q, k, v, None)
        first, *others = (kernel.backward(dout, Attended(q, k, v, out, lse), None) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_lengths_wait_for_nothing(name: KernelName) -> None:
    """Torch raises at a synchronisation of the host in this mode."""
    kernel = kernel_or_skip(name, torch.bfloat16, 128)
    q, k, v, dout = (x.requires_grad_() for x in draw((2, 128, 64, 2, 128), torch.bfloat16))
    lengths = torch.tensor([3, 0], device="cuda")
    attend(kernel, q, k, v, lengths).backward(dout.detach())  # builds what is built at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(kernel, q, k, v, lengths).backward(dout.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
