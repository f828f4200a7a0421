"""The time of a step of a recipe, on average over the buckets that it may draw."""

from collections.abc import Sequence
from dataclasses import replace

from framework.forecast.draws import Draw
from framework.parallel.config import MeshShape
from framework.plan.hardware import Hardware
from framework.plan.sent import Weights
from framework.plan.time import StepTime, step_time
from framework.recipe import Recipe


def step_of(recipe: Recipe, shape: MeshShape, hardware: Hardware, draw: Draw, weights: Weights) -> StepTime:
    """Of a step whose draws are all of one bucket. weights: of a rank's tp part."""
    time = step_time(recipe, shape, hardware, draw.micros * recipe.data.rounds, weights=weights)
    # Of the samples that there are: a replica without one computes an empty slot, which is no work.
    return replace(time, model_flops=float(draw.samples * recipe.data.rounds * draw.flops.total))


def mean_step(
    recipe: Recipe, shape: MeshShape, hardware: Hardware, draws: Sequence[Draw], weights: Weights
) -> StepTime:
    """Over the draws, by their shares."""
    times = [step_of(recipe, shape, hardware, draw, weights) for draw in draws]
    found = times[0] * draws[0].share
    for draw, time in zip(draws[1:], times[1:], strict=True):
        found = found + time * draw.share
    return found
