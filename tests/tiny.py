"""The smallest run there is: shards of random latents, and a recipe that trains on them in seconds.

    clip 5x16x16 --dct, strides 4x8x8--> latent 8 2x2x2 --patch 1x2x2--> 2 tokens

No video is decoded: `write_latents` writes what `cuboid encode` would have written.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import LATENT_SCHEMA, Caption, LatentSample
from framework.layers import apply_overrides
from framework.shapes import ClipShape, latent_shape
from framework.tokenizer.config import DctConfig, TokenizerConfig, tokenizer_strides, tokenizer_version

CLIP = ClipShape(5, 16, 16)
COEFFICIENTS = 8
NUM_SAMPLES = 8


def write_latents(
    out: Path,
    *,
    num_samples: int = NUM_SAMPLES,
    clip: ClipShape = CLIP,
    coefficients: int = COEFFICIENTS,
    prefix: str = "clip",
    part_size: int = 3,
    poisoned: int | Collection[int] = (),
    loud: Collection[int] = (),
) -> Path:
    """A directory of latent shards, one for every `part_size` samples; equal arguments give equal bytes.

    The uid of sample i is "<prefix>i@0"; every other sample has two captions. poisoned: samples whose latents aren't
    numbers. loud: whose latents are a thousand times as large.
    """
    config = TokenizerConfig("dct", DctConfig(coefficients))
    latent = latent_shape(clip, tokenizer_strides(config))
    shape = (coefficients, latent.frames, latent.height, latent.width)
    with ShardWriter(
        out,
        schema=LATENT_SCHEMA,
        tokenizer_version=tokenizer_version(config),
        part_size=part_size,
        shard_bytes=1 << 20,
    ) as writer:
        for number in range(num_samples):
            latents = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
            if number == poisoned or (not isinstance(poisoned, int) and number in poisoned):
                latents[:] = np.nan
            if number in loud:
                latents *= 1000
            info = SampleInfo(f"{prefix}{number}@0", clip.frames, clip.height, clip.width, 24.0)
            captions = (Caption(f"clip number {number}"), Caption(f"number {number}", 0.5))[: 1 + number % 2]
            writer.write(info.uid, "made", [LatentSample(info, latents, captions)])
        writer.finish()
    return out


def recipe_tree(latents: Path, run: Path) -> dict[str, Any]:
    """The recipe as plain YAML values: 4 samples and 8 tokens a step, about 20,000 parameters."""
    return {
        "run": str(run),
        "mesh": {"dp": 1},
        "tokenizer": {"name": "dct", "dct": {"coefficients": COEFFICIENTS}},
        "text": {"name": "bytes", "bytes": {"max_length": 16}},
        "model": {
            "in_channels": COEFFICIENTS,
            "out_channels": COEFFICIENTS,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "ffn_dim": 32,
            "freq_dim": 32,
            "text_dim": 256,
        },
        "data": {
            "streams": [{"path": str(latents)}],
            "buckets": [{"frames": CLIP.frames, "height": CLIP.height, "width": CLIP.width}],
            "global_batch": 4,
        },
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 4},
        "sampler": {"steps": 2},
    }


def write_recipe(folder: Path, latents: Path, overrides: Sequence[str] = (), *, name: str = "tiny.yaml") -> Path:
    """Write the tiny recipe, with key=value words laid over it, into a folder; its run is `folder/run`."""
    tree = apply_overrides(recipe_tree(latents, folder / "run"), list(overrides))
    path = folder / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def write_stages(folder: Path, latents: Path) -> Path:
    """The tiny recipe in two stages: 3 steps of 4 samples on one rank; 8 samples, 2 a step, on a ring of two."""
    tree = recipe_tree(latents, folder / "run") | {"train": {}}
    tree["stages"] = [
        {"name": "short", "exit": {"steps": 3}},
        {"name": "long", "exit": {"samples": 8}, "mesh": {"dp": 1, "ring": 2}, "data": {"global_batch": 2}},
    ]
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
