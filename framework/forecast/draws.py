"""What a step consists of on a mesh, before there are data: of each bucket, the micro-batches of one rank."""

from dataclasses import dataclass

from framework.data.budget import Batches, micro_sizes, plan_batches
from framework.parallel.config import MeshShape, split_shape
from framework.plan.bucket import bucket_flops
from framework.plan.flops import Flops
from framework.plan.traffic import MicroShape
from framework.recipe import Recipe, bucket_degrees, bucket_timesteps, bucket_tokens
from framework.shapes import even_parts
from framework.text.config import text_length


@dataclass(frozen=True)
class Deal:
    """What a recipe deals out, whatever the mesh. tokens, timesteps: of a sample of each bucket; flops: of
    training on it. text: tokens of a caption.
    """

    batches: Batches
    tokens: tuple[int, ...]
    timesteps: tuple[int, ...]
    flops: tuple[Flops, ...]
    text: int


@dataclass(frozen=True)
class Draw:
    """A draw of one bucket. share: of all draws. samples: over all ranks. tokens, flops: of a sample. shape: the mesh
    as the bucket splits it. micros: of the rank that has the most.
    """

    bucket: int
    share: float
    samples: int
    tokens: int
    flops: Flops
    shape: MeshShape
    micros: tuple[MicroShape, ...]

    @property
    def empty(self) -> float:
        """Share of the slots of all replicas that no sample fills."""
        return 1 - self.samples / (self.shape.dp * sum(micro.samples for micro in self.micros))


def deal_of(recipe: Recipe) -> Deal:
    """Batches and tokens of a recipe's buckets."""
    count = range(len(recipe.data.buckets))
    tokens = tuple(bucket_tokens(recipe, index).num_tokens for index in count)
    timesteps = tuple(bucket_timesteps(recipe, index) for index in count)
    flops = tuple(bucket_flops(recipe, index) for index in count)
    return Deal(plan_batches(recipe), tokens, timesteps, flops, text_length(recipe.text))


def draws_of(recipe: Recipe, shape: MeshShape, deal: Deal) -> list[Draw]:
    """A draw of each bucket, cut as data/schedule.py cuts it. The recipe's degrees are resolved (data/splits.py).
    Raises ValueError where the mesh can't be split so.
    """
    shapes = [split_shape(shape, *bucket_degrees(recipe, index)) for index in range(len(deal.tokens))]
    held = [tokens / split.cp + deal.text for tokens, split in zip(deal.tokens, shapes, strict=True)]
    sizes = micro_sizes(recipe.data.micro_batch, held)
    draws = []
    for index, split in enumerate(shapes):
        samples = deal.batches.sizes[index]
        rows = -(-samples // split.dp)
        micros = tuple(
            MicroShape(index, part, deal.text, timesteps=deal.timesteps[index])
            for part in even_parts(rows, -(-rows // sizes[index]))
        )
        share, tokens, flops = deal.batches.shares[index], deal.tokens[index], deal.flops[index]
        draws.append(Draw(index, share, samples, tokens, flops, split, micros))
    return draws
