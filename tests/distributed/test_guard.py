"""Bad updates: skipped bit for bit, gone back from, and tensor-parallel replicas that differ are found."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import guard_ranks
import pytest
import ranks
from plain_dcp import digests, folder_of
from pool import RanksFailed, run_ranks, run_until_killed
from tiny import write_latents, write_recipe

from framework.data.buckets import streams_of
from framework.parallel.mesh import lone_mesh
from framework.programs import build
from framework.recipe import load_recipe

ENGINES = [
    ["mesh.dp=2", "zero.stage=1"],
    ["mesh.dp=2", "zero.stage=1", "precision.parameters=bfloat16"],
    ["mesh.dp=2", "zero.stage=2", "precision.parameters=bfloat16"],
    ["mesh.dp=2", "zero.stage=2", "zero.offload=optimizer"],
    ["mesh.dp=2", "zero.stage=3"],
    ["mesh.dp=2", "zero.stage=3", "zero.offload=optimizer", "zero.persistence=0"],
    ["mesh.dp=2", "zero.engine=fsdp2", "zero.stage=2"],
    ["mesh.tp=2", "zero.stage=1", "precision.parameters=bfloat16"],
    ["mesh.tp=2", "zero.stage=2"],
    ["mesh.tp=2", "zero.stage=3", "precision.parameters=bfloat16"],
    ["mesh.tp=2", "zero.engine=fsdp2", "zero.stage=3"],
]


def test_a_spike_leaves_no_trace(tmp_path: Path, tiny_shards: Path) -> None:
    """Good, bad, good: weights, moments and Adam's count are those of a run that never saw the bad one, bit for bit."""
    recipe = write_recipe(tmp_path, tiny_shards, ["data.micro_batch=1", "optimizer.clip=0.5"])
    for rank in run_ranks(guard_ranks.judge, 2, recipe, ENGINES, [0.0, 1e6]):
        for words, (never, spike) in zip(ENGINES, rank, strict=True):
            assert never.skipped == [] and spike.skipped == [1], words
            assert spike.touched == [], words
            assert spike.held == never.held, words
            assert [spike.norms[0], spike.norms[2]] == never.norms, words
            assert 1e4 * spike.norms[0] < spike.norms[1] < math.inf, "the norm itself is told"


# 32 samples, two a step: the first 16 steps meet each once.
WORDS = ["data.global_batch=2", "train.steps=9", "ema.decay=0.9", "optimizer.schedule=cosine", "optimizer.warmup=3"]


def numbers_of(folder: Path, step: int) -> list[int]:
    """The samples of a step."""
    clean = folder / "clean"
    if not clean.exists():
        write_latents(clean, num_samples=32)
    recipe = load_recipe(write_recipe(folder, clean, WORDS, name="clean.yaml"), [])
    slots = build.build_schedule(recipe, streams_of(recipe), [lone_mesh()]).slots(step)
    return [int(slot.uid.removeprefix("clip").removesuffix("@0")) for slot in slots]


def poisoned(folder: Path, steps: list[int]) -> Path:
    """Shards in which one sample of each of some steps isn't made of numbers."""
    return write_latents(folder / "latents", num_samples=32, poisoned=[numbers_of(folder, step)[0] for step in steps])


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "data_step")
    return [tuple(line.get(name) for name in names) for line in lines_of(run)]


def give_windows(run: Path, windows: list[list[int]]) -> None:
    """Let an attempt have been at the run that began at the initial weights and leaves these windows out."""
    fence = run / "checkpoints" / "fence"
    fence.mkdir(parents=True)
    (fence / "0000.json").write_text("{}")
    (fence / "0000-start.json").write_text(json.dumps({"step": 0, "skipped": windows}))


@pytest.mark.parametrize(
    ("words", "every"),
    [(["mesh.dp=2", "zero.stage=1", "precision.parameters=bfloat16"], 3), (["mesh.tp=2", "zero.stage=3"], 100)],
    ids=["stage 1, from a checkpoint", "tp, stage 3, from the initial weights"],
)
def test_bad_updates_in_a_row_go_back_and_pass_over_the_data(tmp_path: Path, words: list[str], every: int) -> None:
    """Two bad steps after the fourth: what follows is a run that was told to leave the data out, bit for bit; also when
    it is killed right after it went back.
    """
    shards = poisoned(tmp_path, [4, 5])
    words = [*WORDS, *words, "train.max_bad_steps=2", f"checkpoint.every={every}"]
    recipes = {
        name: write_recipe(tmp_path, shards, [*words, f"run={tmp_path / name}"], name=f"{name}.yaml")
        for name in ("told", "back", "killed")
    }
    start = 3 if every == 3 else 0
    give_windows(tmp_path / "told", [[start, 6 - start]])
    for name in ("told", "back"):
        assert [verdict.step for verdict in run_ranks(ranks.train, 2, recipes[name], [])] == [9, 9]
    lines = numbers(tmp_path / "back")
    assert lines == numbers(tmp_path / "told")
    assert [line[0] for line in lines] == list(range(1, 10))
    third = [1e-3 / 3, 2e-3 / 3, 1e-3]
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * part / 6)) for part in range(6)]
    assert [line[3] for line in lines] == pytest.approx(third + cosine), "the rate follows the step"
    assert [line[6] for line in lines[start:]] == list(range(6, 15 - start)), "the data from step 6 on"
    assert not any(line.get("skipped") for line in lines_of(tmp_path / "back"))
    expected = digests(folder_of(tmp_path / "told", 9))
    assert digests(folder_of(tmp_path / "back", 9)) == expected
    manifest = json.loads((folder_of(tmp_path / "back", 9) / "manifest.json").read_text())
    assert manifest["progress"]["skipped"] == [[start, 6 - start]]

    # Data step 6 is taken after going back alone, and there is no new checkpoint by then.
    assert run_until_killed(ranks.train, 2, recipes["killed"], [], ranks.Death(6)) == [-signal.SIGKILL] * 2
    # Nor does the next attempt take the bad data of step 4 once more.
    run_ranks(ranks.train, 2, recipes["killed"], [], ranks.Death(4))
    assert numbers(tmp_path / "killed") == lines
    assert digests(folder_of(tmp_path / "killed", 9)) == expected


def test_a_run_goes_back_so_often_only(tmp_path: Path) -> None:
    """Every step is bad: back to the initial weights, and the second time it stops and says so."""
    shards = write_latents(tmp_path / "latents", poisoned=range(8))
    recipe = write_recipe(tmp_path, shards, ["mesh.dp=2", "train.max_bad_steps=2", "guard.rollbacks=1"])
    told = r"BadNumbers: up to step 2, 2 updates in a row.*gone back to the initial weights 1 times"
    with pytest.raises(RanksFailed, match=told):
        run_ranks(ranks.train, 2, recipe, ["train.steps=9"])
    assert [(line["step"], line["data_step"], line["why"]) for line in lines_of(tmp_path / "run")] == [
        (1, 2, "not finite"),
        (2, 3, "not finite"),
    ]
    with pytest.raises(RanksFailed, match=told):  # a start doesn't count anew
        run_ranks(ranks.train, 2, recipe, ["train.steps=9"])


def test_a_spike_is_skipped_and_a_resumed_run_judges_alike(tmp_path: Path) -> None:
    """The limit needs the norms of three steps; the attempt that meets the spike has done one of them."""
    loud = numbers_of(tmp_path, 5)
    shards = write_latents(tmp_path / "latents", num_samples=32, loud=loud[:1])
    words = [*WORDS, "mesh.dp=2", "guard.spike=20", "guard.window=3", "checkpoint.every=4"]
    whole = write_recipe(tmp_path, shards, [*words, f"run={tmp_path / 'whole'}"], name="whole.yaml")
    broken = write_recipe(tmp_path, shards, [*words, f"run={tmp_path / 'broken'}"], name="broken.yaml")
    run_ranks(ranks.train, 2, whole, [])
    (skipped,) = [line for line in lines_of(tmp_path / "whole") if line.get("skipped")]
    assert (skipped["step"], skipped["why"]) == (6, "spike")
    assert skipped["uids"] == sorted(f"clip{number}@0" for number in loud), "every sample of the step"
    manifest = json.loads((folder_of(tmp_path / "whole", 9) / "manifest.json").read_text())
    norms = [line["grad_norm"] for line in lines_of(tmp_path / "whole") if not line.get("skipped")]
    assert manifest["progress"]["norms"] == norms[-3:]
    assert skipped["grad_norm"] > 20 * sorted(norms[2:5])[1]
    assert run_until_killed(ranks.train, 2, broken, [], ranks.Death(5)) == [-signal.SIGKILL] * 2
    run_ranks(ranks.train, 2, broken, [])
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    assert digests(folder_of(tmp_path / "broken", 9)) == digests(folder_of(tmp_path / "whole", 9))


def test_replicas_that_differ_are_found(tmp_path: Path, tiny_shards: Path) -> None:
    """One bit of a weight on one of three tensor-parallel ranks, in the third step."""
    words = ["mesh.tp=3", "model.num_attention_heads=3", "guard.hash_every=2", "train.steps=6", "zero.stage=2"]
    recipe = write_recipe(tmp_path, tiny_shards, words)
    told = r"after step 4.*: blocks.1.scale_shift_table on rank 1\. "
    with pytest.raises(RanksFailed, match=told):
        run_ranks(guard_ranks.train_with_a_flip, 3, recipe, [], 2, 1)
    recipe = write_recipe(tmp_path, tiny_shards, [*words, f"run={tmp_path / 'clean'}"])
    assert [verdict.step for verdict in run_ranks(ranks.train, 3, recipe, [])] == [6] * 3
