"""`cuboid encode`: the recipe's videos -> shards of latents, so that training neither decodes nor encodes."""

from pathlib import Path
from typing import Literal

from framework.curate.encode import encode_shards
from framework.curate.report import encode_lines
from framework.data.shards import open_shards
from framework.programs.build import this_device
from framework.recipe import Recipe
from framework.tokenizer.tokenizer import build_tokenizer


def encode(recipe: Recipe, videos: Path, out: Path, *, dtype: Literal["float16", "float32"]) -> list[str]:
    """Encode every video of `videos` at every bucket of the recipe. Returns the lines to print."""
    source = open_shards(videos)
    tokenizer = build_tokenizer(recipe.tokenizer, this_device())
    report = encode_shards(source, recipe.data.buckets, tokenizer, out, dtype=dtype)
    return encode_lines(report)
