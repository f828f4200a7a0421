"""A T5 or UMT5 encoder (Raffel et al., arXiv 1910.10683; Chung et al., arXiv 2304.09151) from a local directory.

The directory is that of a diffusers pipeline, with the folders text_encoder/ and tokenizer/, or flat, with both in
one. The model runs in the dtype it is stored in (UMT5-XXL: bfloat16, 11 GB). As in Wan
(`WanPipeline._get_t5_prompt_embeds` of diffusers) the encoder itself doesn't attend to the padding, and the padding's
embeddings are set to zero; with mask=False the DiT then attends to these zeros like to any token. Wan also repairs
the caption's unicode and white space: that is the captions' preparation, not done here. Nothing is read from a
network.

Shapes: B captions, L = max_length tokens with the end token, D = d_model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.fingerprint import directory_hash
from framework.text.config import HfConfig


def find_directories(path: str) -> tuple[Path, Path]:
    """The directories of the model and of its tokenizer. Raises ValueError with the path and the fix."""
    root = Path(path).expanduser()
    fix = "set text.hf.path to a local directory with text_encoder/ and tokenizer/ as diffusers saves, or both in one"
    if not path or not root.is_dir():
        raise ValueError(f"text.hf.path={path!r} is no directory: {fix}")
    nested = (root / "text_encoder").is_dir()
    model, tokenizer = (root / "text_encoder", root / "tokenizer") if nested else (root, root)
    for file in (model / "config.json", tokenizer / "tokenizer_config.json"):
        if not file.is_file():
            raise ValueError(f"text.hf.path={path!r}: {file} is missing: {fix}")
    return model, tokenizer


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

        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
        if not self._tokenizer("").input_ids:
            raise ValueError(f"the tokenizer in {tokenizer_path} gives '' no token: it must append its end token")
        self._model = load_model(model_path).to(device).eval().requires_grad_(False)
        self._return_mask = config.mask
        self.width = int(self._model.config.d_model)
        self.max_length = config.max_length
        content = directory_hash(*sorted({model_path, tokenizer_path}))
        self.version = f"hf-{content}-{config.max_length}-{'masked' if config.mask else 'zeros'}"

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Embeddings `B L D` float32, zero at the padding, and the mask `B L` bool, or None with mask=False."""
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self._model.device)
        hidden_bld = self._model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask_bl = tokens.attention_mask.bool()
        embeddings_bld = hidden_bld.to(torch.float32).masked_fill(~mask_bl[..., None], 0.0)
        return embeddings_bld, mask_bl if self._return_mask else None
