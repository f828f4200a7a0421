"""What the ranks of the tests of partial training do."""

from dataclasses import dataclass
from pathlib import Path

import torch
from engine_ranks import Arrays, Updates, backwards, gathered, open_engine

from framework.ema import Ema
from framework.environment import Environment
from framework.parallel.fragments import Fragment


@dataclass(frozen=True)
class Partial:
    """updates: as of whole training. before: all weights before them. frozen_kept: whether this rank's frozen weights
    are bit for bit what they were. frozen: name -> (dtype, elements held, elements owned). averaged: names that the EMA
    takes.
    """

    updates: Updates
    before: Arrays
    frozen_kept: bool
    frozen: dict[str, tuple[str, int, int]]
    averaged: set[str]


def partial(env: Environment, recipe_path: Path, overrides: list[str]) -> Partial:
    """Two updates."""
    recipe, mesh, _, engine = open_engine(env, recipe_path, overrides)

    def frozen() -> list[Fragment]:
        return [f for f in engine.fragments() if not f.shard.trainable]

    before = gathered(engine, mesh, "model")
    bits = [fragment.flat.clone() for fragment in frozen()]
    first = engine.fragments()
    gradients, norms = [], []
    for _ in backwards(recipe, mesh, engine, 2):
        gradients.append(gathered(engine, mesh, "grad"))
        norms.append(engine.step(lr=recipe.optimizer.lr).grad_norm)
    states = {state: gathered(engine, mesh, state) for state in ("model", "exp_avg", "exp_avg_sq")}
    kept = all(torch.equal(old, new.flat) for old, new in zip(bits, frozen(), strict=True))
    held = {
        f.shard.name: (str(f.flat.dtype).removeprefix("torch."), f.flat.numel(), f.flat.numel() * f.shard.owner)
        for f in frozen()
    }
    assert {f.state for f in frozen()} <= {"model"}
    places = [(f.key, f.start, f.flat.data_ptr()) for f in first]
    assert places == [(f.key, f.start, f.flat.data_ptr()) for f in engine.fragments()], "views stay those of the state"
    averaged = {f.shard.name for f in Ema(engine.fragments(), recipe.ema).fragments()}
    engine.destroy()
    return Partial(Updates(gradients, states, norms, {}), before, kept, held, averaged)
