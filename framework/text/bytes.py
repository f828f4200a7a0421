"""The caption encoder without weights: each UTF-8 byte is a fixed orthonormal code, plus its position.

    embedding[l] = sqrt(D) * H[byte_l] + P[l],   D = 256

H is the Walsh-Hadamard matrix H[i, j] = (-1)^popcount(i & j) / sqrt(D) (Sylvester, 1867): orthonormal rows, exact in
floating point, no random numbers. P is the sinusoid of Vaswani et al. (arXiv 1706.03762, section 3.5; the factor
sqrt(D) is their section 3.4). The text is the caption's bytes and then the end token 0xFF, a byte that UTF-8 never
uses; of these the first `max_length` are kept. The empty caption is the end token alone; a caption that fills
max_length has no end token.

Shapes: B captions, L = max_length bytes, D = 256.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from framework.text.config import BytesConfig
from framework.text.padding import unpad_texts
from framework.text.version import bytes_version

WIDTH = 256
END = 0xFF


def byte_codes() -> Tensor:
    """H: row i is the code of byte i, `256 256` float32, orthonormal."""
    codes = torch.ones(1, 1)
    while codes.shape[0] < WIDTH:
        codes = torch.cat([torch.cat([codes, codes], 1), torch.cat([codes, -codes], 1)], 0)
    return codes / math.sqrt(WIDTH)


def sinusoids(length: int) -> Tensor:
    """P: sin and cos of l / 10000^(2 i / D), interleaved, `L D` float32, computed in float64."""
    frequency = 10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(torch.float32)


class ByteEncoder:
    """The TextEncoder of this file (see the module's docstring)."""

    def __init__(self, config: BytesConfig, device: torch.device | str = "cpu") -> None:
        if config.max_length < 1:
            raise ValueError(f"text.bytes.max_length={config.max_length} must be at least 1")
        self.width = WIDTH
        self.max_length = config.max_length
        self.version = bytes_version(config)
        self.masked = True
        self._codes_bd = (byte_codes() * math.sqrt(WIDTH)).to(device)
        self._positions_ld = sinusoids(config.max_length).to(device)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings `B L D` float32, zero at the padding, and the mask `B L` bool, True = attend."""
        texts = [(caption.encode() + bytes([END]))[: self.max_length] for caption in captions]
        padded = [list(text.ljust(self.max_length, b"\0")) for text in texts]
        ids_bl = torch.tensor(padded, device=self._codes_bd.device)
        lengths_b = torch.tensor([len(text) for text in texts], device=ids_bl.device)
        mask_bl = torch.arange(self.max_length, device=ids_bl.device) < lengths_b[:, None]
        return (self._codes_bd[ids_bl] + self._positions_ld) * mask_bl[..., None], mask_bl

    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings `L_i D` float32 of each caption, without padding."""
        return unpad_texts(*self.encode(captions))
