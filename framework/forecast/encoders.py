"""Encoders that a run holds on its device while it trains.

Videos that are sampled on the way (`samples.every`) need the text encoder and the tokenizer, which stay. Data are taken
to be encoded ahead (`cuboid encode`), and then need neither.
"""

import math
from pathlib import Path
from typing import Final

from safetensors import safe_open

from framework.parallel.zero.config import SIZES
from framework.recipe import Recipe
from framework.text.config import HfConfig, TextConfig
from framework.text.version import find_directories
from framework.tokenizer.config import TokenizerConfig, WanConfig, read_wan

MINILM_BYTES: Final = 4 * 22_713_216  # of all-MiniLM-L6-v2 in float32


def resident_bytes(recipe: Recipe) -> float:
    """Of their weights. Raises ValueError where their directories aren't here, as a run would."""
    if not recipe.samples.every:
        return 0.0
    return float(text_bytes(recipe.text) + tokenizer_bytes(recipe.tokenizer))


def text_bytes(config: TextConfig) -> int:
    """In the dtype that the weights are stored in."""
    if config.name == "minilm":
        return MINILM_BYTES
    if config.name != "hf":
        return 0
    directory, _ = find_directories((config.hf or HfConfig()).path)
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def tokenizer_bytes(config: TokenizerConfig) -> int:
    """In the dtype that it computes in."""
    if config.name != "wan":
        return 0
    wan = config.wan or WanConfig()
    files = [file for file in read_wan(wan).weights if file.suffix == ".safetensors"]
    return SIZES[wan.dtype] * sum(elements(file) for file in files)


def elements(file: Path) -> int:
    """Of all tensors of a safetensors file, by its header."""
    with safe_open(file, framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
