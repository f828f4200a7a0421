"""Where a stage ends: after its samples, or on a plateau."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import recipe_tree, write_latents

from framework.checkpoint.manifest import Progress
from framework.data.buckets import streams_of
from framework.data.budget import with_steps
from framework.layers import apply_overrides
from framework.parallel.mesh import lone_mesh
from framework.programs import build
from framework.programs.stage import StageEnd, is_flat, last_step, with_loss
from framework.recipe import Recipe, build_recipe
from framework.shapes import ClipShape
from framework.stages.config import ExitConfig, PlateauConfig
from framework.stages.merge import Stage
from framework.stages.recipes import resolve_run


def tiny(shards: Path) -> Recipe:
    return build_recipe(recipe_tree(shards, Path("run")))


def test_a_stage_ends_with_the_step_that_has_its_samples(tiny_shards: Path) -> None:
    """4 a step: 10 samples are three steps, 8 are two; from the middle on, what is left."""
    recipe = tiny(tiny_shards)
    mesh = lone_mesh()
    schedule = build.build_schedule(recipe, streams_of(recipe), [mesh], stage=1, first=13)
    for samples, steps in ((1, 1), (8, 2), (9, 3), (10, 3), (12, 3), (13, 4)):
        stage = Stage(1, "a", ExitConfig(samples=samples), {})
        begun = Progress(step=10, samples=40, skipped=((4, 3),)).next_stage()
        assert last_step(recipe, stage, begun, schedule) == 10 + steps
        assert schedule.samples(steps) >= samples > schedule.samples(steps - 1)
        later = Progress(
            step=11, samples=44, skipped=((4, 3),), stage=1, stage_step=10, stage_samples=40, stage_data=13
        )
        if steps > 1:
            assert last_step(recipe, stage, later, schedule) == 10 + steps
    assert last_step(recipe, Stage(1, "a", ExitConfig(steps=4), {}), begun, schedule) == 14
    assert last_step(recipe, None, Progress(step=2), schedule) == 4


def test_steps_of_unlike_buckets_are_counted(tiny_shards: Path, tmp_path: Path) -> None:
    """Against adding them up, from wherever the stage is."""
    long = write_latents(tmp_path / "long", clip=ClipShape(17, 64, 64), prefix="long")
    words = [f"data.streams=[{{path: {tiny_shards}}}, {{path: {long}}}]", "data.global_batch=12"]
    words.append("data.buckets=[{frames: 5, height: 16, width: 16}, {frames: 17, height: 64, width: 64}]")
    recipe = build_recipe(apply_overrides(recipe_tree(tiny_shards, Path("run")), words))
    schedule = build.build_schedule(recipe, streams_of(recipe), [lone_mesh()] * 2, stage=2, first=17)
    each = [schedule[17 + step].num_samples for step in range(40)]
    assert len(set(each)) == 2
    begun = Progress(step=14, samples=40, stage=2, stage_step=14, stage_samples=40, stage_data=17, skipped=((4, 3),))
    left_out = replace(begun, skipped=((4, 3), (14, 2)))  # two data steps of the stage, so two others come for them
    for total in range(100, 160, 5):
        stage = Stage(2, "a", ExitConfig(samples=total), {})
        wanted = next(number for number in range(40) if sum(each[:number]) >= total)
        for done in range(wanted):
            now = replace(begun, step=14 + done, samples=40 + sum(each[:done]))
            assert last_step(recipe, stage, now, schedule) == 14 + wanted
        wanted = next(number for number in range(40) if sum(each[2 : 2 + number]) >= total)
        assert last_step(recipe, stage, left_out, schedule) == 14 + wanted
    assert [schedule.samples(done) for done in range(5)] == [sum(each[:done]) for done in range(5)]


def test_the_steps_of_a_stage_of_samples_are_those_of_its_buckets(tiny_shards: Path, tmp_path: Path) -> None:
    """Draws of 44 and 11 samples, four of the small ones to one of the large: 17.6 a step on average, not 11."""
    long = write_latents(tmp_path / "long", clip=ClipShape(17, 64, 64), prefix="long")
    words = [f"data.streams=[{{path: {tiny_shards}}}, {{path: {long}}}]", "data.global_batch=11"]
    words.append("data.buckets=[{frames: 5, height: 16, width: 16}, {frames: 17, height: 64, width: 64}]")
    recipe = build_recipe(apply_overrides(recipe_tree(tiny_shards, Path("run")), words))
    assert with_steps(recipe, ExitConfig(samples=8800)).train.steps == 500
    assert with_steps(recipe, ExitConfig(samples=8801)).train.steps == 501
    assert with_steps(recipe, ExitConfig(steps=4)) == recipe
    schedule = build.build_schedule(recipe, streams_of(recipe), [lone_mesh()] * 2)
    assert schedule.steps_for(8800, 0) == pytest.approx(500, rel=0.1)
    staged = replace(recipe, stages=[{"name": "a", "exit": {"samples": 8800}}])
    assert resolve_run(staged, 0, with_steps).stages[0]["optimizer"] == {"decay_steps": 500}


def test_each_stage_has_an_order_of_its_own(tiny_shards: Path) -> None:
    """Which begins at its first data step, whatever that is; the step by which noise is keyed goes on."""
    recipe = tiny(tiny_shards)
    streams, meshes = streams_of(recipe), [lone_mesh()]
    plain, first, later = (
        build.build_schedule(recipe, streams, meshes, stage=stage, first=at) for stage, at in ((0, 0), (1, 3), (1, 30))
    )
    assert first[3].micro_batches == later[30].micro_batches
    assert (first[3].step, later[30].step) == (3, 30)
    uids = [[slot.uid for step in range(2) for slot in each.slots(step)] for each in (plain, first)]
    assert uids[0] != uids[1] and sorted(uids[0]) == sorted(uids[1]), "one epoch of eight samples, in another order"


PLATEAU = PlateauConfig(evaluations=2, min_improvement=0.1)


@pytest.mark.parametrize(
    ("losses", "flat"),
    [
        ([1.0], False),
        ([1.0, 1.0], False),
        ([1.0, 1.0, 1.0], True),
        ([1.0, 0.91, 0.92], True),
        ([1.0, 0.91, 0.89], False),
        ([1.0, 0.89, 2.0], False),
        ([1.0, 0.5, 1.0, 0.46], True),  # against the best, not the one before
        ([3.0, 0.5, 0.4, 0.37], False),
        ([3.0, 0.5, 0.4, 0.37, 0.5, 0.4], True),
    ],
)
def test_a_plateau(losses: list[float], flat: bool) -> None:
    """And what is kept of the losses is enough to see it."""
    kept: tuple[float, ...] = ()
    for loss in losses:
        kept = with_loss(kept, loss, PLATEAU)
    assert is_flat(kept, PLATEAU) == flat and len(kept) <= 3
    best = [min(losses[:-2]), *losses[-2:]] if len(losses) > 2 else losses
    assert list(kept) == best


@pytest.mark.parametrize(
    ("losses", "flat"),
    [
        ([1.0, math.nan, 1.0], True),
        ([1.0, math.nan, math.nan], True),
        ([1.0, math.nan, 0.5], False),
        ([math.nan, 1.0, 1.0], False),
        ([math.nan, 1.0, 1.0, 1.0], True),
        ([1.0, math.nan, 1.0, 1.0, 1.0], True),
        ([math.nan, math.nan, math.nan], True),
    ],
)
def test_what_is_no_number_is_no_improvement(losses: list[float], flat: bool) -> None:
    """Wherever it stands: min(nan, 1) is nan and min(1, nan) is 1."""
    kept: tuple[float, ...] = ()
    for loss in losses:
        kept = with_loss(kept, loss, PLATEAU)
    assert is_flat(kept, PLATEAU) == flat


def test_only_a_plateau_ends_early() -> None:
    group = lone_mesh().control
    end = StageEnd(Stage(0, "a", ExitConfig(steps=9, plateau=PLATEAU), {}), group)
    progress = Progress(step=3, evaluations=(1.0, 1.0))
    assert not end.is_reached(progress, 9) and end.is_reached(progress, 3)
    assert end.validated(progress, None) == progress
    flat = end.validated(progress, 0.95)
    assert flat.evaluations == (1.0, 1.0, 0.95) and end.is_reached(flat, 9)
    plain = StageEnd(None, group)
    assert plain.validated(progress, 0.95) == progress and plain.hand_over(progress) == progress
    assert not plain.is_reached(flat, 9)
