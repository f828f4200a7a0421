"""The image tokens of Wan 2.1's image-to-video models: CLIP's vision encoder (Radford et al., arXiv 2103.00020).

The tokens are the hidden states before the last layer, class token first, as `WanImageToVideoPipeline.encode_image` of
diffusers takes them. The directory is a diffusers pipeline's, with image_encoder/ and image_processor/. Nothing is read
from a network.

Shapes: N tokens (257 for ViT-H/14 at 224 x 224), Di width.
"""

from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor


class ClipEncoder:
    """A frozen image encoder. Raises ValueError with what is missing."""

    def __init__(self, pipeline: Path, device: torch.device | str = "cpu") -> None:
        for file in ("image_encoder/config.json", "image_processor/preprocessor_config.json"):
            if not (pipeline / file).is_file():
                raise ValueError(f"{pipeline} lacks {file}, which its model needs for image tokens: copy it anew")
        from transformers import CLIPImageProcessor, CLIPVisionModel

        self._processor = CLIPImageProcessor.from_pretrained(pipeline / "image_processor", local_files_only=True)
        model = CLIPVisionModel.from_pretrained(pipeline / "image_encoder", local_files_only=True, torch_dtype="auto")
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image: Image) -> Tensor:
        """Tokens `N Di` float32; the image is resized and cropped as the processor's file says."""
        pixels = self._processor(images=image, return_tensors="pt").pixel_values
        pixels = pixels.to(self._model.device, self._model.dtype)
        tokens: Tensor = self._model(pixels, output_hidden_states=True).hidden_states[-2][0]
        return tokens.to(torch.float32)
