"""The run directory: one winner an attempt, whole files, and what may change on resume."""

import json
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from tiny import write_recipe

from framework import run as run_module
from framework.checkpoint.fence import claim
from framework.recipe import Recipe, load_recipe, resolve_auto
from framework.run import (
    Resolved,
    Run,
    Verdict,
    check_changes,
    is_run,
    latest_attempt,
    open_attempt,
    recipe_of_run,
    resolve_invocation,
    store_recipe,
    write_atomically,
)
from framework.storage.directory import Directory


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """The tiny recipe; nobody opens its shards here."""
    return write_recipe(tmp_path, tmp_path / "latents")


def start(recipe_path: Path, overrides: list[str]) -> Resolved:
    """What an attempt does before the first weight: resolve, claim, store."""
    invocation = resolve_invocation(recipe_path, overrides)
    recipe = resolve_auto(invocation.recipe)
    path = Path(recipe.run)
    number = latest_attempt(path) + 1
    assert open_attempt(path, number)
    store_recipe(Run(path, number), recipe, invocation.overrides, dp=1)
    return invocation


def claim_many(path: Path, barrier: Barrier, claimed: Path) -> None:
    barrier.wait()
    numbers = [claim(Directory(str(path / "checkpoints")), first=0).attempt for _ in range(5)]
    (claimed / str(os.getpid())).write_text(json.dumps(numbers))


def test_an_attempt_is_claimed_by_one_process_only(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, claimed = context.Barrier(8), tmp_path / "claimed"
    claimed.mkdir()
    processes = [context.Process(target=claim_many, args=(tmp_path / "run", barrier, claimed)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    numbers = sorted(number for file in claimed.iterdir() for number in json.loads(file.read_text()))
    assert numbers == list(range(40))


def test_an_attempt_has_a_directory(tmp_path: Path) -> None:
    assert latest_attempt(tmp_path) == -1
    assert open_attempt(tmp_path, 0) and open_attempt(tmp_path, 1) and not open_attempt(tmp_path, 1)
    second = Run(tmp_path, 1)
    assert second.attempt_path == tmp_path / "attempts" / "0001" and (second.attempt_path / "logs").is_dir()
    second.write_verdict(Verdict("stopped", 7, 15))
    assert json.loads((second.attempt_path / "verdict.json").read_text()) == {
        "outcome": "stopped",
        "step": 7,
        "signal": 15,
    }


def test_attempts_are_counted_as_numbers(tmp_path: Path) -> None:
    """After 9999 names grow longer; what isn't a number is no attempt."""
    for name in ("9999", "10000", "notes"):
        (tmp_path / "attempts" / name).mkdir(parents=True)
    assert latest_attempt(tmp_path) == 10000


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "old"
    monkeypatch.undo()
    write_atomically(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "new"


def test_a_write_is_renamed_when_its_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "file", []
    monkeypatch.setattr(run_module.os, "fsync", lambda _: seen.append((file.exists(), len(list(tmp_path.iterdir())))))
    write_atomically(file, "x" * 100_000)
    assert seen == [(False, 1)]
    (partial,) = tmp_path.iterdir()
    assert partial == file and file.stat().st_size == 100_000


@pytest.fixture
def stored(recipe_path: Path) -> Recipe:
    return resolve_auto(load_recipe(recipe_path, []))


@pytest.mark.parametrize(
    "word",
    [
        "mesh.dp=4",
        "zero.stage=3",
        "zero.bucket_size=5",
        "attention.kernel=reference",
        "data.micro_batch=2",
        "data.prefetch=1",
        "data.buckets.0.ulysses=2",
        "execution.recompute=all",
        "train.steps=100",
        "train.deterministic=true",
        "checkpoint.every=1",
        "validation.sigmas=4",
        "sampler.guidance=5",
        "samples.seed=5",
        "log.every=3",
        "run=elsewhere",
    ],
)
def test_free_keys_may_change(recipe_path: Path, stored: Recipe, word: str) -> None:
    changed = load_recipe(recipe_path, ["optimizer.decay_steps=4", "attention.kernel=aten", word])
    assert changed != stored
    check_changes(stored, changed)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("seed=1", "seed"),
        ("model.num_layers=3", "model.num_layers"),
        ("data.global_batch=8", "data.global_batch"),
        ("data.window=9", "data.window"),
        ("data.streams.0.weight=2", "data.streams"),
        ("data.buckets.0.fps=24", "data.buckets"),
        ("optimizer.lr=2e-3", "optimizer.lr"),
        ("optimizer.decay_steps=5", "optimizer.decay_steps"),
        ("ema.decay=0.5", "ema.decay"),
        ("flow.range=[0, 0.5]", "flow.range"),
        ("flow.shift.fixed.value=3", "flow.shift.fixed.value"),
        ("loss.weight=per_token", "loss.weight"),
        ("text.dropout=0.2", "text.dropout"),
        ("precision.parameters=bfloat16", "precision.parameters"),
        ("train.trainable=['*norm*']", "train.trainable"),
        ("lora.rank=4", "lora.rank"),
        ("rope.time=ntk", "rope.time"),
        ("tokenizer.dct.scale=2", "tokenizer.dct.scale"),
        ("flow.timesteps.per_frame=true", "flow.timesteps.per_frame"),
    ],
)
def test_keys_of_the_result_are_refused_by_name_unless_allowed(
    recipe_path: Path, stored: Recipe, word: str, key: str
) -> None:
    words = ["optimizer.decay_steps=4", "attention.kernel=aten", word]
    with pytest.raises(ValueError, match=rf"^{key}=.* differs from .*resume.allow=\[{key}\]"):
        check_changes(stored, load_recipe(recipe_path, words))
    check_changes(stored, load_recipe(recipe_path, [*words, f"resume.allow=[{key}]"]))
    with pytest.raises(ValueError, match=f"^{key}="):
        check_changes(stored, load_recipe(recipe_path, [*words, "resume.allow=[other]"]))


def test_the_pattern_is_bound_though_the_kernel_is_free(recipe_path: Path, stored: Recipe) -> None:
    words = ["optimizer.decay_steps=4", "attention.kernel=reference", "attention.pattern.name=block_causal"]
    with pytest.raises(ValueError, match=r"^attention.pattern.block_causal.frames=1 differs from None"):
        check_changes(stored, load_recipe(recipe_path, words))
    check_changes(stored, load_recipe(recipe_path, [*words, "resume.allow=[attention.pattern.*]"]))


def test_every_leaf_is_free_or_refused_on_purpose(stored: Recipe) -> None:
    """A new section of the recipe has to be put on one side: it shows here."""
    free = {pattern.split(".")[0] for pattern in run_module.FREE}
    refused = {
        "init_from",
        "init_weights",
        "seed",
        "precision",
        "model",
        "lora",
        "rope",
        "tokenizer",
        "text",
        "data",
        "flow",
        "loss",
        "optimizer",
        "ema",
        "stages",
    }
    assert free | refused == set(stored.__dataclass_fields__) and free & refused == {"data"}


def test_steps_may_only_grow(stored: Recipe) -> None:
    check_changes(stored, replace(stored, train=replace(stored.train, steps=5)))
    with pytest.raises(ValueError, match=r"train.steps=3 is below the run's 4"):
        check_changes(stored, replace(stored, train=replace(stored.train, steps=3)))


def test_a_new_run_takes_the_file_under_the_overrides(recipe_path: Path, tmp_path: Path) -> None:
    resolved = resolve_invocation(recipe_path, ["seed=3"])
    assert (resolved.recipe.seed, resolved.overrides, resolved.notes) == (3, ("seed=3",), ())
    assert not (tmp_path / "run").exists(), "resolving creates nothing"
    with pytest.raises(ValueError, match=r"names no run directory: add run=DIR"):
        resolve_invocation(recipe_path, ["run=''"])


def test_a_stored_run_is_the_base_of_its_next_attempts(recipe_path: Path, tmp_path: Path) -> None:
    start(recipe_path, ["seed=3", "train.steps=6"])
    assert is_run(tmp_path / "run") and not is_run(tmp_path)
    write_recipe(tmp_path, tmp_path / "latents", ["model.num_layers=5", "seed=9"])
    resolved = start(recipe_path, ["log.every=2"])
    assert (resolved.recipe.seed, resolved.recipe.model.num_layers) == (3, 2)
    assert (resolved.recipe.train.steps, resolved.recipe.log.every) == (6, 2)
    assert resolved.recipe.optimizer.decay_steps == 6, "auto is what the first attempt made of it"
    assert "-  num_layers: 2" in resolved.notes and "+  num_layers: 5" in resolved.notes
    assert resolve_invocation(recipe_path, ["train.steps=60"]).recipe.optimizer.decay_steps == 6
    assert recipe_of_run(tmp_path / "run").log.every == 2, "each attempt stores what it runs"
    assert load_recipe(tmp_path / "run" / "attempts" / "0000" / "recipe.yaml", []).log.every == 10
    with pytest.raises(ValueError, match=r"model.num_layers=5 differs from 2"):
        resolve_invocation(recipe_path, ["model.num_layers=5"])
    with pytest.raises(ValueError, match=r"no run directory: it has no recipe.yaml"):
        recipe_of_run(tmp_path)


def test_another_pattern_is_a_difference_though_the_kernel_is_auto(recipe_path: Path, tmp_path: Path) -> None:
    start(recipe_path, [])
    write_recipe(tmp_path, tmp_path / "latents", ["attention.pattern.name=block_causal"])
    resolved = start(recipe_path, [])
    assert "+    name: block_causal" in resolved.notes and resolved.recipe.attention.pattern.name == "full"
    assert not any("kernel" in note for note in resolved.notes)


def test_the_same_file_gives_no_note(recipe_path: Path) -> None:
    start(recipe_path, ["seed=3"])
    assert start(recipe_path, []).notes == ()


def test_what_overrides_changed_is_no_difference_of_the_file(recipe_path: Path) -> None:
    start(recipe_path, ["attention.kernel=aten"])
    assert start(recipe_path, ["train.steps=9"]).notes == ()
    assert start(recipe_path, []).notes == ()


def test_leave_to_change_a_key_is_given_once(recipe_path: Path) -> None:
    start(recipe_path, [])
    assert start(recipe_path, ["seed=1", "resume.allow=[seed]"]).recipe.seed == 1
    with pytest.raises(ValueError, match="seed=2"):
        resolve_invocation(recipe_path, ["seed=2"])


def test_the_lineage_is_the_first_start_and_the_words_of_all(recipe_path: Path, tmp_path: Path) -> None:
    start(recipe_path, ["seed=3"])
    first = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert first["overrides"] == ["seed=3"] and {"cuboid", "torch", "deepspeed"} <= first["versions"].keys()
    start(recipe_path, ["log.every=1"])
    second = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert second == first | {"overrides": ["seed=3", "log.every=1"]}
