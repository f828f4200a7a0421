"""Resume is the uninterrupted run: SIGKILL of all ranks, bit for bit, in every ZeRO stage and precision."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import ranks
from plain_dcp import digests, folder_of
from pool import RanksFailed, run_ranks, run_until_killed
from tiny import write_latents, write_recipe

from framework.checkpoint.find import list_checkpoints
from framework.storage.directory import Directory

# 3 samples for 2 ranks: one slot of every step is empty.
WORDS = ["mesh.dp=2", "data.global_batch=3", "ema.decay=0.9", "optimizer.schedule=cosine", "optimizer.warmup=3"]


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def saved_steps(run: Path) -> list[int]:
    entries, _ = list_checkpoints(Directory(str(run / "checkpoints")))
    return [entry.step for entry in entries]


def resume_after_kill(
    folder: Path, shards: Path, *, words: list[str], steps: int, kill: int, every: int, num_ranks: int = 2
) -> None:
    words = [*WORDS, *words, f"train.steps={steps}", f"checkpoint.every={every}"]
    whole = write_recipe(folder, shards, [*words, f"run={folder / 'whole'}"], name="whole.yaml")
    broken = write_recipe(folder, shards, [*words, f"run={folder / 'broken'}"], name="broken.yaml")
    run_ranks(ranks.train, num_ranks, whole, [])
    exits = run_until_killed(ranks.train, num_ranks, broken, [], ranks.Death(kill))
    assert exits == [-signal.SIGKILL] * num_ranks
    reached = losses(folder / "broken")
    assert kill - 1 <= len(reached) <= kill, "the kill came at the step that was asked for"
    verdicts = run_ranks(ranks.train, num_ranks, broken, [])
    assert [v.step for v in verdicts] == [steps] * num_ranks
    assert losses(folder / "broken") == losses(folder / "whole")
    expected = digests(folder_of(folder / "whole", steps))
    assert {key.split(".")[0] for key in expected} == {"model", "exp_avg", "exp_avg_sq", "ema"}
    assert digests(folder_of(folder / "broken", steps)) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume_is_the_uninterrupted_run(tmp_path: Path, tiny_shards: Path, stage: int, precision: str) -> None:
    words = [f"zero.stage={stage}", f"precision.parameters={precision}"]
    resume_after_kill(tmp_path, tiny_shards, words=words, steps=20, kill=10, every=4)


@pytest.mark.parametrize(
    "words",
    [
        ["mesh.tp=2", "zero.stage=3"],
        ["mesh.ring=2", "zero.engine=fsdp2", "zero.stage=3", "precision.parameters=bfloat16"],
        ["mesh.ulysses=2", "zero.engine=fsdp2", "zero.stage=2", "zero.partition=2", "execution.recompute=all"],
    ],
    ids=" ".join,
)
def test_a_mesh_resumes(tmp_path: Path, tiny_shards: Path, words: list[str]) -> None:
    """Two samples at once, each on two ranks."""
    resume_after_kill(tmp_path, tiny_shards, words=words, steps=8, kill=5, every=2, num_ranks=4)


def test_a_longer_run_resumes(tmp_path: Path, tiny_shards: Path) -> None:
    resume_after_kill(tmp_path, tiny_shards, words=["zero.stage=2"], steps=200, kill=100, every=30)


def test_partitioned_parameters_resume(tmp_path: Path, tiny_shards: Path) -> None:
    """Stage 3 keeps small parameters gathered; here none is, so every one goes through the partitioned path."""
    resume_after_kill(tmp_path, tiny_shards, words=["zero.stage=3", "zero.persistence=0"], steps=8, kill=5, every=2)


@pytest.mark.parametrize(("place", "dying"), [("write", 2), ("commit", 1)])
def test_a_kill_during_a_save(tmp_path: Path, tiny_shards: Path, place: str, dying: int) -> None:
    """All ranks die as they write a checkpoint, or rank 0 as it commits one: the one before counts."""
    words = [*WORDS, "train.steps=8", "checkpoint.every=2"]
    whole = write_recipe(tmp_path, tiny_shards, [*words, f"run={tmp_path / 'whole'}"], name="whole.yaml")
    broken = write_recipe(tmp_path, tiny_shards, [*words, f"run={tmp_path / 'broken'}"], name="broken.yaml")
    run_ranks(ranks.train, 2, whole, [])
    exits = run_until_killed(ranks.train, 2, broken, [], ranks.Death(4, place))
    assert exits.count(-signal.SIGKILL) == dying
    assert saved_steps(tmp_path / "broken") == [2]
    run_ranks(ranks.train, 2, broken, [])
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert digests(folder_of(tmp_path / "broken", 8)) == digests(folder_of(tmp_path / "whole", 8))
    assert saved_steps(tmp_path / "broken") == [4, 6, 8], "the newest three"
    assert len(list((tmp_path / "broken/checkpoints").glob("step-*"))) == 3, "what was never finished is gone"


@pytest.mark.parametrize(("stage", "precision"), [(1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_skipped_updates_resume_and_are_told(tmp_path: Path, stage: int, precision: str) -> None:
    """One clip isn't made of numbers, so every second step is skipped: Adam counts the others only, on every start."""
    shards = write_latents(tmp_path / "poisoned", poisoned=5)
    held_out = write_latents(tmp_path / "held", prefix="held")
    words = ["mesh.dp=2", "train.steps=8", "checkpoint.every=3", "data.global_batch=4"]
    words += [f"zero.stage={stage}", f"precision.parameters={precision}"]
    whole = write_recipe(tmp_path, shards, [*words, f"run={tmp_path / 'whole'}"], name="whole.yaml")
    observed = ["validation.every=2", f"validation.shards=[{held_out}]"]
    broken = write_recipe(tmp_path, shards, [*words, *observed, f"run={tmp_path / 'broken'}"], name="broken.yaml")
    run_ranks(ranks.train, 2, whole, [])
    assert run_until_killed(ranks.train, 2, broken, [], ranks.Death(5)) == [-signal.SIGKILL] * 2
    run_ranks(ranks.train, 2, broken, [])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line.get("skipped")]
    assert len(lines) == 8 and len(skipped) == 4
    assert all(line["uids"] == ["clip5@0"] for line in skipped), "the culprit alone, whichever rank had it"
    good = [line["step"] for line in lines if not line.get("skipped")]
    resumed = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: (line["loss"], line["grad_norm"]) for line in resumed}
    assert all(by_step[line["step"]] == (line["loss"], line["grad_norm"]) for line in lines if line["step"] in good)
    assert digests(folder_of(tmp_path / "broken", 8)) == digests(folder_of(tmp_path / "whole", 8))


def test_too_many_skipped_updates_end_the_run(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "poisoned", poisoned=0, num_samples=1)
    words = ["mesh.dp=2", "train.max_bad_steps=2", "guard.rollbacks=0", "data.global_batch=2"]
    recipe = write_recipe(tmp_path, shards, words)
    with pytest.raises(RanksFailed, match="BadNumbers: up to step 2, 2 updates in a row were skipped"):
        run_ranks(ranks.train, 2, recipe, [])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"], line["uids"]) for line in lines] == [
        (step, True, ["clip0@0"] * 2) for step in (1, 2)
    ]


def test_other_data_are_refused(tmp_path: Path) -> None:
    """The order of samples follows from the files: another one of them would lose and repeat samples, silently."""
    shards = write_latents(tmp_path / "latents")
    recipe = write_recipe(tmp_path, shards, ["train.steps=2", "checkpoint.every=2"])
    run_ranks(ranks.train, 1, recipe, ["optimizer.decay_steps=8"])
    shutil.rmtree(shards)
    write_latents(shards, num_samples=9)
    with pytest.raises(RanksFailed, match=r"the data have changed since the checkpoint.*resume.allow=\[data.streams\]"):
        run_ranks(ranks.train, 1, recipe, ["train.steps=4"])
    run_ranks(ranks.train, 1, recipe, ["train.steps=4", "resume.allow=[data.streams]"])
