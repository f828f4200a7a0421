"""`cuboid encode`: the recipe's videos -> shards of latents, so that training neither decodes nor encodes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from framework.curate.config import EncodeConfig
from framework.curate.encode import Encoders, encode_shards
from framework.curate.report import encode_lines
from framework.curate.share import Share
from framework.data.config import BucketConfig
from framework.data.shards import open_shards
from framework.recipe import Recipe
from framework.stages.recipes import stage_recipe, stages_of
from framework.text.encoder import build_text_encoder
from framework.tokenizer.tokenizer import build_tokenizer


def encode(
    recipe: Recipe,
    videos: str | Path,
    out: str | Path,
    *,
    dtype: Literal["float16", "float32"] = "float16",
    batch: int = 1,
    text: bool | None = None,
    reuse: Sequence[str] = (),
    share: Share | None = None,
    local_rank: int = 0,
) -> list[str]:
    """Encode a share of the videos at every bucket that training takes. Returns the lines to print.

    text: whether the captions' embeddings are stored; None: where their encoder has weights. local_rank: which GPU of
    this machine is used, where there is one.
    """
    share = share or Share()
    gpus = torch.cuda.device_count()
    device = f"cuda:{local_rank % gpus}" if gpus else "cpu"
    with_text = recipe.text.name != "bytes" if text is None else text
    encoder = build_text_encoder(recipe.text, device) if with_text else None
    encoders = Encoders(build_tokenizer(recipe.tokenizer, device), encoder, device)
    config = EncodeConfig(dtype=dtype, batch=batch)
    source, buckets = open_shards(videos), buckets_of(recipe)
    report = encode_shards(source, buckets, encoders, out, config=config, reuse=reuse, share=share)
    if report is None:
        return [f"part {share.index}/{share.count} of {out} is finished; the last to finish makes the index of all"]
    return encode_lines(report)


def buckets_of(recipe: Recipe) -> list[BucketConfig]:
    """The buckets of a recipe; of one with stages those of every stage, each shape and rate once."""
    recipes = [stage_recipe(recipe, stage.index) for stage in stages_of(recipe)] or [recipe]
    named = {bucket.name: bucket for each in recipes for bucket in each.data.buckets}
    return list(named.values())
