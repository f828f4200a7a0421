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

`recompute=all` repeats the forward's, `keep_attention` those of tp alone, both in `recompute_blocks` blocks. With
`chunk_tokens` each chunk of the feed-forward has collectives of its own: as many bytes of tokens, in more calls, and
the sums for its bias and adapters each time; with `loss_chunk_tokens` those for the head's adapter. Where weights are
frozen, what no backward reaches (backward.py) exchanges nothing in it and isn't computed again. A step adds the loss (4
bytes over the world) and the flags that ask to stop (16).

What a ZeRO engine sends is in zero_traffic.py.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from framework.models.config import is_adapter
from framework.parallel.config import MeshShape, split_shape
from framework.parallel.zero.config import SIZES
from framework.plan.backward import EMBEDDER, Reach
from framework.plan.parameters import WHOLE, parameter_shapes, split_style
from framework.recipe import Recipe, bucket_degrees, bucket_tokens
from framework.shapes import even_parts

Ledger = dict[tuple[str, str], tuple[int, Fraction]]  # (group, purpose) -> (calls, bytes)
# Parameters that tp ranks hold whole and use on their own tokens.
ON_TOKENS: Final = re.compile(
    r"(patch_embedding|proj_out)\.(weight|bias)|(.*\.)?scale_shift_table|blocks\.\d+\.norm2\.(weight|bias)|"
    r"blocks\.\d+\.(attn1\.to_out\.0|attn2\.to_out\.0|ffn\.net\.2)\.bias"
)

IN_CHUNKS: Final = re.compile(r"blocks\.\d+\.ffn\.")


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
    parameters = parameter_shapes(recipe.model, lora=recipe.lora, trainable=recipe.train.trainable)
    reach = Reach(recipe.model, parameters)
    for micro in micros:
        degrees = split_shape(shape, *bucket_degrees(recipe, micro.bucket))
        add_tensor_parallel(account, recipe, degrees, micro, reach)
        add_conditions(account, recipe, degrees, micro, reach)
        for parameter in parameters:
            if parameter.trained and is_summed(parameter.name):
                size = parameter.num_elements * SIZES[recipe.precision.of(parameter.name).compute]
                times = times_used(recipe, degrees, micro, parameter.name)
                account.add("tp", "replicated", 2 * share(size, degrees.tp), times)
        add_context_parallel(account, recipe, degrees, rank, micro, reach)
    account.add("world", "loss", 2 * share(precise(recipe), shape.world_size), 1)
    account.add("control", "stop", 2 * share(24, shape.world_size), 1)
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
    return micro.samples * rank_tokens(recipe, shape, micro.bucket) * shape.tp


def rank_tokens(recipe: Recipe, shape: MeshShape, bucket: int) -> int:
    """Tokens of a rank of one sample, padding included."""
    return -(-bucket_tokens(recipe, bucket).num_tokens // shape.replica)


def num_chunks(num_tokens: int, size: int) -> int:
    """Chunks of `size` tokens, 0 = all."""
    return -(-num_tokens // size) if size else 1


def times_used(recipe: Recipe, shape: MeshShape, micro: MicroShape, parameter: str) -> int:
    """How often a micro-batch's forward shows a parameter to tokens: once with each chunk of the feed-forward, and of
    the head its adapter.
    """
    tokens, execution = rank_tokens(recipe, shape, micro.bucket), recipe.execution
    if IN_CHUNKS.match(parameter):
        return num_chunks(tokens, execution.chunk_tokens)
    of_head = is_adapter(parameter) and parameter.startswith("proj_out.")
    return num_chunks(tokens, execution.loss_chunk_tokens) if of_head else 1


def add_tensor_parallel(account: Account, recipe: Recipe, shape: MeshShape, micro: MicroShape, reach: Reach) -> None:
    """Tokens gathered and scattered around the linears, and the sums of the norms of q and k."""
    tokens, n, p = part_tokens(recipe, shape, micro), shape.tp, precise(recipe)
    full = tokens * recipe.model.width * compute(recipe)
    image = [("attn2.norm_added_k", micro.image)] if micro.image else []
    norms = [("attn1.norm_q", 0), ("attn1.norm_k", 0), ("attn2.norm_q", 0), ("attn2.norm_k", micro.text), *image]
    chunks = num_chunks(rank_tokens(recipe, shape, micro.bucket), recipe.execution.chunk_tokens)
    for index, block in enumerate(f"blocks.{index}" for index in range(recipe.model.num_layers)):
        forwards = 2 if block in reach and recipe.execution.recomputes(index, recipe.model.num_layers) else 1
        for module, linear, pieces in (("attn1", "to_out.0", 1), ("attn2", "to_out.0", 1), ("ffn", "net.2", chunks)):
            part = share(full, n) / pieces  # on average, as the last one may be shorter
            leaves, enters = f"{block}.{module}.{linear}" in reach, f"{block}.{module}.enter" in reach
            account.add("tp", "gather_tokens", part, pieces * (forwards + leaves))
            account.add("tp", "scatter_tokens", part, pieces * (forwards + enters))
        for name, condition in norms:
            count = micro.samples * condition if condition else tokens
            account.add("tp", "qk_norm", 2 * share(count * p, n), forwards + (f"{block}.{name}" in reach))


def add_conditions(account: Account, recipe: Recipe, shape: MeshShape, micro: MicroShape, reach: Reach) -> None:
    """Gradients of time, text and image, which every tp rank holds whole and shows its own tokens."""
    width, timesteps = recipe.model.width, micro.samples * micro.timesteps
    wide, narrow = width * precise(recipe), width * compute(recipe)
    for module, num_bytes in (
        ("time_embedder.linear_2", timesteps * wide),
        ("time_proj", 6 * timesteps * wide),
        ("text_embedder.linear_2", micro.samples * micro.text * narrow),
        ("image_embedder.norm2", micro.samples * micro.image * narrow),
    ):
        account.add("tp", "replicated", 2 * share(num_bytes, shape.tp), f"{EMBEDDER}.{module}" in reach)


def is_summed(parameter: str) -> bool:
    """Whether the gradient of a parameter is summed over tp where it is used: of what every rank holds whole and uses
    on its own tokens, and of an adapter's matrix that meets a rank's own columns.
    """
    if not is_adapter(parameter):
        return ON_TOKENS.fullmatch(parameter) is not None
    linear, matrix = parameter.removesuffix(".weight").rsplit(".", 1)
    if linear == "proj_out":
        return True
    style = split_style(f"{linear}.weight")
    return style is not None and matrix in WHOLE[style]


def add_context_parallel(
    account: Account, recipe: Recipe, shape: MeshShape, rank: int, micro: MicroShape, reach: Reach
) -> None:
    """The exchanges of self-attention."""
    blocks = [f"blocks.{index}" for index in range(recipe.model.num_layers)]
    recomputed = [block for i, block in enumerate(blocks) if recipe.execution.recomputes(i, len(blocks))]
    again = sum(block in reach for block in recomputed) if recipe.execution.recompute == "all" else 0
    forwards, layers = len(blocks) + again, sum(f"{block}.attn1.attention" in reach for block in blocks)
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
