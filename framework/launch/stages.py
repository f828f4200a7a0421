"""A recipe with stages on this machine: `cuboid train` of stage after stage, each on ranks of its own, and the one that
`bench` or `verify` is about.
"""

from framework.checkpoint.manifest import Progress
from framework.checkpoint.stage import check_stages, read_progress
from framework.data.budget import with_steps
from framework.environment import Environment, visible_gpus
from framework.launch.check import check_machine, check_start, check_store
from framework.launch.local import Launcher
from framework.log import line
from framework.parallel.config import MeshShape
from framework.recipe import Recipe
from framework.run import Resolved, RunFailure
from framework.stages.recipes import recipe_at, stage_recipe, stages_of


def train_here(invocation: Resolved, arguments: list[str]) -> int:
    """Train every stage that is left. arguments: of the command, which ranks run with their stage. The exit status."""
    recipe = invocation.recipe
    check_store(recipe)
    progress = read_progress(recipe)
    check_stages(invocation, progress)
    shapes = check_left(recipe, progress, num_ranks=None)
    if not shapes:  # else the ranks say the notes
        for text in (*invocation.notes, finished(recipe, progress)):
            line(text)
    with Launcher() as launcher:
        for index, shape in shapes.items():
            status = launcher.run([*arguments, "--stage", str(index)], world_size=shape.world_size)
            if status:
                return status
            if launcher.received:  # as the stage ended anyway
                return 128 + launcher.received[0]
            if (now := read_progress(recipe).stage) != index + 1:
                raise RunFailure(f"stages[{index}] of the run {recipe.run} ended, and its store is at stages[{now}]")
    return 0


def pick_stage(recipe: Recipe, name: str | None) -> tuple[Recipe, str, list[str]]:
    """The recipe of a stage, its name, and what a person should know; of the first where none is named, and "" for a
    recipe without stages. Raises ValueError.
    """
    stages = {stage.name: stage for stage in stages_of(recipe)}
    names = ", ".join(stages)
    if not stages:
        if name is not None:
            raise ValueError(f"--stage {name}: the recipe has no stages: leave it out")
        return recipe, "", []
    picked = stages.get(next(iter(stages)) if name is None else name)
    if picked is None:
        raise ValueError(f"--stage {name}: the recipe has no such stage, only {names}")
    notes = [f"stage {picked.name}, the first of {names}: --stage takes another"] if name is None else []
    return with_steps(stage_recipe(recipe, picked.index), picked.exit), picked.name, notes


def check_left(recipe: Recipe, progress: Progress, *, num_ranks: int | None) -> dict[int, MeshShape]:
    """The meshes of the stages that are left, all of which can start. Raises ValueError with the stage.

    num_ranks: that there are for all of them; None where each has its own.
    """
    shapes, num_gpus = {}, visible_gpus()
    for stage in stages_of(recipe)[progress.stage :]:
        try:
            shape = check_start(stage_recipe(recipe, stage.index), num_ranks=num_ranks, num_gpus=num_gpus)
            if num_ranks is None:
                check_machine(shape, num_gpus=num_gpus)
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from None
        shapes[stage.index] = shape
    return shapes


def stages_of_rank(invocation: Resolved, env: Environment, stage: int | None) -> list[int | None]:
    """What a rank trains, checked: one stage if its launcher says which, else all that are left, on these ranks; [None]
    in a run without stages, and the last one where nothing is left, which says so. Raises ValueError.
    """
    recipe = invocation.recipe
    if not recipe.stages or stage is not None:
        check_start(recipe_at(recipe, stage), num_ranks=env.world_size, num_gpus=visible_gpus())
        return [stage]
    progress = read_progress(recipe)
    check_stages(invocation, progress)
    return [*check_left(recipe, progress, num_ranks=env.world_size)] or [len(recipe.stages) - 1]


def finished(recipe: Recipe, progress: Progress) -> str:
    """What is said where nothing is left."""
    return (
        f"the run {recipe.run} is finished: its {len(recipe.stages)} stages are done, {progress.step} steps; the "
        "stored recipe counts, so to add stages give all of them as stages=[{name: ..., exit: {...}}, ...]"
    )
