"""Spans against a mask written token by token, and attention by them against a dense softmax, in float64."""

import itertools

import pytest
import torch
from masked import FULL, PATTERNS, CountingKernel, causal, mask_of, masked_attention, name_of, sees, window

from framework.batch import TokenLayout
from framework.kernels.attention import build_attention
from framework.kernels.config import AttentionConfig, BlockCausalConfig, KernelName, PatternConfig, WindowConfig
from framework.kernels.pattern import TokenPattern, attended_pairs, frame_keys, reaches
from framework.models.layers import LocalAttention
from framework.parallel.context_parallel.attention import ContextAttention
from framework.parallel.mesh import lone_mesh


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_spans_are_the_mask(pattern: PatternConfig) -> None:
    for frames in (1, 2, 3, 4, 7, 12):
        for frame in range(frames):
            spans = frame_keys(pattern, frame, frames)
            seen = [key for start, stop in spans for key in range(start, stop)]
            assert seen == [key for key in range(frames) if sees(pattern, frame, key)]
            assert all(a[1] < b[0] for a, b in itertools.pairwise(spans)), "spans that touch are one"


def test_spans_by_hand() -> None:
    assert frame_keys(causal(3), 4, 8) == ((0, 6),) and frame_keys(causal(3), 7, 8) == ((0, 8),)
    assert frame_keys(window(1, 2), 5, 8) == ((0, 2), (4, 7))
    assert frame_keys(window(1, 2), 3, 8) == ((0, 5),), "the window begins where the sinks end"
    assert frame_keys(window(1, 3), 0, 8) == ((0, 3),), "a sink sees the other sinks, and no more than its window"
    assert frame_keys(window(0, 0), 5, 8) == ((5, 6),)


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
@pytest.mark.parametrize("queries", [(0, 21), (0, 1), (4, 5), (2, 13), (20, 21), (7, 7)])
def test_any_tokens_of_a_clip(pattern: PatternConfig, queries: tuple[int, int]) -> None:
    """7 frames of 3 tokens; a span of queries begins and ends anywhere in a frame."""
    mask, seen = mask_of(pattern, 7, 3), torch.zeros(21, 21, dtype=torch.bool)
    tokens = TokenPattern(pattern, 3)
    found = reaches(tokens, 21, queries)
    for reach in found:
        for start, stop in reach.keys:
            assert not seen[slice(*reach.queries), start:stop].any()
            seen[slice(*reach.queries), start:stop] = True
    assert torch.equal(seen[slice(*queries)], mask[slice(*queries)]) and seen.sum() == mask[slice(*queries)].sum()
    assert all(a.keys != b.keys and a.queries[1] == b.queries[0] for a, b in itertools.pairwise(found))
    assert attended_pairs(tokens, 21, queries) == mask[slice(*queries)].sum()


def test_pairs_by_hand() -> None:
    """5 frames of 2 tokens, 4 pairs for two frames. Blocks of 2 see 2, 2, 4, 4, 5 frames; a window of 1 sees 2, 3, 3,
    3, 2, and with a sink of one frame 1 more from the third frame on.
    """
    assert attended_pairs(TokenPattern(FULL, 2), 10) == 100
    assert attended_pairs(TokenPattern(causal(2), 2), 10) == 4 * 17
    assert attended_pairs(TokenPattern(window(1, 0), 2), 10) == 4 * 13
    assert attended_pairs(TokenPattern(window(1, 1), 2), 10) == 4 * 16
    assert attended_pairs(TokenPattern(window(4, 0), 2), 10) == 100


@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_one_device_computes_what_a_mask_does(pattern: PatternConfig, name: KernelName) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 21, 3, 6, generator=generator, dtype=torch.float64).unbind(0)
    mask = mask_of(pattern, 7, 3)
    kernel = CountingKernel(build_attention(AttentionConfig(name)))
    layout = TokenLayout((21,), 0, lone_mesh(), TokenPattern(pattern, 3))
    results = []
    for attention in (lambda *x: masked_attention(*x, mask), lambda *x: LocalAttention(kernel)(*x, layout)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs)
        out.backward(dout)
        results.append([out, *(x.grad for x in inputs)])
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    assert kernel.forwards == kernel.backwards == 2 * 3 * mask.sum()


@pytest.mark.parametrize("pattern", [causal(2), window(1, 1)], ids=name_of)
def test_bfloat16_is_summed_in_float32(pattern: PatternConfig) -> None:
    """As near to float64 as its rounding, in its own dtype: 64 pieces of a key's gradient summed in bfloat16 aren't."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 2, 192, 2, 8, generator=generator).bfloat16()
    layout, results = TokenLayout((192,), 0, lone_mesh(), TokenPattern(pattern, 3)), []
    attention = ContextAttention(build_attention(AttentionConfig("aten")))
    mask = mask_of(pattern, 64, 3)
    for call, dtype in (
        (lambda *x: masked_attention(*x, mask), torch.float64),
        (lambda *x: attention(*x, layout), torch.bfloat16),
    ):
        inputs = [x.to(dtype).requires_grad_() for x in tokens[:3].clone()]
        out = call(*inputs)
        out.backward(tokens[3].to(dtype))
        results.append([out, *(x.grad for x in inputs)])
    for got, wanted in zip(results[1], results[0], strict=True):
        assert got.dtype == torch.bfloat16 and (got - wanted).norm() <= 6e-3 * wanted.norm()


def test_without_a_layout_all_see_all() -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 6, dtype=torch.float64).unbind(0)
    out = LocalAttention(build_attention(AttentionConfig("aten")))(q, k, v, None)
    torch.testing.assert_close(out, masked_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool)))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_causal.frames=0 must be at least 1"):
        BlockCausalConfig(0)
    with pytest.raises(ValueError, match=r"window.frames=-1 must be at least 0"):
        WindowConfig(frames=-1)
    with pytest.raises(ValueError, match=r"window.sinks=-2 must be at least 0"):
        WindowConfig(sinks=-2)
