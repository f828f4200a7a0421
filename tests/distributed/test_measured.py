"""A calibration on two ranks gives a description, and `cuboid bench` with it a report."""

from pathlib import Path

import bench_ranks
import pytest
from pool import run_ranks
from tiny import NUM_SAMPLES, write_latents, write_recipe

from framework.plan.flops import step_flops
from framework.plan.hardware import SCHEMA, load_hardware
from framework.recipe import load_recipe

EVERYTHING = {entry.name for entry in SCHEMA} - {"device.peak.*"}


def test_a_calibration_describes_this_machine_and_a_bench_predicts_by_it(tmp_path: Path) -> None:
    out = tmp_path / "mine" / "here.yaml"
    run_ranks(bench_ranks.measure, 2, out)
    found = load_hardware(str(out))
    assert found.device.kind == "cpu" and found.name == "here"
    assert found.device.attention.keys() == {"aten"} and found.device.peak == {}
    measured = {name for name, source in found.sources.items() if source.startswith("measured on 2")}
    assert {"device.matmul.float32", "device.launch", "network.inside.bandwidth.ring", "network.overlap"} <= measured
    # Nothing of a core's reach is a hundred times off: GEMMs of 1 to 1000 GFLOP/s, messages of 10 MB/s to 100 GB/s.
    assert 1e9 < found.device.matmul["float32"] < 1e12
    assert all(1e7 < rate < 1e11 for rate in found.network.inside.bandwidth.values())
    assert 1e-7 < found.device.launch < 1e-2 and 0 <= found.network.overlap <= 1

    recipe = write_recipe(tmp_path, write_latents(tmp_path / "latents", num_samples=NUM_SAMPLES))
    words = ["mesh.dp=1", "mesh.ulysses=2"]
    report, other = run_ranks(bench_ranks.time_recipe, 2, recipe, words, str(out))
    assert report == other
    assert not (tmp_path / "run").exists()
    assert (report.steps, report.tokens, report.ranks, report.mesh) == (3, 4 * 2, 2, "dp=1 ring=1 ulysses=2 tp=1")
    flops = 4 * step_flops(load_recipe(recipe, words).model, tokens=2, text=16).total
    assert report.rank_tflops == pytest.approx(flops / report.seconds / 2 / 1e12)
    assert report.mfu is None and report.peak_of == "rss" and report.peak_bytes > 1e8
    assert 0 <= report.exposed < report.seconds and report.data_wait >= 0
    assert report.predicted is not None and report.predicted_ratio == report.predicted / report.seconds
