"""Stages in a recipe: what they are laid over, and what may change, in them and in a run that has begun."""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from curriculum import curriculum
from tiny import recipe_tree

from framework.checkpoint.manifest import Progress, progress_of
from framework.checkpoint.stage import check_stages, trained_recipe
from framework.data.budget import with_steps
from framework.layers import apply_overrides
from framework.recipe import Recipe, build_recipe, flatten, load_recipe, sample_bucket, to_yaml
from framework.run import Resolved, Run, resolve_invocation, store_recipe
from framework.stages.recipes import adopt_resolved, resolve_run, stage_recipe, stages_of


def load(*words: str) -> Recipe:
    return build_recipe(apply_overrides(curriculum(Path("videos"), Path("run")), list(words)))


def with_stages(*entries: dict[str, Any], **base: Any) -> Recipe:
    tree = recipe_tree(Path("latents"), Path("run")) | {"train": {}, "stages": list(entries)}
    return build_recipe(tree | base)


def test_a_stage_lies_over_the_recipe_alone() -> None:
    """Not over the stage before: the second one has none of the first one's keys."""
    first = {"name": "a", "exit": {"steps": 3}, "optimizer": {"warmup": 2}, "data": {"micro_batch": 2}}
    recipe = with_stages(first, {"name": "b", "exit": {"steps": 4}, "mesh": {"tp": 2}})
    plain = build_recipe(recipe_tree(Path("latents"), Path("run")))
    a, b = flatten(stage_recipe(recipe, 0)), flatten(stage_recipe(recipe, 1))
    own = flatten(plain)
    assert {key: a[key] for key in a if a[key] != own[key]} == {
        "train.steps": 3,
        "optimizer.warmup": 2,
        "data.micro_batch": 2,
    }
    assert {key: b[key] for key in b if b[key] != own[key]} == {"mesh.tp": 2}  # whose steps are the tiny recipe's, 4
    assert recipe.train.steps == 7


def test_lists_replace_and_names_choose() -> None:
    recipe = load()
    assert [[bucket.name for bucket in stage_recipe(recipe, i).data.buckets] for i in range(4)] == [
        ["1x16x16"],
        ["5x16x16"],
        ["9x16x16@12.0"],
        ["17x16x16"],
    ]
    assert [stage_recipe(recipe, i).train.steps for i in range(4)] == [3, 3, 3, 3], "10 samples are three steps of 4"
    assert [str(stage.exit) for stage in stages_of(recipe)] == ["3 steps", "10 samples", "3 steps", "3 steps"]


def test_the_stored_recipe_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(load()))
    assert load_recipe(path, []) == load()


STAGE = {"name": "a", "exit": {"steps": 3}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [STAGE | {"optimizer": {"lrr": 1}}],
            "stages[0] (a): optimizer.lrr=1: Key 'lrr' not in 'OptimizerConfig'. Did",
        ),
        ([STAGE | {"train": 3}], "stages[0] (a): train=3: Merge error"),
        ([{"name": "a", "exit": {"samples": 3}, "data": {"global_batch": "x"}}], "stages[0] (a): data.global_batch=x"),
        (
            [{"name": "a", "exit": {"samples": 3}, "data": {"global_batch": 0}}],
            "stages[0] (a): data.global_batch=0 must",
        ),
        ([STAGE | {"mesh": {"tp": 3}}], "stages[0] (a): mesh.tp=3 must divide the model's 2 heads"),
        ([STAGE, STAGE], "stages: the name a stands twice"),
        ([{"exit": {"steps": 3}}], "stages[0].name=None must be a short word"),
        ([STAGE | {"name": "Long clips"}], "stages[0].name=Long clips must be a short word"),
        ([{"name": "a"}], "stages[0] (a) has no exit: add exit"),
        ([STAGE | {"exit": {"step": 3}}], "stages[0] (a): exit: step=3: Key 'step' not in 'ExitConfig'. Did you mean"),
        ([STAGE | {"exit": {}}], "stages[0] (a): exit: say steps: N, samples: N, or plateau with steps"),
        ([STAGE | {"exit": {"steps": 0}}], "stages[0] (a): exit: steps=0 must be at least 1"),
        ([STAGE | {"exit": {"steps": 1, "samples": 1}}], "stages[0] (a): exit: samples stands alone"),
        (
            [STAGE | {"exit": {"plateau": {"evaluations": 2}}}],
            "stages[0] (a): exit: a plateau may never come: add steps",
        ),
        (
            [STAGE | {"exit": {"plateau": {}, "steps": 3}}],
            "stages[0] (a): exit: plateau.evaluations=0 must be at least 1",
        ),
        (
            [STAGE | {"exit": {"plateau": {"evaluations": 2}, "steps": 9}}],
            "stages[0] (a): exit: a plateau is one of the validation loss: set validation.every and validation.shards",
        ),
        ([STAGE | {"validation": {"every": 2}}], "stages[0] (a): validation.every=2 but validation.shards is empty"),
        ([STAGE | {"train": {"steps": 3}}], "stages[0] (a): train.steps can't stand in a stage"),
        ([STAGE | {"run": "x"}], "stages[0] (a): run can't stand in a stage"),
        ([STAGE | {"stages": []}], "stages[0] (a): stages can't stand in a stage"),
        ([STAGE, {"name": "b", "exit": {"steps": 1}, "seed": 3}], "stages[1] (b): seed=3 differs from the recipe's 0"),
        ([STAGE | {"model": {"num_layers": 3}}], "stages[0] (a): model.num_layers=3 differs from the recipe's 2"),
        ([STAGE | {"tokenizer": {"dct": {"scale": 2.0}}}], "stages[0] (a): tokenizer.dct.scale=2.0 differs from"),
        ([STAGE | {"text": {"bytes": {"max_length": 9}}}], "stages[0] (a): text.bytes.max_length=9 differs from"),
        ([STAGE | {"checkpoint": {"store": "x"}}], "stages[0] (a): checkpoint.store=x differs from"),
        ([STAGE | {"lora": {"rank": 2}}], "stages[0] (a): lora.rank=2 differs from"),
        ([STAGE | {"train": {"trainable": ["blocks.*"]}}], "stages[0] (a): train.trainable=['blocks.*'] differs from"),
        (
            [STAGE | {"precision": {"parameters": "bfloat16"}}],
            "stages[0] (a): precision.parameters=bfloat16 differs from",
        ),
        ([STAGE | {"ema": {"decay": 0}}], "stages[0] (a): ema.decay=0.0 against the recipe's 0.9999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        with_stages(*entries)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stages=images", "the recipe: stages=images must be a list of stages: stages: [{name: images, exit:"),
        ("stages=null", "the recipe: stages=null must be a list"),
        ("stages={name: a}", "the recipe: stages={'name': 'a'} must be a list"),
        ("stages.1=null", "the recipe: stages.1=null must be a stage's keys: {name: images, exit: {steps: N}}; to"),
        ("stages.0=x", "the recipe: stages.0=x must be a stage's keys"),
        ("stages.0.exit=3", "stages[0] (image): exit=3 must be {steps: N}, {samples: N} or {plateau: {"),
        ("stages.0.exit.plateau=3", "stages[0] (image): exit.plateau=3 must be {evaluations: N, min_improvement: X}"),
    ],
)
def test_what_is_no_stage_is_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        load(word)


def test_a_file_whose_stages_are_none(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: images\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: stages=images must be a list")):
        load_recipe(path, [])


def test_steps_beside_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.steps can't stand beside stages"):
        with_stages(STAGE, train={"steps": 5})


def test_a_plateau_with_validation() -> None:
    leaving = {"plateau": {"evaluations": 2, "min_improvement": 0.01}, "steps": 9}
    recipe = with_stages(STAGE | {"exit": leaving, "validation": {"every": 1, "shards": ["held"]}})
    assert str(stages_of(recipe)[0].exit) == "a plateau, at most 9 steps"
    assert stage_recipe(recipe, 0).train.steps == 9


@pytest.mark.parametrize(("every", "steps", "possible"), [(2, 5, True), (2, 4, False), (9, 9, False)])
def test_a_plateau_that_can_not_come(every: int, steps: int, possible: bool) -> None:
    """In a run whose steps before are odd, validations every 2 are at the stage's steps 1, 3 and 5."""
    leaving = {"plateau": {"evaluations": 2, "min_improvement": 0.01}, "steps": steps}
    stage = STAGE | {"exit": leaving, "validation": {"every": every, "shards": ["held"]}}
    if possible:
        assert stage_recipe(with_stages(stage), 0).train.steps == steps
        return
    message = rf"plateau\.evaluations=2 at validation\.every={every} take more than the {steps} steps of the stage"
    with pytest.raises(ValueError, match=message):
        with_stages(stage)


def test_auto_is_resolved_as_each_stage_begins() -> None:
    """And then stays: a longer stage keeps its schedule, and one that hasn't begun gets its own."""
    recipe = load()
    assert recipe.optimizer.decay_steps == "auto"
    second = resolve_run(recipe, 1, with_steps)
    decays = [stage_recipe(second, i).optimizer.decay_steps for i in range(4)]
    assert decays == [3, 3, "auto", "auto"]
    assert stage_recipe(second, 1).attention.kernel == "aten" and stage_recipe(second, 2).attention.kernel == "auto"
    longer = adopt_resolved(load("stages.0.exit.steps=7", "stages.2.exit.steps=8"), second)
    assert [stage_recipe(resolve_run(longer, 3, with_steps), i).optimizer.decay_steps for i in range(4)] == [3, 3, 8, 3]


# In the second stage: 2 of its 3 steps are done, 8 of its 10 samples.
BEGUN = Progress(step=5, samples=20, stage=1, stage_step=3, stage_samples=12)
AT_ITS_START = Progress(step=3, samples=12, stage=1, stage_step=3, stage_samples=12)


@pytest.fixture(scope="module")
def stored() -> Recipe:
    """Of a run in its second stage."""
    return resolve_run(load(), 1, with_steps)


def change(stored: Recipe, progress: Progress, *words: str) -> None:
    """What a start with these words checks in a run that has come so far."""
    changed = adopt_resolved(load(*words), stored)
    check_stages(Resolved(changed, words, (), stored), progress)


@pytest.mark.parametrize(
    "words",
    [
        ["stages.1.exit.samples=11"],
        ["stages.1.mesh.dp=1", "stages.0.mesh.dp=4"],
        ["stages.2.exit.steps=1", "stages.3={name: other, exit: {steps: 9}}", "stages.2.optimizer={lr: 0.1}"],
        ["stages.1.optimizer.lr=1", "resume.allow=[optimizer.lr]"],
        ["checkpoint.every=9", "log.every=3"],
    ],
    ids=" ".join,
)
def test_what_may_change(stored: Recipe, words: list[str]) -> None:
    change(stored, BEGUN, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stages.0.exit.steps=4"],
            "stages[0] (image) of the run run is done (3 steps): it can't be changed to image, 4 steps",
        ),
        (
            ["stages.0={name: other, exit: {steps: 3}}"],
            "stages[0] (image) of the run run is done (3 steps): it can't be changed to other",
        ),
        (["stages.0.optimizer.lr=1"], "stages[0] (image): optimizer.lr=1.0 differs from 0.001 in the run run"),
        (["stages.1.optimizer.lr=1"], "stages[1] (short): optimizer.lr=1.0 differs from 0.0005 in the run run"),
        (
            ["stages.1={name: other, exit: {steps: 3}}"],
            "stages[1] (short) of the run run has begun: it can't be changed to other",
        ),
        (["stages.1.exit.samples=8"], "stages[1] (short): exit: samples=8, of which 8 are done"),
        (["stages.1.exit={steps: 1, samples: null}"], "stages[1] (short): exit: steps=1, of which 2 are done"),
        (["stages=[{name: image, exit: {steps: 3}}]"], "stages[0] (image): "),
        (["seed=4"], "stages[0] (image): seed=4 differs from 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_may_not(stored: Recipe, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        change(stored, BEGUN, *words)


def test_a_stage_that_has_begun_is_not_left_out(stored: Recipe) -> None:
    shorter = replace(stored, stages=stored.stages[:1])
    with pytest.raises(ValueError, match=r"stages\[1\] \(short\) of the run run has begun: it can't be left out"):
        check_stages(Resolved(shorter, (), (), stored), BEGUN)
    check_stages(Resolved(shorter, (), (), stored), AT_ITS_START)


def test_stages_may_be_added(stored: Recipe) -> None:
    """Given whole on the command line, without what auto stood for."""
    longer = replace(load(), stages=[*load().stages, {"name": "more", "exit": {"steps": 2}}])
    done = replace(BEGUN, stage=4, stage_step=5)
    check_stages(Resolved(adopt_resolved(longer, stored), (), (), stored), done)
    assert stages_of(longer)[4].name == "more"


def test_before_its_first_checkpoint_a_stage_may_change(stored: Recipe) -> None:
    change(stored, AT_ITS_START, "stages.1.optimizer.lr=1", "stages.1.exit={steps: 1, samples: null}")


def test_the_run_keeps_its_stages(tmp_path: Path) -> None:
    """The whole recipe in the run, the stage's own in the attempt; the file that it came from is no difference."""
    tree = curriculum(tmp_path / "videos", tmp_path / "run")
    path = tmp_path / "curriculum.yaml"
    path.write_text(to_yaml(build_recipe(deepcopy(tree))))
    run = Run(tmp_path / "run", 0)
    run.attempt_path.mkdir(parents=True)
    first = resolve_invocation(path, [])
    store_recipe(run, resolve_run(first.recipe, 1, with_steps), (), dp=2, stage=1)
    attempt = load_recipe(run.attempt_path / "recipe.yaml", [])
    assert (attempt.stages, attempt.mesh.dp, attempt.optimizer.lr, attempt.train.steps) == ([], 2, 5e-4, 3)
    again = resolve_invocation(path, [])
    assert again.notes == () and again.stored == load_recipe(run.path / "recipe.yaml", [])
    assert resolve_run(again.recipe, 1, with_steps) == again.stored
    with pytest.raises(ValueError, match="began with stages"):
        resolve_invocation(path, ["stages=[]"])


def test_a_hand_over() -> None:
    """Three data steps were left out: the next stage's own data begin at 0, at data step 13 of the run."""
    before = Progress(step=10, samples=40, tokens=90, updates=9, bad_steps=1, skipped=((4, 3),), norms=(1.0,))
    after = before.next_stage()
    assert after == Progress(
        step=10,
        samples=40,
        tokens=90,
        updates=9,
        skipped=((4, 3),),
        stage=1,
        stage_step=10,
        stage_samples=40,
        stage_data=13,
    )
    assert after.data_step - after.stage_data == 0
    assert progress_of({"step": 3, "evaluations": [1.0, 2.0]}).evaluations == (1.0, 2.0)


@pytest.mark.parametrize(
    ("progress", "clip"),
    [
        (Progress(step=2), "1x16x16"),
        (AT_ITS_START, "1x16x16"),
        (BEGUN, "5x16x16"),
        (Progress(step=12, stage=4, stage_step=12), "17x16x16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_is_of_the_stage_that_it_was_trained_in(stored: Recipe, progress: Progress, clip: str) -> None:
    """At a stage's end, and so of a finished run, that is not the one which goes on from it."""
    assert sample_bucket(trained_recipe(stored, progress)).name == clip


def test_a_checkpoint_of_a_run_without_stages() -> None:
    plain = build_recipe(recipe_tree(Path("latents"), Path("run")))
    assert trained_recipe(plain, Progress(step=3)) == plain
