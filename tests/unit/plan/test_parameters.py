"""The list of parameters without a model, against the model itself as the mesh splits it."""

from dataclasses import replace

import pytest
import torch

from framework.kernels.reference import ReferenceAttention
from framework.models.config import ExecutionConfig, LoraConfig, ModelConfig
from framework.models.dit import DiT
from framework.models.parallelize import parallelize
from framework.parallel.config import MeshShape
from framework.parallel.fragments import is_split
from framework.parallel.mesh import Group, lone_mesh
from framework.plan.parameters import TensorParallel, parameter_shapes

SMALL = ModelConfig(num_attention_heads=6, attention_head_dim=8, num_layers=2, ffn_dim=50, text_dim=7, freq_dim=8)
CONFIGS = {
    "text": SMALL,
    "image": replace(SMALL, image_dim=5, added_kv_proj_dim=48, pos_embed_seq_len=9, in_channels=36),
    "no cross norm": replace(SMALL, cross_attn_norm=False, patch_size=(2, 2, 2), out_channels=4),
}


LORA = LoraConfig(rank=4, targets=["*.to_?", "*.to_out.0", "*.ffn.net.*", "*.linear_?", "*.ff.net.2", "proj_out"])
PARTIAL: dict[str, tuple[LoraConfig, tuple[str, ...]]] = {
    "all": (LoraConfig(), ()),
    "adapters": (LORA, ()),
    "patterns": (LoraConfig(), ("blocks.1.*", "*norm*")),
    "both": (LORA, ("*.bias",)),
}


@pytest.mark.parametrize("partial", PARTIAL)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("size", "index"), [(1, 0), (2, 1), (3, 0), (3, 2)])
def test_they_are_the_models(name: str, size: int, index: int, partial: str) -> None:
    lora, trainable = PARTIAL[partial]
    tp = Group("tp", tuple(range(size)), index, None)
    mesh = replace(lone_mesh(), tp=tp, shape=MeshShape(1, 1, 1, size))
    with torch.device("meta"):
        model = DiT(CONFIGS[name], ReferenceAttention())
    shards = parallelize(model, mesh, ExecutionConfig(), lora=lora, trainable=trainable)
    held = {n: (tuple(p.shape), is_split(p), p.requires_grad) for n, p in model.named_parameters()}
    listed = parameter_shapes(CONFIGS[name], TensorParallel(size, index), lora=lora, trainable=trainable)
    assert {p.name: (p.shape, p.split, p.trained) for p in listed} == held
    assert {s.name: (s.shape, s.trainable) for s in shards} == {n: (shape, t) for n, (shape, _, t) in held.items()}
    assert sum(p.num_elements for p in listed) == sum(p.numel() for p in model.parameters())


def test_wan_14b_has_14_billion() -> None:
    """Wan 2.1's 14B text-to-video model, counted from its published configuration: 14.288 billion."""
    assert sum(p.num_elements for p in parameter_shapes(ModelConfig())) == pytest.approx(14.288e9, rel=1e-3)
