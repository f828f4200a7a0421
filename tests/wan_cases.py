"""Sizes of the transformer that are compared with diffusers' WanTransformer3DModel, and their random weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.models.config import ModelConfig
from framework.shapes import LatentShape


@dataclass(frozen=True)
class Case:
    config: ModelConfig
    latent: LatentShape
    text_length: int
    image_tokens: int = 0


def _config(heads: int, head_dim: int, layers: int, **changed: object) -> ModelConfig:
    width = heads * head_dim
    values = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 20,
        "freq_dim": 32,
        "ffn_dim": 3 * width + 2,
    }
    return ModelConfig(**(values | changed))


# diffusers takes the last 512 tokens of an image-to-video model's context as its text, so there the text has 512.
CASES = {
    "tiny": Case(_config(2, 12, 2), LatentShape(3, 10, 14), text_length=7),
    "small": Case(
        _config(3, 32, 3, patch_size=(2, 1, 3), cross_attn_norm=False, freq_dim=256, eps=1e-5),
        LatentShape(10, 3, 21),
        text_length=13,
    ),
    "medium": Case(_config(4, 64, 3, in_channels=16, out_channels=16, freq_dim=256), LatentShape(5, 10, 14), 33),
    "image": Case(
        _config(2, 20, 2, in_channels=9, image_dim=24, added_kv_proj_dim=40), LatentShape(3, 6, 10), 512, image_tokens=5
    ),
    "first_and_last": Case(
        _config(3, 16, 2, in_channels=9, image_dim=24, added_kv_proj_dim=48, pos_embed_seq_len=10),
        LatentShape(5, 6, 10),
        text_length=512,
        image_tokens=10,
    ),
}
BATCH = 2


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Every parameter away from zero, and norms away from one, so that none of them can be left out unnoticed."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("scale_shift_table", "pos_embed")):
                value.normal_(0.0, 0.1, generator=generator)
            elif value.ndim >= 2:
                value.normal_(0.0, math.prod(value.shape[1:]) ** -0.5, generator=generator)
            elif name.endswith(".weight"):
                value.normal_(1.0, 0.1, generator=generator)
            else:
                value.normal_(0.0, 0.05, generator=generator)


def worst(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()
