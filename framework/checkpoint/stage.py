"""Which stage a run is in, and which of its stages may still change. Imports no torch."""

from framework.checkpoint.find import newest, store_of
from framework.checkpoint.manifest import Progress
from framework.recipe import Recipe
from framework.run import Resolved, check_same
from framework.stages.merge import Stage
from framework.stages.recipes import recipe_at, stage_recipe, stages_of


def read_progress(recipe: Recipe) -> Progress:
    """Of the newest checkpoint. Raises DamagedCheckpoint where it isn't whole."""
    found = newest(store_of(recipe), fall_back=recipe.resume.fall_back)
    return Progress() if found is None else found.manifest.progress


def trained_recipe(recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe by which a run's checkpoint was trained: of its stage, where the run has any."""
    return recipe_at(recipe, progress.trained_stage if recipe.stages else None)


def check_stages(invocation: Resolved, progress: Progress) -> None:
    """Refuse changes to stages that are done or have begun. Raises ValueError; those to come are free."""
    stored, changed = invocation.stored, invocation.recipe
    if stored is None:
        return
    now = {stage.index: stage for stage in stages_of(changed)}
    for stage in stages_of(stored):
        begun = stage.index == progress.stage and progress.step > progress.stage_step
        if stage.index < progress.stage or begun:
            new = now.get(stage.index)
            state = "has begun" if begun else f"is done ({stage.exit})"
            if new is None or new.name != stage.name or (new.exit != stage.exit and not begun):
                gone = "left out" if new is None else f"changed to {new.name}, {new.exit}"
                raise ValueError(
                    f"{stage} of the run {stored.run} {state}: it can't be {gone}; what follows it can, and stages may "
                    "be added at the end"
                )
            check_same(stage_recipe(stored, stage.index), stage_recipe(changed, stage.index), where=f"{stage}: ")
            if begun:
                check_exit(new, progress)


def check_exit(stage: Stage, progress: Progress) -> None:
    """Raises ValueError where a stage would end before where it is."""
    done = {"steps": progress.step - progress.stage_step, "samples": progress.samples - progress.stage_samples}
    for name, count in done.items():
        most = getattr(stage.exit, name)
        if most is not None and most <= count:
            raise ValueError(
                f"{stage}: exit: {name}={most}, of which {count} are done: it may end later than that, not before"
            )
