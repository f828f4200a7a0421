"""How many ranks share a sample, by bucket (`data.degrees: auto`).

The mesh is chosen so that the longest clip fits; a shorter one needs fewer ranks a sample, and then more samples are
done at once. Of the numbers of ranks that divide dp x ring x ulysses and give no rank more tokens than the mesh gives
it of the longest clip, a bucket takes the one that leaves the least undone: empty slots where its batch doesn't deal
out evenly, padding where its tokens don't split evenly. Of equally good ones it takes the fewest ranks, which send the
least. As many of them as the mesh has, at most, are of Ulysses; the rest is a ring.
"""

import dataclasses
from collections.abc import Sequence

from framework.data.budget import plan_batches
from framework.parallel.config import MeshShape
from framework.recipe import Recipe, bucket_tokens
from framework.shapes import divisors

# A hundredth of a bucket's work is worth fewer ranks a sample: what these send costs about as much.
SLACK = 0.01


def resolve_degrees(recipe: Recipe, shape: MeshShape, *, sizes: Sequence[int] | None = None) -> Recipe:
    """The recipe with the ring and ulysses of every bucket that leaves them to `data.degrees`.

    sizes: of `plan_batches(recipe)`, for who asks for many meshes, which don't change them.
    """
    data = recipe.data
    if data.degrees == "mesh":
        return recipe
    sizes = sizes or plan_batches(recipe).sizes
    tokens = [bucket_tokens(recipe, index).num_tokens for index in range(len(data.buckets))]
    most = -(-max(tokens) // (shape.ring * shape.ulysses))
    buckets = []
    for bucket, size, count in zip(data.buckets, sizes, tokens, strict=True):
        if bucket.ring is None and bucket.ulysses is None:
            ring, ulysses = choose_split(shape, size, tokens=count, most=most)
            bucket = dataclasses.replace(bucket, ring=ring, ulysses=ulysses)
        buckets.append(bucket)
    return dataclasses.replace(recipe, data=dataclasses.replace(data, buckets=buckets))


def choose_split(shape: MeshShape, size: int, *, tokens: int, most: int) -> tuple[int, int]:
    """(ring, ulysses) of a bucket. size: samples of a draw. tokens: of a sample. most: tokens that a rank may have."""
    ranks = shape.dp * shape.ring * shape.ulysses
    choices = [cp for cp in divisors(ranks) if tokens / cp <= most or cp == ranks]
    choices = [cp for cp in choices if cp <= max(tokens, choices[0])]
    idle = {cp: 1 - useful_share(ranks // cp, cp * shape.tp, size=size, tokens=tokens) for cp in choices}
    cp = min(cp for cp in choices if idle[cp] <= min(idle.values()) + SLACK)
    ulysses = max(n for n in range(1, shape.ulysses + 1) if cp % n == 0)
    return cp // ulysses, ulysses


def useful_share(replicas: int, parts: int, *, size: int, tokens: int) -> float:
    """Share of a draw's forward slots and tokens that is no filling. replicas: samples done at once. parts: equal ones
    that the tokens of each are split into, padded.
    """
    rows = -(-size // replicas)
    return size / (rows * replicas) * tokens / (-(-tokens // parts) * parts)
