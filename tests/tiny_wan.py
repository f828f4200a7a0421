"""Tiny random models of Wan's pipelines, saved as diffusers saves them."""

from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKLWan
from torch import nn

# Wan 2.1's autoencoder, and the one of Wan 2.2 (5B): residual, with 2x2 pixels folded into channels.
VAES: Final = {
    "2.1": {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
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
