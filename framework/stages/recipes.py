"""The recipes of a run's stages, and what `auto` stood for when each began."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from framework.layers import Tree
from framework.recipe import Recipe, build_recipe, resolve_auto, to_tree
from framework.stages.config import ExitConfig
from framework.stages.merge import Stage, build_stage, read_stages

# Section and name of what `resolve_auto` resolves.
AUTOS: Final = (("attention", "kernel"), ("optimizer", "decay_steps"))


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a checked recipe."""
    return read_stages(recipe.stages)


def stage_recipe(recipe: Recipe, index: int) -> Recipe:
    """The recipe of one stage, which has no stages itself; its train.steps are the stage's own."""
    return build_stage(to_tree(recipe), stages_of(recipe)[index], build_recipe)


def recipe_at(recipe: Recipe, index: int | None) -> Recipe:
    """The recipe of a stage, or of a run without stages (None)."""
    return recipe if index is None else stage_recipe(recipe, index)


def resolve_run(recipe: Recipe, index: int | None, with_steps: Callable[[Recipe, ExitConfig], Recipe]) -> Recipe:
    """Resolve every `auto` that a later attempt must not choose otherwise, of the stages up to the one that begins.
    with_steps: data/budget.py, the length of a stage.
    """
    if index is None:
        return resolve_auto(recipe)
    entries, stages = copy.deepcopy(recipe.stages), stages_of(recipe)
    for entry, number in zip(entries, range(index + 1), strict=False):
        if autos := autos_of(recipe, entry):
            resolved = resolve_auto(with_steps(stage_recipe(recipe, number), stages[number].exit))
            for section, name in autos:
                pin(entry, section, name, getattr(getattr(resolved, section), name))
    return replace(recipe, stages=entries)


def adopt_resolved(recipe: Recipe, stored: Recipe) -> Recipe:
    """A recipe in which `auto` stands for what it stood for in the run whose recipe is stored."""
    entries = copy.deepcopy(recipe.stages)
    for entry, old in zip(entries, stored.stages, strict=False):
        if entry["name"] == old["name"]:
            for section, name in autos_of(recipe, entry):
                if (value := value_of(stored, old, section, name)) != "auto":
                    pin(entry, section, name, value)
    return replace(recipe, stages=entries)


def autos_of(recipe: Recipe, entry: Tree) -> list[tuple[str, str]]:
    """The keys of a stage that are still auto."""
    return [(section, name) for section, name in AUTOS if value_of(recipe, entry, section, name) == "auto"]


def value_of(recipe: Recipe, entry: Tree, section: str, name: str) -> object:
    """A key of a stage: its own, else the recipe's."""
    own: Tree = entry.get(section) or {}
    return own[name] if name in own else getattr(getattr(recipe, section), name)


def pin(entry: Tree, section: str, name: str, value: object) -> None:
    """Write a key into a stage."""
    entry[section] = (entry.get(section) or {}) | {name: value}
