"""Where a stage of a run ends, and what it hands over.

plateau:  min(last K losses) > (1 - min_improvement) * best loss of the stage before them
"""

import math
from dataclasses import dataclass, replace

from framework.checkpoint.manifest import Progress
from framework.data.schedule import Schedule
from framework.parallel.collectives import broadcast_object
from framework.parallel.mesh import Group
from framework.recipe import Recipe
from framework.stages.config import PlateauConfig
from framework.stages.merge import Stage


def last_step(recipe: Recipe, stage: Stage | None, progress: Progress, schedule: Schedule) -> int:
    """The step of the run at which training ends, at the latest. recipe: of the stage."""
    if stage is None or stage.exit.samples is None:
        return progress.stage_step + recipe.train.steps
    left = stage.exit.samples - (progress.samples - progress.stage_samples)
    return progress.step + schedule.steps_for(left, progress.data_step - progress.stage_data)


@dataclass(frozen=True)
class StageEnd:
    """The end of a stage; of a run without stages (None), which hands nothing over."""

    stage: Stage | None
    group: Group

    def validated(self, progress: Progress, loss: float | None) -> Progress:
        """The progress after a validation, if there was one. A collective where a plateau ends the stage: the first
        rank's loss counts.
        """
        if loss is None or self.stage is None or self.stage.exit.plateau is None:
            return progress
        (loss,) = broadcast_object((loss,), self.group)
        return replace(progress, evaluations=with_loss(progress.evaluations, loss, self.stage.exit.plateau))

    def is_reached(self, progress: Progress, last: int) -> bool:
        """Whether no step follows in this stage."""
        plateau = None if self.stage is None else self.stage.exit.plateau
        return progress.step == last or (plateau is not None and is_flat(progress.evaluations, plateau))

    def hand_over(self, progress: Progress) -> Progress:
        """At the end: what the next stage goes on from."""
        return progress if self.stage is None else progress.next_stage()


def with_loss(losses: tuple[float, ...], loss: float, plateau: PlateauConfig) -> tuple[float, ...]:
    """The best loss of all but the last validations, and these."""
    losses = (*losses, loss)
    if len(losses) <= plateau.evaluations + 1:
        return losses
    return min(numbers(losses[:2])), *losses[2:]


def is_flat(losses: tuple[float, ...], plateau: PlateauConfig) -> bool:
    """Whether the last validations are no better than the best before them."""
    if len(losses) <= plateau.evaluations:
        return False
    best, *last = numbers(losses)
    return min(last) == math.inf or min(last) > (1 - plateau.min_improvement) * best


def numbers(losses: tuple[float, ...]) -> list[float]:
    """Losses in which what isn't a number is worse than any: min takes nan for the least where it comes first."""
    return [math.inf if math.isnan(loss) else loss for loss in losses]
