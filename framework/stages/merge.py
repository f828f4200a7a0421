"""Stages of one run: overrides, each laid over the recipe.

    stages:
      - {name: images, exit: {steps: 20000}, data: {buckets: [...]}, mesh: {dp: 8}}
      - {name: long, exit: {plateau: {evaluations: 5, min_improvement: 0.002}, steps: 90000}}

The recipe of a stage is the recipe without `stages`, the stage's own keys over it: a stage can be read without those
before it. Weights, moments, average and the run's steps go on from stage to stage; the data begin an order of the
stage's own, and its learning rate, warm-up and decay_steps count from its first step. `plan` goes through the
stages, `encode` takes the buckets of all, `bench` and `verify` the one that is named, `sample` the one that the
checkpoint was trained in; elsewhere outside of training the recipe without its stages counts.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.layers import Tree, merge_typed, overlay
from framework.stages.config import ExitConfig

R = TypeVar("R")
Leaves = Mapping[str, Any]
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
# What a stage may change. All else is one for the run: what has weights, what seeds, where things lie.
OPEN: Final = (
    "mesh.*",
    "hardware.*",
    "zero.*",
    "execution.*",
    "attention.*",
    "rope.*",
    "data.*",
    "flow.*",
    "loss.*",
    "optimizer.*",
    "ema.decay",
    "text.dropout",
    "guard.*",
    "checkpoint.*",
    "validation.*",
    "sampler.*",
    "samples.*",
    "log.every",
    "watch.*",
    "train.steps",
    "train.collect_garbage_every",
    "train.max_bad_steps",
)
CLOSED: Final = ("checkpoint.store", "optimizer.name")  # though the above match them


@dataclass(frozen=True)
class Stage:
    """One entry of `stages`. overrides: its recipe keys."""

    index: int
    name: str
    exit: ExitConfig
    overrides: Tree

    def __str__(self) -> str:
        return f"stages[{self.index}] ({self.name})"


def check_entries(tree: Tree, source: str) -> None:
    """Raises ValueError where `stages` of a tree isn't a list of sections. source: what the tree is, for a person."""
    found = tree.get("stages", [])
    if not isinstance(found, list):
        value = "null" if found is None else found
        raise ValueError(
            f"{source}: stages={value} must be a list of stages: stages: [{{name: images, exit: {{steps: N}}}}], or "
            "leave it out"
        )
    for index, entry in enumerate(found):
        if not isinstance(entry, dict):
            value = "null" if entry is None else entry
            raise ValueError(
                f"{source}: stages.{index}={value} must be a stage's keys: {{name: images, exit: {{steps: N}}}}; to "
                "leave a stage out give the list without it, stages=[...]"
            )


def read_stages(entries: list[Tree]) -> list[Stage]:
    """The stages of a recipe. Raises ValueError for a name or an exit that can't be."""
    stages = [read_stage(entry, index) for index, entry in enumerate(entries)]
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"stages: the name {', '.join(twice)} stands twice: give each stage its own")
    return stages


def read_stage(entry: Tree, index: int) -> Stage:
    """One stage, its own keys not yet looked at."""
    name = entry.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"stages[{index}].name={name} must be a short word of lower-case letters, digits, - and _: images"
        )
    here, leaving = f"stages[{index}] ({name})", entry.get("exit")
    ways = "{steps: N}, {samples: N} or {plateau: {evaluations: N, min_improvement: X}, steps: N}"
    if leaving is None:
        raise ValueError(f"{here} has no exit: add exit: {ways}")
    if not isinstance(leaving, dict):
        raise ValueError(f"{here}: exit={leaving} must be {ways}")
    if not isinstance(plateau := leaving.get("plateau"), dict | None):
        raise ValueError(f"{here}: exit.plateau={plateau} must be {{evaluations: N, min_improvement: X}}")
    try:
        found: ExitConfig = OmegaConf.to_object(merge_typed(ExitConfig, leaving, f"{here}: exit"))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(f"{here}: exit.{error.full_key}: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(here) else f"{here}: exit: {error}") from None
    overrides = {key: value for key, value in entry.items() if key not in ("name", "exit")}
    for key in ("stages", "base", "run"):
        if key in overrides:
            raise ValueError(f"{here}: {key} can't stand in a stage: it is one for the run")
    if "steps" in section(overrides, "train"):
        raise ValueError(f"{here}: train.steps can't stand in a stage: its exit says how long it is")
    return Stage(index, name, found, overrides)


def stage_tree(plain: Tree, stage: Stage) -> Tree:
    """The tree of a stage. plain: of the recipe, which stays as it is."""
    tree = copy.deepcopy({key: value for key, value in plain.items() if key != "stages"})
    overlay(tree, copy.deepcopy(stage.overrides), top=True)
    most = stage.exit.steps
    if most is None:
        assert stage.exit.samples is not None
        batch = section(tree, "data").get("global_batch")
        # About, where buckets have batches of their own (data/budget.py, with_steps); no number is refused by its type.
        most = math.ceil(stage.exit.samples / (batch if isinstance(batch, int) and batch > 0 else 1))
    if isinstance(tree.get("train", {}), dict):
        tree["train"] = section(tree, "train") | {"steps": most}
    return tree


def section(tree: Tree, name: str) -> Tree:
    """A section of a tree that may not have it, or something else in its place."""
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def build_stage(plain: Tree, stage: Stage, build: Callable[[Tree], R]) -> R:
    """The checked recipe of a stage; its train.steps are the stage's own. Raises ValueError with the stage."""
    try:
        return build(stage_tree(plain, stage))
    except ValueError as error:
        raise ValueError(f"{stage}: {str(error).removeprefix('the recipe: ')}") from None


def check_kept(leaves: Leaves, stage: Stage, own: Leaves) -> None:
    """Raises ValueError where a stage changes what is one for the run. leaves, own: the keys of the recipe and of the
    stage's.
    """
    for key in sorted(leaves.keys() | own.keys()):
        if key == "stages" or leaves.get(key) == own.get(key):
            continue
        if key in CLOSED or not any(fnmatchcase(key, pattern) for pattern in OPEN):
            raise ValueError(
                f"{stage}: {key}={own.get(key)} differs from the recipe's {leaves.get(key)}: a stage goes on with the "
                "weights and moments of the one before, so this is one for the run"
            )
        if key == "ema.decay" and not (leaves[key] and own[key]):
            raise ValueError(
                f"{stage}: ema.decay={own[key]} against the recipe's {leaves[key]}: an average is kept in every stage "
                "or in none"
            )


def check_plateau(stage: Stage, own: Leaves) -> None:
    """Raises ValueError for a plateau that no validation can show. own: the keys of the stage's recipe."""
    plateau, every = stage.exit.plateau, own["validation.every"]
    if plateau is None:
        return
    if not every:
        raise ValueError(
            f"{stage}: exit: a plateau is one of the validation loss: set validation.every and validation.shards"
        )
    # One validation, with which these are compared, comes before them: at the stage's first step at the earliest.
    if plateau.evaluations * every >= own["train.steps"]:
        raise ValueError(
            f"{stage}: exit: plateau.evaluations={plateau.evaluations} at validation.every={every} take more than the "
            f"{own['train.steps']} steps of the stage: lower validation.every or evaluations, or raise exit.steps"
        )


def check_stages(entries: list[Tree], tree: Tree, leaves: Leaves, *, build: Callable[[Tree], Leaves]) -> int:
    """Check every stage's own recipe; the most steps that all may take. leaves: the keys of the recipe. build: the
    keys of a tree's recipe. Raises ValueError with the stage.
    """
    if "steps" in section(tree, "train"):
        raise ValueError("train.steps can't stand beside stages, each of which has an exit of its own: leave it out")
    total = 0
    for stage in read_stages(entries):
        own = build_stage(tree, stage, build)
        check_kept(leaves, stage, own)
        check_plateau(stage, own)
        total += own["train.steps"]
    return total
