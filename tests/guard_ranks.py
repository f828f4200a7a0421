"""What the ranks of the guard's tests do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_ranks
import ranks
import torch
from torch import Tensor

from framework.environment import Environment
from framework.parallel.mesh import close_mesh
from framework.programs import train as program
from framework.programs.parts import Parts
from framework.run import Verdict


@dataclass(frozen=True)
class Judged:
    """What three steps left, the second of which may be bad. norms: of all three. skipped: the steps that were.
    touched: what the second one changed. held: weights and moments, and Adam's counts, after the third.
    """

    norms: list[float]
    skipped: list[int]
    touched: list[str]
    held: dict[str, bytes]


def judge(env: Environment, recipe_path: Path, cells: list[list[str]], factors: list[float]) -> list[list[Judged]]:
    """Steps on each engine, for each factor on the second's loss; without it where the factor is 0."""
    return [[judge_one(env, recipe_path, words, factor) for factor in factors] for words in cells]


def judge_one(env: Environment, recipe_path: Path, words: list[str], factor: float) -> Judged:
    recipe, mesh, _, engine = engine_ranks.open_engine(env, recipe_path, words)
    judged, right = Judged([], [], [], {}), engine.backward
    for number, times in enumerate([1.0, factor, 1.0] if factor else [1.0, 1.0]):

        def backward(loss_sum: Tensor, times: float = times, **told: Any) -> None:
            right(loss_sum * times, **told)

        engine.backward = backward  # type: ignore[method-assign]
        next(engine_ranks.backwards(recipe, mesh, engine, 1))
        before = {f.key: f.flat.clone() for f in engine.fragments()}
        stats = engine.step(lr=1e-2, limit=1e3)
        judged.norms.append(stats.grad_norm)
        if stats.skipped:
            judged.skipped.append(number)
        if times != 1.0:
            judged.touched.extend(f.key for f in engine.fragments() if not torch.equal(f.flat, before[f.key]))
    for fragment in engine.fragments():
        judged.held[fragment.key] = fragment.flat.view(torch.uint8).numpy().tobytes()
    states = engine._optimizer.state.values()  # type: ignore[attr-defined]
    judged.held["counts"] = str([float(state["step"]) for state in states]).encode()
    engine.destroy()
    close_mesh(mesh)
    return judged


def train_with_a_flip(env: Environment, recipe: Path, overrides: list[str], step: int, rank: int) -> Verdict:
    """`cuboid train`, where one bit of a replicated weight falls over on one rank in one step."""
    right = program.optimizer_step

    def flips(parts: Parts, work: Any, **told: Any) -> Any:
        done = right(parts, work, **told)
        if work.step == step and env.rank == rank:
            (weight,) = [f for f in parts.engine.fragments() if f.key == "model.blocks.1.scale_shift_table"]
            weight.flat.view(torch.int32)[0] ^= 1
        return done

    program.optimizer_step = flips
    return ranks.train(env, recipe, overrides)
