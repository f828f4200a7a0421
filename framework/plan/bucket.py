"""The clips of a bucket in numbers: which of their tokens attend to each other, and the FLOPs of training on one."""

from framework.kernels.pattern import TokenPattern, attended_pairs
from framework.plan.flops import Flops, step_flops
from framework.recipe import Recipe, bucket_timesteps, bucket_tokens
from framework.text.config import text_length


def bucket_pattern(recipe: Recipe, index: int) -> TokenPattern:
    """Which tokens of a bucket's clips attend to each other."""
    grid = bucket_tokens(recipe, index)
    return TokenPattern(recipe.attention.pattern, grid.height * grid.width)


def bucket_pairs(recipe: Recipe, index: int) -> int:
    """How many pairs of tokens of a bucket's clip attend."""
    return attended_pairs(bucket_pattern(recipe, index), bucket_tokens(recipe, index).num_tokens)


def bucket_flops(recipe: Recipe, index: int) -> Flops:
    """Of training on a sample of a bucket; of the pairs of tokens those count that attend."""
    return step_flops(
        recipe.model,
        tokens=bucket_tokens(recipe, index).num_tokens,
        text=text_length(recipe.text),
        timesteps=bucket_timesteps(recipe, index),
        pairs=bucket_pairs(recipe, index),
    )
