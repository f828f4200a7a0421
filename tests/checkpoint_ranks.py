"""What the ranks of the checkpoints' tests do."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ranks
import torch

from framework.checkpoint.find import store_of
from framework.checkpoint.pieces import ReadStats
from framework.checkpoint.resume import resume
from framework.ema import Ema
from framework.environment import Environment
from framework.parallel.collectives import gather_fragments, gather_objects
from framework.programs import build
from framework.recipe import load_recipe, resolve_auto
from framework.run import Verdict

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Loaded:
    """What an engine holds after it has loaded a run's newest checkpoint, by key, gathered on rank 0; what every rank
    read; the steps.
    """

    held: Arrays
    stats: list[ReadStats]
    step: int


def load(env: Environment, recipe_path: Path, overrides: list[str]) -> Loaded | None:
    """Build the engine of a recipe, spoil everything in it, load, and gather it by means of its own."""
    recipe = resolve_auto(load_recipe(recipe_path, overrides))
    mesh = build.open_mesh(recipe, env)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    fragments = [*engine.fragments(), *Ema(engine.fragments(), recipe.ema).fragments()]
    for fragment in fragments:
        fragment.flat.fill_(torch.nan)
    resumed = resume(store_of(recipe), fragments, mesh.control, fall_back=recipe.resume.fall_back)
    assert resumed is not None
    held: Arrays = {}
    for state in ("model", "exp_avg", "exp_avg_sq", "ema"):
        chosen = [fragment for fragment in fragments if fragment.state == state]
        found = gather_fragments(chosen, mesh.control)
        held |= {f"{state}.{name}": tensor.float().numpy() for name, tensor in found.items()}
    stats = gather_objects(resumed.stats, mesh.control)
    engine.destroy()
    return Loaded(held, stats, resumed.found.entry.step) if env.is_first else None


def train_with(env: Environment, environment: dict[str, str], recipe: Path, overrides: list[str]) -> Verdict:
    """`cuboid train` on this rank, with more in its environment."""
    os.environ.update(environment)
    return ranks.train(env, recipe, overrides)
