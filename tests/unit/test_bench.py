"""What `cuboid bench` makes of intervals and numbers, and what it refuses."""

from pathlib import Path

import pytest
from tiny import write_recipe
from typer.testing import CliRunner

from framework.cli import app
from framework.launch.calibrate import calibrate
from framework.programs.bench import Bench, bench_lines, merged, uncovered

REPORT = Bench(
    recipe="wan.yaml",
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


@pytest.mark.parametrize("ranks", [1, 3])
def test_links_are_measured_in_pairs(tmp_path: Path, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"calibration with {ranks} ranks: links are measured in pairs, use 2, 4"):
        calibrate(tmp_path / "out.yaml", ranks)
