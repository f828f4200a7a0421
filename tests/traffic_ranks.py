"""What the ranks of the traffic tests do: count a step, and say what the formulas make of it."""

from dataclasses import dataclass
from pathlib import Path

from framework.environment import Environment
from framework.parallel.config import MeshShape, resolve_mesh
from framework.plan.traffic import Ledger, own_ledger
from framework.plan.zero_traffic import EngineTraffic, engine_traffic
from framework.programs import build
from framework.programs.count import Counted, count_fake_step, count_step
from framework.recipe import Recipe, load_recipe, resolve_auto

LOOP = ("loss", "stop")  # purposes of the training loop, outside the step


@dataclass(frozen=True)
class Comparison:
    """A rank's step: what was counted, and what the formulas say."""

    counted: Counted
    own: Ledger
    engine: EngineTraffic

    def mistakes(self) -> dict[object, object]:
        """Where they differ: counted and said."""
        own = {key: value for key, value in self.own.items() if key[1] not in LOOP}
        found = {key: value for key, value in self.counted.own.items() if value[0]}
        keys = own.keys() | found.keys()
        wrong: dict[object, object] = {k: (found.get(k), own.get(k)) for k in keys if found.get(k) != own.get(k)}
        if self.counted.engine != self.engine.total:
            wrong["engine"] = (self.counted.engine, self.engine)
        return wrong | ({"skipped": True} if self.counted.skipped else {})


def said(recipe: Recipe, shape: MeshShape, rank: int, counted: Counted) -> Comparison:
    own = own_ledger(recipe, shape, rank, counted.micros)
    return Comparison(counted, own, engine_traffic(recipe, shape, rank, len(counted.micros)))


def real(env: Environment, recipe_path: Path, cells: list[list[str]]) -> list[Comparison]:
    """Every cell's step on these ranks, one after the other."""
    found = []
    for words in cells:
        recipe = resolve_auto(load_recipe(recipe_path, words))
        mesh = build.open_mesh(recipe, env)
        found.append(said(recipe, mesh.shape, env.rank, count_step(recipe, mesh)))
    return found


def fake(env: Environment, recipe_path: Path, words: list[str], num_ranks: int) -> Comparison:
    """The same step by one process."""
    recipe = resolve_auto(load_recipe(recipe_path, words))
    shape = resolve_mesh(recipe.mesh, num_ranks=num_ranks)
    return said(recipe, shape, 0, count_fake_step(recipe, shape))
