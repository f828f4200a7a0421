"""Tiny random models of Wan's pipelines, saved as diffusers saves them."""

from pathlib import Path
from typing import Final

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)
from wan_cases import randomise

# Wan 2.1's autoencoder, and the one of Wan 2.2 (5B): residual, with 2x2 pixels folded into channels.
VAES: Final = {
    "2.1": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "2.2": {
        "base_dim": 4,
        "decoder_base_dim": 4,
        "z_dim": 6,
        "dim_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}


def spread(model: nn.Module, seed: int) -> None:
    """Biases and norms away from their first values, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("bias", "gamma", "norm.weight", "norm1.weight", "norm2.weight")):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))


def build_vae(version: str, seed: int = 0) -> AutoencoderKLWan:
    """A random autoencoder whose latents have a mean and a spread of their own in each channel."""
    torch.manual_seed(seed)
    values = VAES[version]
    channels = values["z_dim"]
    assert isinstance(channels, int)
    statistics = {
        "latents_mean": [0.3 * (channel - 1.5) for channel in range(channels)],
        "latents_std": [0.5 + 0.4 * channel for channel in range(channels)],
    }
    model = AutoencoderKLWan(**values, **statistics)
    spread(model, seed)
    return model.eval()


def save_vae(directory: Path, version: str, seed: int = 0) -> AutoencoderKLWan:
    model = build_vae(version, seed)
    model.save_pretrained(directory)
    return model


def build_transformer(seed: int, *, in_channels: int = 4, out_channels: int = 4, image: bool = False) -> nn.Module:
    """A random transformer of width 24; with `image` it attends to tokens of width 16."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        image_dim=16 if image else None,
        added_kv_proj_dim=24 if image else None,
    )
    randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def build_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(5)
    config = UMT5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval()


def build_image_encoder() -> CLIPVisionModel:
    """Tokens: one of the class and four patches, of width 16; the last of three layers isn't used."""
    torch.manual_seed(6)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()


def build_pipeline(kind: str, *, shift: float = 3.0) -> WanPipeline | WanImageToVideoPipeline:
    """text: Wan 2.1. text_folded: with the autoencoder and the patches of Wan 2.2 (5B). experts: Wan 2.2's two. image:
    Wan 2.1's image to video. image_experts: Wan 2.2's, two experts and no image tokens.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    parts = {"tokenizer": ByT5Tokenizer(), "text_encoder": build_text_encoder(), "scheduler": scheduler}
    vae = build_vae("2.2" if kind == "text_folded" else "2.1")
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    match kind:
        case "text":
            return WanPipeline(**parts, vae=vae, transformer=build_transformer(1))
        case "text_folded":
            return WanPipeline(**parts, vae=vae, transformer=build_transformer(1, in_channels=6, out_channels=6))
        case "experts":
            two = {"transformer": build_transformer(1), "transformer_2": build_transformer(2)}
            return WanPipeline(**parts, vae=vae, **two, boundary_ratio=0.8)
        case "image":
            image = {"image_encoder": build_image_encoder(), "image_processor": processor}
            transformer = build_transformer(1, in_channels=12, image=True)
            return WanImageToVideoPipeline(**parts, vae=vae, **image, transformer=transformer)
        case "image_experts":
            two = {
                "transformer": build_transformer(1, in_channels=12),
                "transformer_2": build_transformer(2, in_channels=12),
            }
            return WanImageToVideoPipeline(**parts, vae=vae, **two, boundary_ratio=0.8)
    raise AssertionError(kind)
