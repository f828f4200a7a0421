"""What every caption encoder is, and the one place that builds them.

An encoder is frozen: what is learned about text is the model's own text embedder. Captions are encoded to a fixed
length, so that the shape doesn't depend on them, or without padding, to be stored. Padded again they are the same bits:

    pad_texts(encoder.embed(captions), encoder.max_length, masked=encoder.masked) == encoder.encode(captions)

Every caption, the empty one too, has at least one attended token: dropping a caption for guidance replaces it by the
empty string (Ho and Salimans, arXiv 2207.12598).

Shapes: B captions, L tokens (max_length), L_i tokens of caption i, D width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from framework.text.bytes import ByteEncoder
from framework.text.config import BytesConfig, HfConfig, MinilmConfig, TextConfig


class TextEncoder(Protocol):
    """A frozen caption encoder. width: D. max_length: L. masked: whether `encode` gives a mask. version: names
    everything that changes the embeddings.
    """

    width: int
    max_length: int
    masked: bool
    version: str

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Embeddings `B L D` float32, zero at the padding; mask `B L` (True = attend), or None: attend to all."""
        ...

    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings `L_i D` float32 of each caption without padding, at least one token each."""
        ...


def build_text_encoder(config: TextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder that the recipe names, on a device; its embeddings lie there too.

    Raises ValueError, with what to do, where weights or packages are missing. Never reads anything from a network.
    """
    match config.name:
        case "bytes":
            return ByteEncoder(config.bytes or BytesConfig(), device)
        case "minilm":
            from framework.text.minilm import MinilmEncoder

            return MinilmEncoder(config.minilm or MinilmConfig(), device)
        case "hf":
            from framework.text.hf import HfEncoder

            return HfEncoder(config.hf or HfConfig(), device)
        case "stored":
            raise ValueError(
                "text.name=stored knows the shape of embeddings that were made elsewhere, and can embed no caption: "
                "train on shards that hold them, without samples, or choose text.name=bytes, minilm or hf"
            )
