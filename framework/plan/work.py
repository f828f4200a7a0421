"""What a rank computes in a micro-batch: FLOPs of linears and attention, bytes that everything else moves, kernels.

Of one block's forward, with the symbols of traffic.py, F feed-forward width, L text and N image tokens of a sample, S
real tokens of a sample, q those of a ring rank:

    linears       2 n B s D (6 D + 2 F) / n  +  2 B (L + N) D 2 D / n        text's keys and values on every cp rank
    attention     4 B q S h d  +  4 n B s (L + N) D / n                      what has the most heads, and a full part
    elementwise   the operations of models/dit.py one by one, each reading and writing what it takes and gives

The bytes of an operation assume that nothing stays in a cache. Two factors are assumptions, which a calibration absorbs
into `device.bandwidth` and `device.launch`: a backward moves twice the bytes of its forward, and a compiled block
moves FUSED of them in FUSED of the kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from framework.kernels.pattern import attended_pairs
from framework.parallel.config import MeshShape
from framework.parallel.zero.config import SIZES
from framework.plan.bucket import bucket_pattern
from framework.plan.flops import attention_flops, linear_flops
from framework.plan.traffic import MicroShape, compute, part_tokens, precise
from framework.recipe import Recipe, bucket_tokens
from framework.shapes import even_parts

FUSED = 0.4
KERNELS = 50  # of a block's forward, counted as operations that torch dispatches, views left out
CASTS = 30  # more of them where norms and modulation compute in a wider dtype
MODEL_KERNELS = 36  # of a micro-batch's forward around the blocks, noise and loss included
# A parameter's gradient on its way through an engine's hooks, for each micro-batch: the processor time of a micro-batch
# beyond its blocks', in kernels.
PARAMETER_KERNELS: Final[Mapping[tuple[str, int], int]] = MappingProxyType(
    {("fsdp2", 2): 4, ("fsdp2", 3): 5, ("deepspeed", 1): 1, ("deepspeed", 2): 3, ("deepspeed", 3): 10}
)
BACKWARD_BYTES = 2
BACKWARD_KERNELS = 2  # times the forward's: 129 in float32, 160 in bfloat16
ATTENTION_BACKWARD = 2.5  # FLOPs of an attention kernel's backward against its forward's


@dataclass(frozen=True)
class Work:
    """One block's forward, and (outer) what is around the blocks: FLOPs, bytes. attention: self-attention, which a ring
    cuts and recompute may keep; cross: to the text. hidden: of the linears, what leads into the feed-forward.
    """

    linears: float
    attention: float
    cross: float
    moved: float
    hidden: float
    outer_linears: float
    outer_moved: float


def block_work(recipe: Recipe, shape: MeshShape, micro: MicroShape) -> Work:
    """Of the first rank of a replica. shape: with the bucket's own degrees."""
    model, b = recipe.model, micro.samples
    n, u = shape.tp, shape.ulysses
    tokens, real = part_tokens(recipe, shape, micro), bucket_tokens(recipe, micro.bucket).num_tokens
    width, hidden, seen = model.width // n, -(-model.ffn_dim // n), micro.text + micro.image
    linears = linear_flops(tokens, model.width, 6 * width + 2 * hidden)
    linears += linear_flops(b * seen, model.width, 2 * width)
    heads = even_parts(model.num_attention_heads // n, u)[0]
    pairs = most_pairs(recipe, micro.bucket, min(real, tokens // b * u), ring=shape.ring)
    attention = b * attention_flops(pairs, heads * model.attention_head_dim)
    outer = linear_flops(tokens // n, model.width, model.in_patch_dim + model.out_patch_dim)
    outer += linear_flops(b * micro.text, model.width, model.text_dim + model.width)
    outer += linear_flops(b * micro.image, model.width, (model.image_dim or 0) + model.width)
    outer += linear_flops(b * micro.timesteps, model.width, model.freq_dim + 7 * model.width)
    return Work(
        linears=linears,
        attention=attention,
        cross=attention_flops(tokens * seen, width),
        moved=moved_bytes(recipe, shape, micro, tokens),
        hidden=linear_flops(tokens, model.width, hidden),
        outer_linears=outer,
        outer_moved=tokens // n * (model.in_patch_dim + 2 * model.width) * 8.0,
    )


def most_pairs(recipe: Recipe, bucket: int, queries: int, *, ring: int) -> int:
    """Pairs that attend among the queries of a ring's rank, of the rank that has the most: it is waited for."""
    grid = bucket_tokens(recipe, bucket)
    if recipe.attention.pattern.name == "full":
        return queries * grid.num_tokens
    pattern = bucket_pattern(recipe, bucket)
    spans = ((rank * queries, min(grid.num_tokens, (rank + 1) * queries)) for rank in range(ring))
    return max(attended_pairs(pattern, grid.num_tokens, span) for span in spans if span[0] < span[1])


def moved_bytes(recipe: Recipe, shape: MeshShape, micro: MicroShape, tokens: int) -> float:
    """Bytes that a block's forward reads and writes outside of linears and attention."""
    c, p, model = compute(recipe), precise(recipe), recipe.model
    cast = c + p if c != p else 0
    per_token = 3 * (2 * p + 2 * cast) + 2 * 2 * p + 2 * (3 * p + 3 * cast) + 3 * c  # norms, modulation, gates, sum
    per_token += 5 * (2 * p + 2 * cast)  # norms of q, k, and cross-attention's q; rotation of q and k
    if shape.ulysses > 1:
        per_token += 4 * 2 * 2 * c  # q, k, v and the result, laid out for the exchange and back
    if shape.ring > 1:
        per_token += (shape.ring - 1) * 3 * p + 2 * 2 * c  # merges; keys and values in one message
    own = tokens // shape.tp * model.width * per_token
    own += tokens * (model.ffn_dim // shape.tp) * 2 * c
    if shape.tp > 1:
        own += 6 * tokens * model.width * 2 * c
    return own + micro.samples * micro.text * (model.width // shape.tp) * (2 * p + 2 * cast)


def block_kernels(recipe: Recipe) -> int:
    """Of a block's forward."""
    return KERNELS + CASTS * (compute(recipe) != precise(recipe))


def micro_kernels(recipe: Recipe, num_parameters: int) -> float:
    """Of a micro-batch, forward and backward, and of what its recompute repeats."""
    fused = FUSED if recipe.execution.compile else 1.0
    passes = 1 + BACKWARD_KERNELS
    blocks = recipe.model.num_layers * block_kernels(recipe) * fused
    engine = PARAMETER_KERNELS[recipe.zero.engine, recipe.zero.stage] * num_parameters
    return blocks * (passes + (recipe.execution.recompute != "none")) + MODEL_KERNELS * passes + engine


def update_bytes(recipe: Recipe) -> float:
    """Bytes that a step moves for each element that a rank updates: the norm and the clipping of the gradient, AdamW on
    weight, gradient and two moments, the cast, the cleared gradient, the average.
    """
    wide = precise(recipe)
    adam, norm, clip, clear = 7 * wide, wide, 2 * wide if recipe.optimizer.clip else 0, wide
    average = 3 * wide if recipe.ema.decay else 0
    return norm + clip + adam + wide + compute(recipe) + clear + average


def gradient_bytes(recipe: Recipe) -> float:
    """Bytes that a micro-batch moves for each element of a gradient: written, read, and copied for its reduction."""
    return 2 * compute(recipe) + 2 * SIZES[recipe.precision.default.reduce]
