"""How many samples one draw of a bucket takes, so that steps of short and of long clips cost about the same.

A sample of S tokens costs a S^2 + b S (attention and linears; under a pattern the pairs that attend in the place of
S^2) and what its text does. With the recipe's shares w_b of
the samples, a draw takes

    n_b ~ C / cost_b,    C chosen so that a draw takes `reference` samples on average:  1 / sum_b (w_b / n_b)

and a bucket is drawn in proportion to w_b / n_b, which gives it exactly w_b of the samples. n_b is at least 1, at most
`spread` times the reference, and is rounded to the reference times a power of two, or to one of its divisors: then a
batch deals out evenly on every mesh that the reference does. Nothing here knows the mesh.

All samples of a draw have one shape, so the ranks of a mesh are done together, and whether two draws cost the same to
the last percent doesn't matter to them: rounding n_b costs no time. Draws of one bucket for all ranks were chosen over
packing different buckets next to each other for this reason: a pack is as slow as its slowest rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from framework.models.config import training_cost
from framework.plan.bucket import bucket_pairs
from framework.plan.flops import step_flops
from framework.recipe import Recipe, bucket_timesteps, bucket_tokens
from framework.shapes import divisors
from framework.stages.config import ExitConfig
from framework.text.config import text_length

# Where the rounded sizes may lie: the budget is moved by up to a factor of two either way, in steps of a sixteenth.
NUDGES = tuple(2 ** (j / 16) for j in range(-16, 17))


@dataclass(frozen=True)
class Batches:
    """sizes: samples of a draw of each bucket. shares: of the draws. mean: samples a draw takes on average. weights:
    of the samples, summing to 1.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        if len(set(self.sizes)) == 1:
            return float(self.sizes[0])
        return 1 / sum(weight / size for weight, size in zip(self.weights, self.sizes, strict=True))

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(weight / size * self.mean for weight, size in zip(self.weights, self.sizes, strict=True))

    def expected(self, rounds: int) -> tuple[float, ...]:
        """Samples of each bucket in a step of some draws, on average."""
        return tuple(weight * self.mean * rounds for weight in self.weights)


def batch_sizes(costs: Sequence[float], weights: Sequence[float], *, reference: int, spread: float) -> Batches:
    """The batch of each bucket. costs: of one sample, in any unit. weights: shares of the samples, not normalised."""
    shares = tuple(weight / sum(weights) for weight in weights)
    budget = _budget(costs, shares, reference, spread)
    grid = sizes_near(reference, spread)

    def rounded(nudge: float) -> Batches:
        wanted = [min(max(budget * nudge / cost, 1), spread * reference) for cost in costs]
        return Batches(tuple(min(grid, key=lambda n: (abs(math.log(n / w)), n)) for w in wanted), shares)

    choices = [rounded(nudge) for nudge in sorted(NUDGES, key=lambda nudge: abs(math.log(nudge)))]
    return min(choices, key=lambda batches: round(abs(math.log(batches.mean / reference)), 9))


def sizes_near(reference: int, spread: float) -> list[int]:
    """The divisors of the reference, and its products with powers of two up to `spread` times it."""
    return divisors(reference) + [reference << k for k in range(1, int(math.log2(spread)) + 1)]


def micro_sizes(micro_batch: int, tokens: Sequence[float]) -> tuple[int, ...]:
    """Samples of one forward of a rank, by bucket: as many tokens as `micro_batch` samples of the bucket that has the
    most, since tokens are what memory goes by. tokens: of a sample on one rank, text included.
    """
    most = max(tokens)
    return tuple(micro_batch * max(1, int(most // each)) for each in tokens)


def plan_batches(recipe: Recipe) -> Batches:
    """The batches of a recipe's buckets."""
    data = recipe.data
    costs = sample_costs(recipe)
    weights = [bucket.weight for bucket in data.buckets]
    return batch_sizes(costs, weights, reference=data.global_batch // data.rounds, spread=data.spread)


def with_steps(recipe: Recipe, leaving: ExitConfig) -> Recipe:
    """The recipe of a stage that ends after its samples, with the steps that these take on average: `stage_tree`, which
    doesn't know the buckets' batches, takes global_batch for the samples of a step.
    """
    if leaving.samples is None:
        return recipe
    steps = math.ceil(round(leaving.samples / (plan_batches(recipe).mean * recipe.data.rounds), 6))
    return replace(recipe, train=replace(recipe.train, steps=steps))


def sample_costs(recipe: Recipe) -> list[float]:
    """FLOPs of training on one sample of each bucket."""
    a, b = training_cost(recipe.model, text=text_length(recipe.text))
    costs = []
    for index in range(len(recipe.data.buckets)):
        grid = bucket_tokens(recipe, index)
        timesteps = bucket_timesteps(recipe, index)
        c = step_flops(recipe.model, tokens=0, text=text_length(recipe.text), timesteps=timesteps).total
        costs.append(a * bucket_pairs(recipe, index) + b * grid.num_tokens + c)
    return costs


def _budget(costs: Sequence[float], shares: Sequence[float], reference: int, spread: float) -> float:
    """C, by bisection: the mean size of a draw grows with it."""

    def mean(budget: float) -> float:
        sizes = [min(max(budget / cost, 1), spread * reference) for cost in costs]
        return 1 / sum(share / size for share, size in zip(shares, sizes, strict=True))

    low, high = min(costs), max(costs) * spread * reference
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean(middle) < reference else (low, middle)
    return high
