"""Image to video: what the transformer reads beside the noisy latents (Wan, arXiv 2503.20314, section 5.1).

    input = [noisy latents, mask, condition]      condition = encode([image, 0, 0, ...]),  mask = 1 in the given frame

The mask has one channel for each frame of a latent frame: m = the tokenizer's stride in time. So the model has
2 c + m input channels for c latent ones: 36 for 16. Wan 2.1 attends to CLIP's tokens of the image too.

Shapes: c channels and t h w of the latents, m of the mask; N image tokens of width Di; pixels `3 H W` in [-1, 1].
"""

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from framework.shapes import ClipShape
from framework.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class FirstFrame:
    """A given first frame. channels: mask and condition, `m+c t h w`. tokens: `N Di`, None where the model has none."""

    channels: Tensor
    tokens: Tensor | None

    def beside(self, latents_bcthw: Tensor) -> Tensor:
        """The model's input `B c+m+c t h w`."""
        channels = repeat(self.channels.to(latents_bcthw), "c t h w -> b c t h w", b=len(latents_bcthw))
        return torch.cat([latents_bcthw, channels], dim=1)

    def tokens_of(self, batch: int, device: torch.device) -> Tensor | None:
        """Image tokens of a batch, `B N Di`."""
        return None if self.tokens is None else repeat(self.tokens.to(device), "n d -> b n d", b=batch)


def encode_first_frame(image_chw: Tensor, clip: ClipShape, tokenizer: Tokenizer, tokens: Tensor | None) -> FirstFrame:
    """Condition a clip on its first frame. Raises ValueError for an image of another size than the clip's."""
    if tuple(image_chw.shape) != (3, clip.height, clip.width):
        raise ValueError(f"a first frame of {tuple(image_chw.shape)} doesn't fit the clip {clip}: resize it")
    video = torch.zeros(1, 3, clip.frames, clip.height, clip.width)
    video[0, :, 0] = image_chw
    (condition,) = tokenizer.encode(video)
    mask = torch.zeros(tokenizer.strides.time, *condition.shape[1:])
    mask[:, 0] = 1
    return FirstFrame(torch.cat([mask, condition]), tokens)
