"""Where a larger clip lies: what a recipe's longest buckets cost a rank, and the simplest mesh that costs no more."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from framework.data.config import BucketConfig
from framework.parallel.config import MeshConfig
from framework.recipe import Recipe, bucket_degrees, bucket_tokens
from framework.shapes import Strides
from framework.tokenizer.config import tokenizer_strides

Recompute = Literal["none", "keep_attention", "all"]
# Bytes of a token and channel that a block keeps for the backward: everything (Korthikanti et al., arXiv 2205.05198,
# without the scores); input, q, k, v and output; the input.
KEPT: Final[tuple[tuple[Recompute, int], ...]] = (("none", 34), ("keep_attention", 10), ("all", 2))
NODE: Final = 8  # ranks that Ulysses and tp together may span


@dataclass(frozen=True)
class Placement:
    """Where a sample lies: the degrees, and what the backward computes again."""

    mesh: MeshConfig
    recompute: Recompute


ChooseMesh = Callable[
    [Recipe, Recipe, int | None], Placement
]  # (old, new with the old degrees and about its batch, GPUs)


def longest(recipe: Recipe) -> list[int]:
    """The buckets that are the longest in seconds. Raises ValueError for one without a rate."""
    strides = tokenizer_strides(recipe.tokenizer)
    times = []
    for index, bucket in enumerate(recipe.data.buckets):
        moves = bucket_tokens(recipe, index).frames > 1
        if moves and bucket.fps is None:
            raise ValueError(f"data.buckets.{index}.fps is null, so that {bucket.name} has no duration: set it")
        times.append(seconds_of(bucket, strides) if moves else 0.0)
    if not max(times):
        raise ValueError("no bucket has more than one latent frame: there is no clip to make longer")
    return [index for index, time in enumerate(times) if time == max(times)]


def seconds_of(bucket: BucketConfig, strides: Strides) -> float:
    """A clip's duration as it is spoken of: 81 frames at 16 a second are 5 s to a causal tokenizer, 80 to another."""
    assert bucket.fps is not None
    return (bucket.frames - strides.causal) / bucket.fps


def choose_mesh(old: Recipe, new: Recipe, num_gpus: int | None) -> Placement:
    """The fewest ranks a sample for which a rank keeps no more activations than it did; where the GPUs are too few
    for that, more is computed again. Raises ValueError where that isn't enough either. num_gpus: None is any number.
    """
    tp, kept = old.mesh.tp, dict(KEPT)
    budget = rank_tokens(old) * kept[old.execution.recompute]
    names = [name for name, _ in KEPT]
    most = 4096 if num_gpus is None else num_gpus // tp
    for recompute in names[names.index(old.execution.recompute) :]:
        first = max(1, math.ceil(sample_tokens(new) * new.data.micro_batch * kept[recompute] / budget))
        for cp in range(max(first, old.mesh.ring * old.mesh.ulysses), most + 1):
            ulysses = widest_ulysses(new, cp)
            rest = 0 if num_gpus is None else num_gpus % (cp * tp)
            if not rest and (num_gpus is not None or cp & (cp - 1) == 0):
                dp = old.mesh.dp if num_gpus is None else num_gpus // (cp * tp)
                return Placement(MeshConfig(dp, cp // ulysses, ulysses, tp), recompute)
    need = math.ceil(sample_tokens(new) * new.data.micro_batch * kept["all"] / budget) * tp
    raise ValueError(
        f"{num_gpus} GPUs are too few for {sample_tokens(new):,} tokens a sample: even with execution.recompute=all a "
        f"rank keeps no more than before only with {need} of them or more, a multiple of ring * ulysses * tp: "
        "raise --gpus, or lower --seconds"
    )


def widest_ulysses(recipe: Recipe, cp: int) -> int:
    """The largest part of cp that Ulysses can take: whole heads each, within a node."""
    heads, tp = recipe.model.num_attention_heads // recipe.mesh.tp, recipe.mesh.tp
    return max(n for n in range(1, cp + 1) if cp % n == 0 and heads % n == 0 and (n == 1 or n * tp <= NODE))


def sample_tokens(recipe: Recipe) -> int:
    """Tokens of a sample of the longest bucket, of several the largest."""
    return max(bucket_tokens(recipe, index).num_tokens for index in longest(recipe))


def rank_tokens(recipe: Recipe) -> int:
    """Tokens that a rank holds of a forward of the longest bucket."""
    micro, tokens = recipe.data.micro_batch, {i: bucket_tokens(recipe, i).num_tokens for i in longest(recipe)}
    return max(-(-micro * count // math.prod(bucket_degrees(recipe, index))) for index, count in tokens.items())
