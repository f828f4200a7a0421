"""Stages on a cluster: a job for each, with nodes of its own, that starts when the one before has ended well."""

from dataclasses import dataclass, replace
from pathlib import Path

from framework.checkpoint.stage import check_stages, read_progress
from framework.data.budget import with_steps
from framework.history import Event, History, now
from framework.launch.config import ClusterConfig
from framework.launch.job import Job
from framework.launch.queue import find_scheduler
from framework.launch.stages import finished
from framework.launch.submit import Request, build_job, discard, submit_all, summary, write_job
from framework.recipe import Recipe
from framework.run import Resolved
from framework.stages.merge import Stage
from framework.stages.recipes import stage_recipe, stages_of


@dataclass(frozen=True)
class Link:
    """The job of one stage. recipe: the stage's own; where samples end it, its train.steps are what they take on
    average.
    """

    stage: Stage
    job: Job
    recipe: Recipe

    def lines(self) -> list[str]:
        """What it starts, for a person."""
        leaving = self.stage.exit
        return [
            f"stage    {self.stage.name}, {leaving}",
            *summary(self.job, self.recipe, estimated=leaving.samples is not None),
        ]


def build_chain(invocation: Resolved, cluster: ClusterConfig, request: Request) -> tuple[list[Link], list[str]]:
    """The jobs of the stages that are left, and what a person should know. Writes nothing. Raises ValueError."""
    recipe = invocation.recipe
    progress = read_progress(recipe)
    check_stages(invocation, progress)
    links: list[Link] = []
    notes: list[str] = []
    for stage in stages_of(recipe)[progress.stage :]:
        try:
            job, own = build_job(invocation, cluster, request, stage=stage, ahead=len(links))
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from None
        if links:  # which of them only the scheduler knows
            job = replace(job, dependency=f"afterok:<{links[-1].stage.name}>")
        links.append(Link(stage, job, with_steps(stage_recipe(recipe, stage.index), stage.exit)))
        notes += own
    if not links:
        raise ValueError("\n".join((*invocation.notes, finished(recipe, progress))))
    return links, list(dict.fromkeys(notes))


def submit_chain(links: list[Link], recipe: Recipe) -> list[str]:
    """Hand the jobs to the scheduler; their numbers. Where one is refused those before it are taken back. Raises
    ValueError. recipe: of the whole run.
    """
    ids: list[str] = []
    for link in links:
        job = replace(link.job, dependency=f"afterok:{ids[-1]}") if ids else link.job
        job = write_job(job, recipe)
        try:
            ids += submit_all([job], after=ids[-1] if ids else None)
        except ValueError:
            discard(job)
            for number in ids:
                find_scheduler().cancel(number)
                History(Path(job.run)).add(Event("cancelled", now(), job=number))
            raise
    return ids
