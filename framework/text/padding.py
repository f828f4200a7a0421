"""Texts of different lengths as one tensor, and back: embeddings are stored without their padding.

Shapes: B texts, L = max_length tokens, L_i of text i, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_texts(texts: Sequence[Tensor], max_length: int, *, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Texts `L_i D` as `B L D`, zero at the padding, and the mask `B L` bool, or None where `masked` is False: exactly
    what an encoder of this max_length and `masked` gives. Raises ValueError for a text that is longer, or empty.
    """
    lengths = [len(text) for text in texts]
    if not lengths or min(lengths) < 1 or max(lengths) > max_length:
        raise ValueError(f"texts of {lengths} tokens can't be padded to {max_length}: each needs 1 to {max_length}")
    padded_bld = texts[0].new_zeros(len(texts), max_length, texts[0].shape[1])
    for row, text in zip(padded_bld, texts, strict=True):
        row[: len(text)] = text
    positions = torch.arange(max_length, device=padded_bld.device)
    return padded_bld, positions < positions.new_tensor(lengths)[:, None] if masked else None


def unpad_texts(embeddings_bld: Tensor, mask_bl: Tensor) -> list[Tensor]:
    """The attended tokens of each text, `L_i D`: copies, so that a short one doesn't keep the padding alive."""
    return [text[mask] for text, mask in zip(embeddings_bld, mask_bl, strict=True)]
