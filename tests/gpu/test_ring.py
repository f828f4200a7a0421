"""The ring on one GPU: as many blocks of keys as ranks, handed on by a stand-in, against one call over all keys."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from masked import causal, mask_of, masked_attention, name_of, window
from torch import Tensor

from framework.kernels.attended import Attended
from framework.kernels.attention import build_attention
from framework.kernels.config import (
    AttentionConfig,
    AttentionNeeds,
    PatternConfig,
    installed_flash,
    resolve_attention,
)
from framework.kernels.pattern import TokenPattern
from framework.parallel.context_parallel import ring
from framework.parallel.mesh import Group

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Neighbour:
    """Hands on the blocks `n 2 B S H d` in the ring's order; of gradients that travel nothing comes back."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks, self.step = blocks, 0

    def __call__(self, tensor: Tensor, group: Group, purpose: str) -> Callable[[], Tensor]:
        if purpose == "ring_gradients":
            return lambda: torch.zeros_like(tensor)
        self.step += 1
        there = (group.index - self.step) % group.size
        return lambda: self.blocks[there]


@pytest.mark.parametrize("pattern", [causal(2), window(1, 1)], ids=name_of)
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_pattern_on_the_ring_is_a_dense_mask(ranks: int, pattern: PatternConfig) -> None:
    """Frames of 192 tokens, 512 tokens a rank but for the last: the second rank's queries begin inside a frame."""
    needs = AttentionNeeds("bfloat16", 128, deterministic=False, has_gpu=True)
    kernel = build_attention(resolve_attention(AttentionConfig(), needs, installed_flash()))
    generator = torch.Generator("cuda").manual_seed(0)
    blocks = torch.randn(ranks, 2, 2, 512, 3, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
    q, dout = torch.randn(2, 2, 512, 3, 128, device="cuda", dtype=torch.bfloat16, generator=generator).unbind(0)
    valid, group = (512,) * (ranks - 1) + (256,), Group("ring", tuple(range(ranks)), 1, None)
    total, here, tokens = sum(valid), valid[1], TokenPattern(pattern, 192)
    keys = [torch.cat([block[i, :, :n] for block, n in zip(blocks, valid, strict=True)], 1) for i in range(2)]
    inputs = [x.float().requires_grad_() for x in (q[:, :here], *keys)]
    mask = mask_of(pattern, total // 192, 192)[512 : 512 + here].cuda()
    want = masked_attention(*inputs, mask)
    want.backward(dout[:, :here].float())
    with patch.object(ring, "ring_exchange", Neighbour(blocks)):
        out, lse = ring.ring_forward(kernel, q, *blocks[1], valid, group, pattern=tokens)
    with patch.object(ring, "ring_exchange", Neighbour(blocks)):
        dq, dk, dv = ring.ring_backward(kernel, dout, Attended(q, *blocks[1], out, lse), valid, group, pattern=tokens)
    wanted = [want, *(x.grad for x in inputs)]
    own = slice(512, 512 + here)
    for got, full, part in zip((out, dq, dk, dv), wanted, (slice(None), slice(None), own, own), strict=True):
        assert full is not None
        assert (got[:, :here].float() - full[:, part]).norm() <= 2e-2 * full[:, part].norm()


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("last", [512, 1, 0])
def test_the_ring_is_the_one_shot_kernel(ranks: int, last: int) -> None:
    """last: tokens of the last rank, the others have 512."""
    needs = AttentionNeeds("bfloat16", 128, deterministic=False, has_gpu=True)
    kernel = build_attention(resolve_attention(AttentionConfig(), needs, installed_flash()))
    generator = torch.Generator("cuda").manual_seed(0)
    blocks = torch.randn(ranks, 2, 2, 512, 3, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
    q, dout = torch.randn(2, 2, 512, 3, 128, device="cuda", dtype=torch.bfloat16, generator=generator).unbind(0)
    valid = (512,) * (ranks - 1) + (last,)
    group = Group("ring", tuple(range(ranks)), 0, None)
    k, v = (torch.cat([block[:, :n] for block, n in zip(blocks[:, i], valid, strict=True)], 1) for i in range(2))
    with patch.object(ring, "ring_exchange", Neighbour(blocks)):
        out, lse = ring.ring_forward(kernel, q, *blocks[0], valid, group)
    want_out, want_lse = kernel.forward(q, k, v, None)
    torch.testing.assert_close(out, want_out, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    with patch.object(ring, "ring_exchange", Neighbour(blocks)):
        dq, dk, dv = ring.ring_backward(kernel, dout, Attended(q, *blocks[0], out, lse), valid, group)
    want_dq, want_dk, want_dv = kernel.backward(dout, Attended(q, k, v, want_out, want_lse), None)
    for got, want in ((dq, want_dq), (dk, want_dk[:, :512]), (dv, want_dv[:, :512])):
        assert (got.float() - want.float()).norm() <= 2e-2 * want.float().norm()
