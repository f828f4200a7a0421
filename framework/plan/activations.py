"""Bytes of activations on a rank, forward and backward of one micro-batch (what a planner counts without a model).

Of a micro-batch: B samples, s tokens of a rank, padded; n = tp; D width, F a tp rank's part of the feed-forward, L text
tokens, Q numbers of a predicted patch; c bytes of what the model computes in, p of norms and modulation (at least 4).
With

    x = B s D c     tokens, or columns of the group's tokens        w = B s D p     the same in the norms' precision
    g = B n s D c   tokens that tp has gathered                     h = B n s F c   inside the feed-forward

a block keeps from its forward, without recompute,

    7 w     inputs of three norms, two of them normed, and two updates as their gates see them
    3 g     what goes into self-attention, cross-attention and feed-forward
    9 x     q and k before and after norm and rotation, v, out;  q before and after its norm, out       (+ x by Ulysses)
    2 h     before and after gelu
    and per token a few numbers: lse, means and roots of the norms; keys and values of the text

Where each frame has a timestep of its own (t of them), scales and gates are spread to tokens: 4 w more in a block, and
w in the head; shifts are not kept.

By chunks (`chunk_tokens`) 5 x take the place of those w, and a chunk's h is there while it runs. A recomputed block
keeps x, or x and q, k, v, out and lse, and is whole in its own backward alone. What comes on top there is given at its
greatest: of the last gate, whose backward makes 4 w (the gradient, two products, and a factor times 1); of the
feed-forward, at its second linear; of the ring's and Ulysses' exchanges. So it is of the head, which keeps 2 w.

Kernels may need memory of their own, and allocators lose some; neither is counted. Frozen weights change what is kept,
and have no formula here.
"""

from dataclasses import dataclass

from framework.parallel.config import MeshShape, split_shape
from framework.plan.traffic import MicroShape, compute, part_tokens, precise
from framework.recipe import Recipe, bucket_degrees, bucket_tokens
from framework.shapes import even_parts


@dataclass(frozen=True)
class ActivationBytes:
    """On the first rank, which has the most, at the moment of the most. blocks: kept for the backward by blocks that
    aren't computing. block: of the one that is, what it keeps and what comes and goes. head: of head and loss, where
    these are at work instead. inputs: latents, noise, patches, conditions and rotation, which are there throughout.
    host: what waits in the host's memory, not in the total. forward: of all of them, as the forward comes to the head.
    """

    blocks: int
    block: int
    head: int
    inputs: int
    host: int
    forward: int

    @property
    def total(self) -> int:
        return self.blocks + self.block + self.head + self.inputs


@dataclass(frozen=True)
class Units:
    """The letters of the docstring, in bytes; attended: q, k, v and out of self-attention, with lse. few: B n s p.
    spread: w where each frame has a timestep of its own, else 0.
    """

    x: int
    w: int
    g: int
    h: int
    few: int
    attended: int
    part: float
    c: int
    p: int
    spread: int


def activation_bytes(recipe: Recipe, shape: MeshShape, micro: MicroShape) -> ActivationBytes:
    """Of a micro-batch on a mesh. Raises ValueError where there is no formula."""
    if recipe.lora.rank or recipe.train.trainable:
        raise ValueError("activations have no formula where weights are frozen: drop lora.rank and train.trainable")
    degrees = split_shape(shape, *bucket_degrees(recipe, micro.bucket))
    units = units_of(recipe, degrees, micro)
    inputs, execution, layers = input_bytes(recipe, degrees, micro), recipe.execution, recipe.model.num_layers
    whole = block_keeps(recipe, degrees, micro, units)
    away = units.x + (kept_attention(degrees, units) if execution.recompute == "keep_attention" else 0)
    recomputed = [execution.recomputes(index, layers) for index in range(layers)]
    here = [whole if not again else 0 if execution.offload else away for again in recomputed]
    peak = block_peak(recipe, degrees, units, whole)
    head = head_peak(recipe, micro, units)
    # The block before is on its way back while one that was away computes.
    extra = [0] * layers
    for index, again in enumerate(recomputed):
        if again:
            extra[index] = units.x * (units.c != units.p and not execution.chunk_tokens)
            extra[index] += 0 if not execution.offload else away * (index > 0 and recomputed[index - 1])
    moments = [(sum(here[:index]), peak + extra[index], 0) for index in range(layers)] + [(sum(here), 0, head)]
    blocks, block, head = max(moments, key=sum)
    host = away * sum(recomputed) if execution.offload else 0
    forward = sum(here) + inputs + head_keeps(recipe, micro, units)
    return ActivationBytes(blocks, block, head, inputs, host, forward)


def units_of(recipe: Recipe, shape: MeshShape, micro: MicroShape) -> Units:
    """The letters, for a micro-batch on its bucket's mesh."""
    model, c, p = recipe.model, compute(recipe), precise(recipe)
    tokens, n, execution = part_tokens(recipe, shape, micro), shape.tp, recipe.execution
    own = tokens // n
    heads = even_parts(model.num_attention_heads // n, shape.ulysses)[0] * shape.ulysses
    spread = tokens * heads
    per_rank = own // micro.samples
    size = min(execution.chunk_tokens or per_rank, per_rank)
    return Units(
        x=own * model.width * c,
        w=own * model.width * p,
        g=tokens * model.width * c,
        h=tokens * even_parts(model.ffn_dim, n)[0] * c,
        few=tokens * p,
        attended=4 * spread * model.attention_head_dim * c + spread * p,
        part=size / per_rank,
        c=c,
        p=p,
        spread=own * model.width * p * (micro.timesteps > 1),
    )


def kept_attention(shape: MeshShape, units: Units) -> int:
    """What `keep_attention` keeps: q, k, v, out and lse, and the result where Ulysses has made another of it."""
    return units.attended + (units.x if shape.ulysses > 1 else 0)


def block_keeps(recipe: Recipe, shape: MeshShape, micro: MicroShape, units: Units) -> int:
    """From forward to backward, without recompute, its input included."""
    model, n = recipe.model, shape.tp
    text = micro.samples * micro.text * model.width // n * units.c
    few = units.few * (model.num_attention_heads // n + 3 + 6 / n)  # lse; roots of q and k; of three norms, and means
    # self-attention before the exchange and after, cross-attention
    attention = 2 * units.x + kept_attention(shape, units) + 3 * units.x + 3 * text
    norms = 5 * units.x if recipe.execution.chunk_tokens else 7 * units.w
    hidden = 0 if recipe.execution.chunk_tokens else 2 * units.h
    table = 8 * micro.samples * micro.timesteps * model.width * units.p
    if not recipe.execution.chunk_tokens:
        norms += 4 * units.spread
    return norms + 3 * units.g + attention + hidden + table + int(few)


def block_peak(recipe: Recipe, shape: MeshShape, units: Units, whole: int) -> int:
    """The most of a block in its backward, recompute's forward included; but for its input, where that is apart."""
    x, w, g, h = units.x, units.w, units.g if shape.tp > 1 else 0, units.h
    if recipe.execution.chunk_tokens:
        gate = 3 * x + 6 * units.part * w
        feed = 3 * x - x + units.part * (3 * h + 3 * g + w)
        return int(whole + max(gate, feed))
    gate = 4 * w
    forward = 2 * g + x
    feed = x - w + g + h
    return whole + max(gate, forward, feed)


def head_keeps(recipe: Recipe, micro: MicroShape, units: Units) -> int:
    """In its forward: x, what is normed and what is modulated."""
    return (head_peak(recipe, micro, units) + units.spread * (not recipe.execution.loss_chunk_tokens)) // 2


def head_peak(recipe: Recipe, micro: MicroShape, units: Units) -> int:
    """The most of head and loss: in the backward of the modulation, or of the loss."""
    size = recipe.execution.loss_chunk_tokens
    if not size:
        return 6 * units.w + units.spread
    rows = units.w // (recipe.model.width * units.p * micro.samples)
    part = min(size, rows) / rows
    return 2 * units.x + int(6 * part * units.w)


def input_bytes(recipe: Recipe, shape: MeshShape, micro: MicroShape) -> int:
    """What is there throughout. Latents, noised ones, target, and both as patches are whole in every rank of a replica,
    in float32.
    """
    model, c, p = recipe.model, compute(recipe), precise(recipe)
    whole, tokens = bucket_tokens(recipe, micro.bucket).num_tokens, part_tokens(recipe, shape, micro)
    latents = 4 * micro.samples * whole * (3 * model.in_patch_dim + 2 * model.out_patch_dim)
    positions = 3 * 8 * whole
    rotation = tokens * model.attention_head_dim * p
    patches = tokens // shape.tp * model.in_patch_dim * c
    text = micro.samples * micro.text * (4 * model.text_dim + c * model.text_dim + 4 * c * model.width)
    time = micro.samples * micro.timesteps * model.width * 16 * p
    return latents + positions + rotation + patches + text + time
