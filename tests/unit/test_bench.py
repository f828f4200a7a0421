"""What `cuboid bench` makes of intervals and numbers, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import write_recipe, write_stages
from typer.testing import CliRunner

from framework import cli_bench
from framework.cli import app
from framework.launch.calibrate import calibrate
from framework.launch.verify import build_variants, stage_file
from framework.programs.bench import Bench, bench_lines, merged, uncovered
from framework.recipe import load_recipe

REPORT = Bench(
    recipe="wan.yaml",
    stage="",
    mesh="dp=4 ring=1 ulysses=2 tp=1",
    ranks=8,
    device="NVIDIA H100",
    torch="2.14",
    parameters=14_000_000_000,
    tokens=149_760.0,
    steps=100,
    seconds=6.25,
    seconds_low=6.2,
    seconds_high=6.3,
    rank_tflops=400.0,
    mfu=0.404,
    exposed=0.5,
    exposed_by="profiler",
    peak_bytes=70e9,
    peak_of="reserved",
    data_wait=0.0,
    hardware="h100",
    predicted=5.0,
    predicted_ratio=0.8,
)


def test_what_covers_hides() -> None:
    """Communication at 0-4, 3-6 and 10-12; kernels at 1-2, 5-11 and 11-11.5: 0-1, 2-5 and 11.5-12 are bare."""
    assert merged([(3, 6), (0, 4), (10, 12)]) == [(0, 6), (10, 12)]
    assert uncovered([(0, 4), (3, 6), (10, 12)], [(11, 11.5), (1, 2), (5, 11)]) == pytest.approx(1 + 3 + 0.5)
    assert uncovered([(0, 1)], []) == 1 and uncovered([], [(0, 1)]) == 0


def test_the_table_and_its_row() -> None:
    lines = bench_lines(REPORT)
    assert "400.000 TFLOP/s a rank, MFU 40.4 %" in lines[2]
    assert "8.0 %, by profiler" in lines[3]
    assert "0.800 of the measured, by h100" in lines[-2]
    cells = [cell.strip() for cell in lines[-1].split("|")]
    assert cells[1:5] == ["`wan.yaml`", "8 x NVIDIA H100", "dp=4 ring=1 ulysses=2 tp=1", "149,760"]
    assert cells[5].startswith("6250.0 ms a step, 400.000 TFLOP/s a rank (MFU 40.4 %), 70.00 GB reserved")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--hardware", "h10"], "did you mean h100"),
    ],
)
def test_what_is_refused_before_a_rank_starts(tmp_path: Path, words: list[str], message: str) -> None:
    recipe = write_recipe(tmp_path, tmp_path / "absent")
    done = CliRunner().invoke(app, ["bench", str(recipe), *words])
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


@pytest.mark.parametrize(
    ("words", "ranks", "stage", "said"),
    [
        ([], 1, "short", "stage short, the first of short, long: --stage takes another\n"),
        (["--json"], 1, "short", ""),
        (["--stage", "short"], 1, "short", ""),
        (["--stage", "long"], 2, "long", ""),
    ],
)
def test_a_stage_is_timed_on_its_own_mesh(
    tmp_path: Path,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    ranks: int,
    stage: str,
    said: str,
) -> None:
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr(cli_bench, "run_local", lambda words, world_size: started.append((words, world_size)) or 0)
    done = CliRunner().invoke(app, ["bench", str(write_stages(tmp_path, tiny_shards)), *words])
    assert (done.exit_code, done.stdout) == (0, said), done.exception
    ((arguments, world_size),) = started
    assert world_size == ranks and arguments[-2:] == ["--stage", stage], "so the ranks don't choose again"


def test_a_report_names_its_stage() -> None:
    lines = bench_lines(replace(REPORT, stage="long"))
    assert lines[0].startswith("wan.yaml, stage long: dp=4") and lines[-1].startswith("| `wan.yaml`, stage long | 8 x")


def test_no_such_stage(tmp_path: Path, tiny_shards: Path) -> None:
    for recipe, message in (
        (write_stages(tmp_path, tiny_shards), "--stage middle: the recipe has no such stage, only short, long"),
        (write_recipe(tmp_path, tiny_shards), "--stage middle: the recipe has no stages: leave it out"),
    ):
        for words in (["bench"], ["verify", "--mesh", "dp=1"]):
            done = CliRunner().invoke(app, [*words, str(recipe), "--stage", "middle"])
            assert isinstance(done.exception, ValueError) and str(done.exception) == message


def test_a_mesh_to_verify_lies_over_the_stages(tmp_path: Path, tiny_shards: Path) -> None:
    """The second stage's ring and its steps are its own, 8 samples in batches of 2; words of a mesh come last."""
    path = write_stages(tmp_path, tiny_shards)
    recipe, words, notes = stage_file(path, ["seed=1"], "long", tmp_path)
    assert (words, notes) == ([], [])
    kept = load_recipe(recipe, [])
    assert (kept.mesh.ring, kept.train.steps, kept.data.global_batch) == (2, 4, 2)
    assert (kept.seed, kept.stages) == (1, [])
    (variant,) = build_variants(recipe, words, ["dp=2"], "float32")
    assert (variant.recipe.mesh.dp, variant.recipe.mesh.ring, variant.world_size) == (2, 1, 2)
    first, words, notes = stage_file(path, [], None, tmp_path)
    assert load_recipe(first, words).mesh.ring == 1
    assert notes == ["stage short, the first of short, long: --stage takes another"]
    plain = write_recipe(tmp_path, tiny_shards)
    assert stage_file(plain, ["seed=1"], None, tmp_path) == (plain, ["seed=1"], [])


@pytest.mark.parametrize("ranks", [1, 3])
def test_links_are_measured_in_pairs(tmp_path: Path, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"calibration with {ranks} ranks: links are measured in pairs, use 2, 4"):
        calibrate(tmp_path / "out.yaml", ranks)
