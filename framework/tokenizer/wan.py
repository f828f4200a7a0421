"""Wan's causal video autoencoder (arXiv 2503.20314, section 4.1) with its open weights, through diffusers.

    latents = (mode of the posterior - mean) / std              mean, std: `latents_mean`, `latents_std` of config.json

Wan 2.1 has strides 4x8x8 and 16 channels, Wan 2.2 (5B) folds 2x2 pixels into channels first: 4x16x16 and 48. The class
takes a clip frame by frame (1, then 4 at a time) and hands on what its convolutions have seen of the past, but only
within one call: it forgets at the end of each. So a clip is encoded and decoded as a whole here; the memory that takes
is that of four frames, apart from the clip itself.

Shapes: b clips, c channels, t h w latent frames, rows, columns; pixels `b 3 T H W`.
"""

from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from framework.shapes import ClipShape, latent_shape
from framework.tokenizer.config import TokenizerConfig, WanConfig, WanVae, read_wan, tokenizer_version


def load_vae(vae: WanVae, dtype: torch.dtype) -> Any:
    """diffusers' `AutoencoderKLWan`. Raises ValueError where diffusers is missing or can't read the directory."""
    if find_spec("diffusers") is None:
        raise ValueError("tokenizer.name=wan needs the package diffusers: pip install 'cuboid[wan]'")
    from diffusers import AutoencoderKLWan

    try:
        model, report = AutoencoderKLWan.from_pretrained(
            vae.directory, local_files_only=True, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"diffusers can't read the autoencoder in {vae.directory}: {error}") from error
    if missing := sorted(report["missing_keys"]):  # diffusers would go on with random numbers
        raise ValueError(f"the weights in {vae.directory} lack {missing[0]} and {len(missing) - 1} more: copy it anew")
    return model


class WanTokenizer:
    """The Tokenizer of this file (see the module's docstring). It computes on `device`, and returns its result on that
    of its argument, in float32.
    """

    def __init__(self, config: WanConfig, device: torch.device | str = "cpu") -> None:
        vae = read_wan(config)
        self.strides = vae.strides
        self.channels = len(vae.mean)
        self.version = tokenizer_version(TokenizerConfig(name="wan", wan=config))
        self.latent_mean, self.latent_scale = torch.tensor(vae.mean), torch.tensor(vae.std)
        self._alone = Lock()  # the model keeps a clip's past in itself while it works, and threads share it
        self._model = load_vae(vae, getattr(torch, config.dtype)).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, video_bcthw: Tensor, *, first: bool = True) -> Tensor:
        """Pixels `b 3 T H W` in [-1, 1] to latents `b c t h w`; T = 1 + 4k. Raises ValueError for a later piece."""
        self._check_first(first)
        _, colours, frames, height, width = video_bcthw.shape
        if colours != 3:
            raise ValueError(f"the video has {colours} channels; the wan tokenizer takes 3 (red, green, blue)")
        latent = latent_shape(ClipShape(frames, height, width), self.strides)
        video = video_bcthw.to(self._model.device, self._model.dtype)
        with self._alone:
            raw = self._model.encode(video).latent_dist.mode().to(torch.float32)
        assert raw.shape[1:] == (self.channels, latent.frames, latent.height, latent.width), (raw.shape, latent)
        mean, scale = self._constants(raw)
        return ((raw - mean) / scale).to(video_bcthw.device)

    @torch.no_grad()
    def decode(self, latents_bcthw: Tensor, *, first: bool = True) -> Tensor:
        """Latents `b c t h w` to pixels `b 3 T H W`, T = 1 + 4 (t - 1); this class clamps them to [-1, 1] itself."""
        self._check_first(first)
        if latents_bcthw.shape[1] != self.channels:
            raise ValueError(f"the latents have {latents_bcthw.shape[1]} channels; this tokenizer has {self.channels}")
        latents = latents_bcthw.to(self._model.device, torch.float32)
        mean, scale = self._constants(latents)
        with self._alone:
            video: Tensor = self._model.decode((latents * scale + mean).to(self._model.dtype)).sample
        return video.to(latents_bcthw.device, torch.float32)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, `c 1 1 1` on the device of `like`."""
        mean, scale = (rearrange(v.to(like.device), "c -> c 1 1 1") for v in (self.latent_mean, self.latent_scale))
        return mean, scale

    def _check_first(self, first: bool) -> None:
        if not first:
            raise ValueError(
                "the wan tokenizer remembers a clip's past only within one call, so it can't go on with first=False: "
                "give it the whole clip at once"
            )
