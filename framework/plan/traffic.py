"""Bytes that our own collectives send from one rank in a step, by the bandwidth-optimal algorithm; what counts is said
in parallel/zero/meter.py.

Of a micro-batch: B samples, s tokens of a rank, padded; n = tp, u = ulysses, r = ring; D width,
h = this rank's heads after the exchange, H = those of its tp part, d channels of a head; b bytes of what the model
computes in, p of norms and modulation (at least 4). Forward and backward of a block, without recompute:

    tp        gather and scatter tokens, before and after attention, cross-attention and feed-forward:
              6 (n-1) B s D b each;  the norms of q and k:  two sums each of a number p a token, again backward
              (self-attention n s tokens, cross-attention n s and the text's L)
    replicated weights that see a rank's own tokens: their gradient summed over tp, once a micro-batch
    ulysses   (u-1)/u (4 B n s H d + 4 B u n s h d) b     in 4 collectives
    ring      (r-1) 6 B u n s h d b                       keys and values twice, their gradients once

`recompute=all` repeats the forward's, `keep_attention` those of tp alone. A step adds the loss (4 bytes over the world)
and the stop flag (8).

What a ZeRO engine sends is in zero_traffic.py.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from framework.parallel.config import MeshShape, split_shape
from framework.parallel.zero.config import SIZES
from framework.plan.parameters import parameter_shapes
from framework.recipe import Recipe, bucket_degrees, bucket_tokens
from framework.shapes import even_parts

Ledger = dict[tuple[str, str], tuple[int, Fraction]]  # (group, purpose) -> (calls, bytes)
NORMS_OF_TOKENS: Final = 3  # of q and k in self-attention, of q in cross-attention
# Parameters that tp ranks hold whole and use on their own tokens.
ON_TOKENS: Final = re.compile(
    r"(patch_embedding|proj_out)\.(weight|bias)|(.*\.)?scale_shift_table|blocks\.\d+\.norm2\.(weight|bias)|"
    r"blocks\.\d+\.(attn1\.to_out\.0|attn2\.to_out\.0|ffn\.net\.2)\.bias"
)


@dataclass(frozen=True)
class MicroShape:
    """One micro-batch of one rank: its samples, and each one's text tokens, image tokens and timesteps."""

    bucket: int
    samples: int
    text: int
    image: int = 0
    timesteps: int = 1


class Account:
    """Calls and bytes by group and purpose."""

    def __init__(self) -> None:
        self.calls: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.num_bytes: defaultdict[tuple[str, str], Fraction] = defaultdict(Fraction)

    def add(self, group: str, purpose: str, sent: Fraction | int, times: int) -> None:
        """`times` collectives that send so many bytes each; in a group of one there is nothing to send."""
        if sent and times:
            self.calls[group, purpose] += times
            self.num_bytes[group, purpose] += times * sent

    def ledger(self) -> Ledger:
        """What has been added."""
        return {key: (calls, self.num_bytes[key]) for key, calls in self.calls.items()}


def share(num_bytes: int, size: int) -> Fraction:
    """(n-1)/n of some bytes."""
    return Fraction((size - 1) * num_bytes, size)


def own_ledger(recipe: Recipe, shape: MeshShape, rank: int, micros: Sequence[MicroShape]) -> Ledger:
    """What our own collectives send in a step of `micros` on a rank of a mesh, in the training loop."""
    account = Account()
    for micro in micros:
        degrees = split_shape(shape, *bucket_degrees(recipe, micro.bucket))
        add_tensor_parallel(account, recipe, degrees, micro)
        add_replicated(account, recipe, degrees, micro)
        add_context_parallel(account, recipe, degrees, rank, micro)
    account.add("world", "loss", 2 * share(precise(recipe), shape.world_size), 1)
    account.add("control", "stop", 2 * share(8, shape.world_size), 1)
    if recipe.zero.engine == "fsdp2":
        account.add("tp", "grad_norm", 2 * share(8, shape.tp), 1)
    return account.ledger()


def compute(recipe: Recipe) -> int:
    """Bytes of what the model computes in."""
    return SIZES[recipe.precision.default.compute]


def precise(recipe: Recipe) -> int:
    """Bytes of what norms and modulation compute in."""
    return max(4, compute(recipe))


def part_tokens(recipe: Recipe, shape: MeshShape, micro: MicroShape) -> int:
    """Tokens of a rank in a micro-batch, after tp has gathered them, padding included."""
    tokens = bucket_tokens(recipe, micro.bucket).num_tokens
    return micro.samples * -(-tokens // shape.replica) * shape.tp


def add_tensor_parallel(account: Account, recipe: Recipe, shape: MeshShape, micro: MicroShape) -> None:
    """Tokens gathered and scattered around the linears, and the sums of the norms of q and k."""
    tokens, n, p = part_tokens(recipe, shape, micro), shape.tp, precise(recipe)
    passes = recipe.model.num_layers * (2 if recipe.execution.recompute == "none" else 3)
    full = tokens * recipe.model.width * compute(recipe)
    account.add("tp", "gather_tokens", share(full, n), 3 * passes)
    account.add("tp", "scatter_tokens", share(full, n), 3 * passes)
    account.add("tp", "qk_norm", 2 * share(tokens * p, n), NORMS_OF_TOKENS * passes)
    for condition in (micro.text, micro.image):
        account.add("tp", "qk_norm", 2 * share(micro.samples * condition * p, n), passes)


def add_replicated(account: Account, recipe: Recipe, shape: MeshShape, micro: MicroShape) -> None:
    """Gradients of what every tp rank holds whole and uses on its own tokens."""
    model, n, width = recipe.model, shape.tp, recipe.model.width
    timesteps = micro.samples * micro.timesteps
    conditions = [timesteps * width * precise(recipe), 6 * timesteps * width * precise(recipe)]
    conditions += [micro.samples * length * width * compute(recipe) for length in (micro.text, micro.image)]
    for num_bytes in conditions:
        account.add("tp", "replicated", 2 * share(num_bytes, n), 1)
    for parameter in parameter_shapes(model):
        if ON_TOKENS.fullmatch(parameter.name):
            size = SIZES[recipe.precision.of(parameter.name).compute]
            account.add("tp", "replicated", 2 * share(parameter.num_elements * size, n), 1)


def add_context_parallel(account: Account, recipe: Recipe, shape: MeshShape, rank: int, micro: MicroShape) -> None:
    """The exchanges of self-attention."""
    layers, recompute = recipe.model.num_layers, recipe.execution.recompute
    forwards = layers * (2 if recompute == "all" else 1)
    n, u, r = shape.tp, shape.ulysses, shape.ring
    heads = recipe.model.num_attention_heads // n
    one = part_tokens(recipe, shape, micro) * recipe.model.attention_head_dim * compute(recipe)
    spread = heads * one  # of one tensor: a rank's tokens with all heads, and all tokens of u ranks with its heads
    gathered = even_parts(heads, u)[rank // n % u] * u * one
    account.add("ulysses", "gather_tokens_scatter_heads", share(3 * spread, u), forwards)
    account.add("ulysses", "scatter_tokens_gather_heads", share(gathered, u), forwards)
    account.add("ulysses", "gather_tokens_scatter_heads", share(spread, u), layers)
    account.add("ulysses", "scatter_tokens_gather_heads", share(3 * gathered, u), layers)
    account.add("ring", "ring", 2 * gathered, (forwards + layers) * (r - 1))
    account.add("ring", "ring_gradients", 2 * gathered, layers * (r - 1))
