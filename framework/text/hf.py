"""A T5 or UMT5 encoder (Raffel et al., arXiv 1910.10683; Chung et al., arXiv 2304.09151) from a local directory.

The directory is that of a diffusers pipeline, with the folders text_encoder/ and tokenizer/, or flat, with both in
one. The model runs in the dtype it is stored in (UMT5-XXL: bfloat16, 11 GB). As in Wan
(`WanPipeline._get_t5_prompt_embeds` of diffusers) the encoder itself doesn't attend to the padding, and the padding's
embeddings are set to zero; with mask=False the DiT then attends to these zeros like to any token. With clean=True the
caption is repaired first as there, so that the same words give the same embeddings. Nothing is read from a network.

Shapes: B captions, L = max_length tokens with the end token, D = d_model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from framework.text.clean import clean_caption
from framework.text.config import HfConfig
from framework.text.padding import unpad_texts
from framework.text.version import find_directories, hf_version


def load_model(directory: Path) -> Any:
    """The encoder named by config.json. Raises ValueError for a model that is neither T5 nor UMT5."""
    from transformers import T5EncoderModel, UMT5EncoderModel

    model_type = json.loads((directory / "config.json").read_text()).get("model_type")
    match model_type:
        case "t5":
            model_class: Any = T5EncoderModel
        case "umt5":
            model_class = UMT5EncoderModel
        case _:
            raise ValueError(f"{directory / 'config.json'}: model_type {model_type!r} is neither 't5' nor 'umt5'")
    return model_class.from_pretrained(directory, local_files_only=True, torch_dtype="auto")


class HfEncoder:
    """The TextEncoder of this file (see the module's docstring)."""

    def __init__(self, config: HfConfig, device: torch.device | str = "cpu") -> None:
        if config.max_length < 1:
            raise ValueError(f"text.hf.max_length={config.max_length} must be at least 1")
        model_path, tokenizer_path = find_directories(config.path)
        from transformers import AutoTokenizer

        self._alone = Lock()  # a tokenizer is told how to pad in itself, and threads share it
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
        if not self._tokenizer("").input_ids:
            raise ValueError(f"the tokenizer in {tokenizer_path} gives '' no token: it must append its end token")
        self._model = load_model(model_path).to(device).eval().requires_grad_(False)
        self._clean, self.masked = config.clean, config.mask
        self.width = int(self._model.config.d_model)
        self.max_length = config.max_length
        self.version = hf_version(config)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Embeddings `B L D` float32, zero at the padding, and the mask `B L` bool, or None with mask=False."""
        embeddings_bld, mask_bl = self._encode(captions)
        return embeddings_bld, mask_bl if self.masked else None

    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings `L_i D` float32 of each caption, without padding."""
        return unpad_texts(*self._encode(captions))

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        texts = [clean_caption(caption) if self._clean else caption for caption in captions]
        with self._alone:
            tokens = self._tokenizer(
                texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self._model.device)
        hidden_bld = self._model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask_bl = tokens.attention_mask.bool()
        return hidden_bld.to(torch.float32).masked_fill(~mask_bl[..., None], 0.0), mask_bl
