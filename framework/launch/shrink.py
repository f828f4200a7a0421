"""The smallest model that splits as a recipe's does, for `cuboid verify --shrink`: a 14B recipe on a laptop.

What decides how things are split is kept: the heads, the degrees, the patch size, the number of buckets and their own
degrees, and the remainders of

    tokens        by ring * ulysses * tp of every mesh         S' = M + S mod M, M their least common multiple
    feed-forward  by tp                                        F' = 4 T + F mod T
    batch         by dp

What decides how much there is to compute is not: two layers, eight channels a head, four latent channels, random
latents under a tokenizer and a text encoder that need no weights, the kernel that fits, two frames a clip with an
attention pattern as narrow. Image tokens are left out, as
the data has none, and so are rules of the precision table and patterns of adapters and of trained parameters that
nothing is left for; where that leaves no pattern at all, everything is trained.
"""

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from framework.data.config import BucketConfig, StreamConfig
from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import LATENT_SCHEMA, Caption, LatentSample
from framework.diffusion.config import SamplesConfig
from framework.evaluate.config import ValidationConfig
from framework.kernels.config import AttentionConfig, BlockCausalConfig, PatternConfig, WindowConfig
from framework.launch.verify import parse_mesh
from framework.models.config import LoraConfig
from framework.plan.parameters import linear_names, parameter_shapes
from framework.recipe import Recipe, bucket_degrees, bucket_tokens, load_recipe, to_yaml
from framework.shapes import latent_shape
from framework.text.config import BytesConfig, TextConfig
from framework.tokenizer.config import DctConfig, TokenizerConfig, tokenizer_strides, tokenizer_version

CHANNELS = 4
TOKENIZER = TokenizerConfig("dct", DctConfig(CHANNELS))
TEXT_DIM = 256


def shrink_recipe(path: Path, overrides: list[str], meshes: list[str], folder: Path) -> Path:
    """Write the shrunk recipe and its latents into `folder`; returns the recipe's path."""
    recipe = load_recipe(path, overrides)
    degrees = [dict(word.split("=", 1) for word in parse_mesh(words)) for words in meshes]
    tp = math.lcm(*(int(d["mesh.tp"]) for d in degrees))
    dp = max(int(d["mesh.dp"]) for d in degrees)
    cp = [int(d["mesh.ring"]) * int(d["mesh.ulysses"]) for d in degrees]
    own = [math.prod(bucket_degrees(recipe, index)) for index in range(len(recipe.data.buckets))]
    buckets = shrink_buckets(recipe, modulus=math.lcm(*cp, *own) * tp)
    for bucket in buckets:
        write_latents(folder / bucket.name, bucket)
    batch = recipe.data.global_batch // recipe.data.rounds
    shrunk = replace(
        recipe,
        run=str(folder / "run"),
        stages=[],
        mesh=replace(recipe.mesh, dp=1, ring=1, ulysses=1, tp=1),
        attention=AttentionConfig(pattern=shrink_pattern(recipe.attention.pattern)),
        tokenizer=TOKENIZER,
        text=TextConfig("bytes", bytes=BytesConfig(max_length=8)),
        zero=replace(recipe.zero, bucket_size=min(recipe.zero.bucket_size, 1 << 20)),
        model=replace(
            recipe.model,
            attention_head_dim=8,
            num_layers=2,
            ffn_dim=4 * tp + recipe.model.ffn_dim % tp,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=8,
            image_dim=None,
            added_kv_proj_dim=None,
            pos_embed_seq_len=None,
        ),
        data=replace(
            recipe.data,
            streams=[StreamConfig(str(folder / bucket.name)) for bucket in buckets],
            buckets=buckets,
            global_batch=recipe.data.rounds * min(batch, 2 * dp + batch % dp),
            micro_batch=min(recipe.data.micro_batch, 2),
        ),
        validation=ValidationConfig(),
        samples=SamplesConfig(),
    )
    linears = linear_names(parameter_shapes(shrunk.model))
    targets = [pattern for pattern in recipe.lora.targets if any(fnmatchcase(name, pattern) for name in linears)]
    lora = replace(recipe.lora, targets=targets) if targets else LoraConfig()
    names = [parameter.name for parameter in parameter_shapes(shrunk.model, lora=lora)]
    table = [rule for rule in recipe.precision.table if any(fnmatchcase(name, rule.pattern) for name in names)]
    trainable = [pattern for pattern in recipe.train.trainable if any(fnmatchcase(name, pattern) for name in names)]
    shrunk = replace(
        shrunk,
        lora=lora,
        precision=replace(recipe.precision, table=table),
        train=replace(recipe.train, trainable=trainable),
    )
    out = folder / "shrunk.yaml"
    out.write_text(to_yaml(shrunk))
    return out


def shrink_pattern(pattern: PatternConfig) -> PatternConfig:
    """The pattern for clips of two frames, so that some tokens of them don't attend to each other either."""
    match pattern.name:
        case "full":
            return pattern
        case "block_causal":
            return PatternConfig("block_causal", block_causal=BlockCausalConfig(1))
        case "window":
            assert pattern.window is not None
            return PatternConfig("window", window=WindowConfig(0, min(1, pattern.window.sinks)))


def shrink_buckets(recipe: Recipe, *, modulus: int) -> list[BucketConfig]:
    """The buckets with as few tokens as have the same remainder, each of another size."""
    buckets: list[BucketConfig] = []
    taken: set[int] = set()
    for index, bucket in enumerate(recipe.data.buckets):
        grid = bucket_tokens(recipe, index)
        tokens = grid.num_tokens if grid.num_tokens < modulus else modulus + grid.num_tokens % modulus
        while tokens in taken:
            tokens += modulus
        taken.add(tokens)
        frames = 2 if grid.frames > 1 and tokens % 2 == 0 else 1
        time, height, width = recipe.model.patch_size
        strides = tokenizer_strides(TOKENIZER)
        buckets.append(
            replace(
                bucket,
                frames=1 + strides.time * (frames * time - 1),
                height=strides.height * height,
                width=strides.width * width * (tokens // frames),
                fps=None,
                max_crop=1.0,
                scores={},
            )
        )
    return buckets


def write_latents(out: Path, bucket: BucketConfig) -> None:
    """Eight random latents of a bucket's shape."""
    latent = latent_shape(bucket.clip, tokenizer_strides(TOKENIZER))
    shape = (CHANNELS, latent.frames, latent.height, latent.width)
    with ShardWriter(
        out, schema=LATENT_SCHEMA, tokenizer_version=tokenizer_version(TOKENIZER), part_size=8, shard_bytes=1 << 24
    ) as writer:
        for number in range(8):
            latents = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
            info = SampleInfo(f"{bucket.name}-{number}@0", bucket.frames, bucket.height, bucket.width, 24.0)
            writer.write(info.uid, "made", [LatentSample(info, latents, (Caption(f"clip number {number}"),))])
        writer.finish()
