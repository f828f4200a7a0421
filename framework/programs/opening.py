"""Where training goes on: at the newest checkpoint or the initial weights, at the start and after too many bad updates.

What a run that goes back leaves out is put down in the store before it trains again (checkpoint/fence.py), as the next
checkpoint may never come: a kill right after it resumes with the same data.
"""

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from framework.checkpoint.fence import Fence, read_skipped
from framework.checkpoint.local import local_directory
from framework.checkpoint.manifest import Origin, Progress
from framework.checkpoint.resume import Resumed, resume
from framework.checkpoint.writer import Subject
from framework.data.buckets import Stream
from framework.data.windows import Windows, leave_out
from framework.ema import Ema
from framework.parallel.collectives import broadcast_object, shared_failure
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import Group, Mesh
from framework.parallel.zero.engine import Engine
from framework.programs import build
from framework.programs.guard import Ended
from framework.recipe import Recipe
from framework.run import Run, RunFailure, recipe_hash, versions
from framework.stages.merge import Stage
from framework.storage.storage import Storage

WEIGHTS = ("model", "ema")


@dataclass(frozen=True)
class Opened:
    """What an attempt has, wherever it goes on. data: identity of the streams. notes: what a person should know.
    stage: whose the recipe is, None in a run without.
    """

    recipe: Recipe
    mesh: Mesh
    storage: Storage
    run: Run
    fence: Fence
    shards: list[ParameterShard]
    engine: Engine
    ema: Ema
    fragments: list[Fragment]
    streams: list[Stream]
    encoders: build.Encoders
    data: str
    notes: tuple[str, ...]
    stage: Stage | None = None


@dataclass(frozen=True)
class Loaded:
    """Where it goes on. resumed: None at the initial weights."""

    progress: Progress
    resumed: Resumed | None
    notes: tuple[str, ...]


def load(opened: Opened, before: Ended | None) -> Loaded:
    """Fill weights, moments and average. A collective. before: how the steps ended that are gone back from."""
    recipe, mesh, fragments = opened.recipe, opened.mesh, opened.fragments
    notes = list(opened.notes if before is None else ())
    near = local_directory(recipe.checkpoint.local, opened.storage) if recipe.checkpoint.local else None
    resumed = resume(opened.storage, fragments, mesh.control, fall_back=recipe.resume.fall_back, near=near)
    if resumed is None:
        for fragment in fragments:
            if fragment.state not in WEIGHTS:
                fragment.flat.zero_()
        build.initialise(fragments, recipe)
        notes += build.take_weights(fragments, recipe, opened.shards, mesh.control)
        opened.ema.restart()
    else:
        notes += resumed.notes
    stored = Progress() if resumed is None else resumed.found.manifest.progress
    check_stage(opened.stage, stored)
    if resumed is not None and not (opened.stage is not None and stored.step == stored.stage_step):
        build.check_same_data(recipe, resumed.found.manifest.origin.data, opened.data)
    if before is None:
        windows = stored_windows(opened.storage, mesh.control)
        windows = stored.skipped if windows is None else windows
    else:
        end = before.progress
        windows = leave_out(end.skipped, stored.step, end.step)
        first, length = replace(stored, skipped=windows).data_step - windows[-1][1], windows[-1][1]
        notes.append(
            f"{end.bad_steps} updates in a row were skipped: back from step {end.step} to step {stored.step}; the data "
            f"of the steps {first} to {first + length - 1} (from 0) are left out"
        )
    progress = went_on(stored, windows)
    if opened.stage is not None and progress.stage > opened.stage.index:
        notes.append(f"{opened.stage} of the run {recipe.run} is done, at step {progress.stage_step}")
    elif opened.stage is None and progress.step >= recipe.train.steps:
        notes.append(f"the run {recipe.run} is finished: {progress.step} of {recipe.train.steps} steps are done")
    opened.engine.refresh(updates=progress.updates)
    build.begin(opened.fence, progress.step, mesh.control, skipped=windows)
    return Loaded(progress, resumed, tuple(notes))


def check_stage(stage: Stage | None, stored: Progress) -> None:
    """Raises RunFailure where the checkpoint isn't of the stage that these ranks were started for."""
    if stage is not None and stored.stage < stage.index:
        raise RunFailure(
            f"{stage} was to go on, but the newest whole checkpoint, of step {stored.step}, is of "
            f"stages[{stored.stage}]: the run is there; start it again without a checkpoint that is damaged"
        )


def went_on(stored: Progress, windows: Windows) -> Progress:
    """A checkpoint's progress with all that is left out. Where the run went back to it, its bad updates are over."""
    back = any(at == stored.step for at, _ in windows)
    return replace(stored, skipped=windows, bad_steps=0 if back else stored.bad_steps)


def stored_windows(storage: Storage, group: Group) -> Windows | None:
    """What the attempt before left out. A collective; raises RunFailure on every rank where it can't be read."""
    found: Windows | None = None
    failure: str | None = None
    if group.index == 0:
        try:
            found = read_skipped(storage)
        except OSError as error:
            failure = str(error)
    if (failure := shared_failure(failure, group)) is not None:
        raise RunFailure(failure)
    return broadcast_object((found,), group)[0]


def build_subject(opened: Opened, resumed: Resumed | None) -> Subject:
    """What the checkpoints of this attempt say of themselves."""
    recipe = opened.recipe
    parents = (recipe.init_from,) if recipe.init_from else ()
    origin = Origin(
        attempt=opened.run.attempt,
        mesh=asdict(opened.mesh.shape),
        engine=recipe.zero.engine,
        zero_stage=recipe.zero.stage,
        precision=recipe.precision.parameters,
        recipe=recipe_hash(recipe),
        data=opened.data,
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parents=parents if resumed is None else (resumed.found.entry.folder,),
    )
    configs = {"model": asdict(recipe.model), "lora": asdict(recipe.lora), "rope": asdict(recipe.rope)}
    return Subject(origin, configs, opened.shards, known=None if resumed is None else resumed.frozen)
