"""The bench of effective training time: its model against numbers by hand, drawn failures and a run's account."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from histories import DIED, LAUNCHED, RESTARTED, RUNS, write_run

from framework.recipe import load_recipe, to_yaml

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "tools/bench/goodput.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_effective_time", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_times_to_a_failure(bench: ModuleType) -> None:
    """The published ones; half way between 8 and 1,024 GPUs, on logarithms, their geometric mean; one point alone."""
    assert [bench.mttf(gpus) / 3600 for gpus in (8, 1024, 16384)] == pytest.approx([47.7 * 24, 7.9, 1.8])
    middle = round(math.sqrt(8 * 1024))
    assert bench.mttf(middle) / 3600 == pytest.approx(math.sqrt(47.7 * 24 * 7.9), rel=0.01)
    assert bench.mttf(512, ((1024, 3.0),)) == 6 * 3600


@pytest.mark.parametrize(
    ("stall", "restart", "interval", "percent"),
    [(0.5, 60, 104, 98.5), (0.5, 180, 104, 97.4), (0.5, 600, 104, 93.5), (30, 180, 805, 90.9)],
)
def test_the_model_at_an_mttf_of_three_hours(
    bench: ModuleType, stall: float, restart: float, interval: float, percent: float
) -> None:
    """Worked out by others from 1 - s / tau - (tau / 2 + R) / M, which is right to the order of a part in a hundred."""
    times, m = bench.Times(stall, write=0.0, detect=0.0, restart=restart), 3 * 3600.0
    tau = bench.best_interval(times, m)
    assert tau == pytest.approx(interval, abs=0.5)
    first_order = 1 - stall / tau - (tau / 2 + restart) / m
    assert bench.effective(times, m, tau) == pytest.approx(first_order, abs=0.007)
    assert 100 * bench.effective(times, m, tau) == pytest.approx(percent, abs=1.0)


def test_the_interval_is_a_good_one(bench: ModuleType) -> None:
    """Half and twice of it are worse; one shorter than a save takes isn't taken."""
    times, m = bench.Times(write=0.0), 4 * 3600.0
    tau = bench.best_interval(times, m)
    found = [bench.effective(times, m, tau * factor) for factor in (0.5, 1, 2)]
    assert max(found) == found[1]
    assert bench.best_interval(bench.Times(stall=0.001, write=45.0), m) == 45


def test_drawn_failures_agree_and_a_wrong_formula_does_not(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves that take long to commit, failures that are seen late, and a restart in which the next one comes."""
    times = bench.Times(stall=20.0, write=300.0, detect=120.0, restart=900.0)
    (line,) = bench.check(times, [16384], bench.PUBLISHED, 4000)
    assert "16384 GPUs: formula 7" in line
    for part in ("write", "detect", "restart", "stall"):
        right = bench.effective
        monkeypatch.setattr(
            bench, "effective", lambda t, m, tau, p=part, f=right: f(bench.replace(t, **{p: 0.0}), m, tau)
        )
        with pytest.raises(ValueError, match="4000 drawn failures differ"):
            bench.check(times, [16384], bench.PUBLISHED, 4000)
        monkeypatch.undo()


def test_the_times_of_a_run(bench: ModuleType, tmp_path: Path) -> None:
    """One save that stalled for 10 s in 131 steps; a restart whose failure was seen after 34 s."""
    run = write_run(tmp_path / "run", [*LAUNCHED, *RESTARTED], [DIED, RUNS])
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", ["checkpoint.every=100"])
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    times, account, lines = bench.measured(run, 1621.0)
    assert (times.stall, times.detect) == (10, 34)
    assert times.restart == pytest.approx(10 + 1 + 25 + 12 - 62 / 30)
    assert lines[0].endswith("131 steps, about 1 saves, 1 restarts") and account.wall == 621


def test_the_command(tmp_path: Path) -> None:
    words = ["--restart", "45", "--failures", "300", "--png", str(tmp_path / "a.png"), "--csv", str(tmp_path / "a.csv")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCH), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "restart=45.0) (assumed, restart as given)" in done.stdout and "arXiv 2410.21680" in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 5000
    rows = (tmp_path / "a.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 + 7 and rows[0].startswith("over,seconds,8_gpus,")
    wrong = subprocess.run([*command, "--mttf", "12"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 1 and wrong.stderr == "error: --mttf 12: give GPUS=HOURS, as in 1024=7.9\n"
