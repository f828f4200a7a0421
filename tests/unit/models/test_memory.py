"""Options that save memory: what is refused, which blocks they choose; nothing is there whole, or moved twice."""

from dataclasses import replace
from typing import Any

import cells
import pytest
import torch
from torch import Tensor

from framework.kernels.aten import AtenAttention
from framework.models import offload
from framework.models.config import ExecutionConfig, ModelConfig, check_execution
from framework.models.dit import DiT
from framework.models.layers import GeluLinear
from framework.models.parallelize import parallelize
from framework.parallel.config import MeshShape
from framework.parallel.mesh import lone_mesh
from framework.parallel.zero.config import PrecisionConfig, PrecisionRule, ZeroConfig

CELL = cells.Cell(MeshShape(1, 1, 1, 1), (1, 1, 7))


def gradients(execution: ExecutionConfig, seen: list[int] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients on one device. seen: tokens of every prediction that is scored, and inside feed-forwards."""
    with torch.device("meta"):
        model = DiT(cells.MODEL, AtenAttention())
    shards = parallelize(model, lone_mesh(), execution)
    generator = torch.Generator().manual_seed(3)
    shapes = {shard.name: shard.global_shape for shard in shards}
    weights = {n: torch.randn(s, generator=generator, dtype=torch.float64) * 0.3 for n, s in shapes.items()}
    cells.fill(model, shards, weights)
    for module in model.modules():
        if isinstance(module, GeluLinear) and seen is not None:
            module.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    inputs = cells.inputs_of(CELL, cells.MODEL)
    loss = cells.run(model, inputs.tokens, inputs, slice(None)).sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("words", [{"recompute": "all"}, {"recompute": "keep_attention", "recompute_blocks": 1}])
def test_what_waits_on_the_host_comes_back_bit_for_bit(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent, to_host = [], offload.to_host
    monkeypatch.setattr(offload, "to_host", lambda tensor: sent.append(tensor.numel()) or to_host(tensor))
    loss, right = gradients(ExecutionConfig(**words))
    assert not sent
    again, away = gradients(ExecutionConfig(**words, offload=True))
    assert torch.equal(loss, again) and right.keys() == away.keys()
    assert all(torch.equal(right[name], away[name]) for name in right)
    tokens = 2 * 7 * cells.MODEL.width  # samples, tokens, channels
    kept = [tokens] if words["recompute"] == "all" else [tokens] * 5 + [2 * 7 * 6]  # q, k, v, out once, lse
    assert sorted(sent) == sorted(kept * (2 if words["recompute"] == "all" else 1))


def test_a_chunk_is_all_that_is_wide() -> None:
    seen: list[int] = []
    loss, _ = gradients(ExecutionConfig(), seen)
    assert set(seen) == {7}
    seen.clear()
    again, _ = gradients(ExecutionConfig(chunk_tokens=3, loss_chunk_tokens=3), seen)
    assert sorted(set(seen)) == [1, 3] and torch.allclose(loss, again, rtol=1e-12)


@pytest.mark.parametrize(
    ("chosen", "layers", "recomputed"),
    [(None, 3, "yyy"), (1, 4, "---y"), (2, 4, "-y-y"), (3, 4, "-yyy"), (2, 5, "--y-y"), (4, 4, "yyyy")],
)
def test_recomputed_blocks_are_spread(chosen: int | None, layers: int, recomputed: str) -> None:
    execution = ExecutionConfig(recompute="all", recompute_blocks=chosen)
    assert "".join("y" if execution.recomputes(i, layers) else "-" for i in range(layers)) == recomputed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"offload": True}, "execution.offload=true with execution.recompute=none"),
        ({"recompute_blocks": 2}, "execution.recompute_blocks=2 with execution.recompute=none"),
        ({"recompute": "all", "recompute_blocks": 0}, "execution.recompute_blocks=0 must be at least 1"),
        ({"chunk_tokens": -1}, "execution.chunk_tokens=-1 must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExecutionConfig(**words)


def test_what_model_and_engine_cannot_do_is_refused() -> None:
    model, zero, precision = ModelConfig(num_layers=3), ZeroConfig(), PrecisionConfig()
    blocks = ExecutionConfig("all", recompute_blocks=4)
    with pytest.raises(ValueError, match=r"recompute_blocks=4 of 3 blocks: set at most 3"):
        check_execution(blocks, model, zero=zero, precision=precision)
    chunks = ExecutionConfig(chunk_tokens=8, loss_chunk_tokens=8)
    check_execution(chunks, model, zero=zero, precision=precision)
    with pytest.raises(ValueError, match=f"set zero.reuse_distance to at least {2 * 5120 * 13824}"):
        check_execution(chunks, model, zero=replace(zero, stage=3, reuse_distance=0), precision=precision)
    for key, name in (("chunk_tokens", "blocks.2.ffn.net.2.weight"), ("loss_chunk_tokens", "proj_out.weight")):
        table = PrecisionConfig(table=[PrecisionRule(name, reduce="bfloat16")])
        with pytest.raises(ValueError, match=f"execution.{key}=8 with a row of its own for {name}"):
            check_execution(chunks, model, zero=zero, precision=table)
