"""What the ranks of the tests of longer clips do: train all stages, and count what their engine sends."""

from pathlib import Path
from typing import Any

import ranks

from framework.environment import Environment
from framework.parallel.zero.meter import CollectiveMeter, own_traffic
from framework.programs import train as program


def train(env: Environment, recipes: list[tuple[Path, list[str]]]) -> list[list[float]]:
    """`cuboid train` of each recipe, one after the other; of each step of each the bytes of this rank's engine."""
    found: list[list[float]] = []
    original = program.optimizer_step

    def counted(parts: Any, *args: Any, **kwargs: Any) -> Any:
        before = total(parts.mesh)
        with CollectiveMeter() as meter:
            result = original(parts, *args, **kwargs)
        found[-1].append(float(meter.total) - (total(parts.mesh) - before))
        return result

    program.optimizer_step = counted
    for recipe, words in recipes:
        found.append([])
        ranks.train_all(env, recipe, words)
    return found


def total(mesh: Any) -> float:
    """Bytes of our own collectives so far."""
    return float(sum(sent for _, sent in own_traffic(mesh).values()))
