"""The recipes of a run's stages, and what `auto` stood for when each began."""

import copy
from dataclasses import asdict, replace

from framework.layers import Tree
from framework.recipe import Recipe, build_recipe, resolve_auto, to_tree
from framework.stages.merge import Stage, build_stage, read_stages


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a checked recipe."""
    return read_stages(recipe.stages)


def stage_recipe(recipe: Recipe, index: int) -> Recipe:
    """The recipe of one stage, which has no stages itself; its train.steps are the stage's own."""
    return build_stage(to_tree(recipe), stages_of(recipe)[index], build_recipe)


def recipe_at(recipe: Recipe, index: int | None) -> Recipe:
    """The recipe of a stage, or of a run without stages (None)."""
    return recipe if index is None else stage_recipe(recipe, index)


def resolve_run(recipe: Recipe, index: int | None) -> Recipe:
    """Resolve every `auto` that a later attempt must not choose otherwise, of the stages up to the one that begins."""
    if index is None:
        return resolve_auto(recipe)
    entries = copy.deepcopy(recipe.stages)
    for entry, number in zip(entries, range(index + 1), strict=False):
        stage = stage_recipe(recipe, number)
        resolved = resolve_auto(stage)
        before, now = asdict(stage.attention), asdict(resolved.attention)
        pin(entry, "attention", {name: value for name, value in now.items() if value != before[name]})
        if stage.optimizer.decay_steps == "auto":
            pin(entry, "optimizer", {"decay_steps": resolved.optimizer.decay_steps})
    return replace(recipe, stages=entries)


def pin(entry: Tree, section: str, values: Tree) -> None:
    """Write values into a section of a stage."""
    if values:
        entry[section] = (entry.get(section) or {}) | values


def adopt_resolved(recipe: Recipe, stored: Recipe) -> Recipe:
    """A recipe in which `auto` stands for what it stood for in the run whose recipe is stored."""
    entries = copy.deepcopy(recipe.stages)
    for entry, old, index in zip(entries, stored.stages, range(len(entries)), strict=False):
        if entry["name"] != old["name"]:
            continue
        stage, then = stage_recipe(recipe, index), stage_recipe(stored, index)
        if stage.attention.kernel == "auto" and then.attention.kernel != "auto":
            pin(entry, "attention", {name: value for name, value in asdict(then.attention).items() if name == "kernel"})
        if stage.optimizer.decay_steps == "auto" and then.optimizer.decay_steps != "auto":
            pin(entry, "optimizer", {"decay_steps": then.optimizer.decay_steps})
    return replace(recipe, stages=entries)
