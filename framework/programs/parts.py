"""What a step works with: data, objective, engine and order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from framework.batch import Batch, Noised, Score, Tokens
from framework.checkpoint.manifest import Progress
from framework.data.buckets import Stream
from framework.data.loader import Loader
from framework.data.schedule import Schedule, Work
from framework.ema import Ema
from framework.parallel.mesh import Mesh
from framework.parallel.zero.engine import Engine
from framework.programs import build
from framework.programs.stage import last_step
from framework.recipe import Recipe, bucket_tokens
from framework.shapes import LatentShape
from framework.stages.merge import Stage


class Objective(Protocol):
    """What the loop needs of the objective (diffusion/flow.py)."""

    def noise(self, batch: Batch, *, step: int) -> Noised: ...

    def score(self, tokens: Tokens, /) -> Score: ...

    def global_count(self, counts: Sequence[float], latents: Sequence[LatentShape], channels: int, /) -> float: ...


@dataclass(frozen=True)
class Parts:
    """What the loop works with. meshes: as each bucket sees the mesh. expected: samples of each bucket in a step, on
    average. began: the step at which the stage did, from which the learning rate counts.
    """

    recipe: Recipe
    mesh: Mesh
    meshes: list[Mesh]
    engine: Engine
    ema: Ema
    flow: Objective
    schedule: Schedule
    loader: Loader
    latents: list[LatentShape]
    num_tokens: list[int]
    expected: tuple[float, ...]
    began: int = 0

    def global_count(self, work: Work) -> float:
        """What the gradient of the step's sum of losses is divided by: a pure function of the schedule."""
        return self._count(work.counts if self.recipe.loss.weight == "per_step" else self.expected)

    def own_count(self, work: Work) -> float:
        """What the step's sum of losses is divided by to be a mean."""
        return self._count(work.counts)

    def _count(self, counts: Sequence[float]) -> float:
        model = self.recipe.model
        return self.flow.global_count(counts, self.latents, model.out_channels or model.in_channels)


def build_parts(
    recipe: Recipe,
    mesh: Mesh,
    engine: Engine,
    *,
    streams: list[Stream],
    ema: Ema,
    encoders: build.Encoders,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Parts:
    """Data, objective and order for the loop, from where it is. stage: of a run that has any. The recipe of the parts
    has the run's step after which it ends as train.steps.
    """
    progress = progress or Progress()
    meshes = build.bucket_meshes(recipe, mesh)
    schedule = build.build_schedule(recipe, streams, meshes, stage=progress.stage, first=progress.stage_data)
    last = last_step(recipe, stage, progress, schedule)
    recipe = replace(recipe, train=replace(recipe.train, steps=last))
    reads = any(each.replica.index == 0 for each in meshes)
    workers = recipe.data.workers if reads else 0
    builder = build.build_builder(recipe, streams, encoders, dropout=recipe.text.dropout, workers=workers)
    return Parts(
        recipe=recipe,
        mesh=mesh,
        meshes=meshes,
        engine=engine,
        ema=ema,
        flow=build.build_flow(recipe),
        schedule=schedule,
        loader=build.build_loader(
            recipe, streams, builder, schedule, meshes=meshes, start=progress.step, skipped=progress.skipped
        ),
        latents=[builder.latent_shape(index) for index in range(len(recipe.data.buckets))],
        num_tokens=[bucket_tokens(recipe, index).num_tokens for index in range(len(recipe.data.buckets))],
        expected=schedule.batches.expected(recipe.data.rounds),
        began=progress.stage_step,
    )
