"""The doctor's findings, and how they're shown."""

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from framework import cli
from framework.launch import doctor
from framework.launch.config import ClusterConfig
from framework.launch.doctor import Finding, check_recipe, doctor_here
from framework.launch.doctor_report import (
    bad_node_lines,
    doctor_cluster,
    findings_of,
    from_json,
    lines_of,
    merge_findings,
    to_json,
)
from framework.launch.nodes import remember


def tool(folder: Path, name: str, text: str) -> None:
    """A command of the system, pretended."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_this_machine_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "visible_gpus", lambda: 0)
    found = {finding.name: finding for finding in doctor_here()}
    assert {"Python", "torch", "deepspeed", "code", "torch's CUDA", "GPUs", "attention", "Slurm"} <= found.keys()
    assert found["attention"].value.endswith("aten, reference")
    assert all(bool(finding.fix) == (finding.status != "ok") for finding in found.values())
    assert all("\n" not in finding.value for finding in found.values())


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool(tmp_path, "nvidia-smi", "echo 570.86; echo 570.86")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "visible_gpus", lambda: 2)
    found = {finding.name: finding for finding in doctor.check_torch()}
    assert found["driver"].value == "570.86"
    assert (found["GPUs"].status, found["GPUs"].value) == ("problem", "2 here, and torch sees none")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    monkeypatch.setattr(doctor, "versions", lambda: {"x": version("no-such-package")})
    assert any(
        finding.value == "no-such-package isn't installed" and finding.status == "problem"
        for finding in doctor.check_python()
    )


def test_slurm_is_found_by_its_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_slurm().value.startswith("none of its tools")
    tool(tmp_path, "sbatch", "echo slurm 24.05.3")
    half = doctor.check_slurm()
    assert (half.status, half.value) == ("warning", "srun, squeue, scontrol not on the PATH")
    for name in doctor.SLURM[1:]:
        tool(tmp_path, name, "true")
    assert doctor.check_slurm() == Finding("Slurm", "24.05.3")
    tool(tmp_path, "sbatch", "exit 1")
    assert "sbatch doesn't work" in doctor.check_slurm().value


def test_a_cache_that_nodes_share_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert {finding.status for finding in doctor.check_caches()} == {"ok"}
    monkeypatch.setattr(doctor, "file_system", lambda place: "nfs4" if place == tmp_path else "ext4")
    first = doctor.check_caches()[0]
    assert (first.name, first.value, first.status) == ("TRITON_CACHE_DIR", f"{tmp_path} (nfs4)", "warning")


def test_a_place_is_found_in_the_mounts() -> None:
    assert doctor.file_system(Path("/proc/self")) == "proc"


def test_a_recipe_is_examined(tiny_recipe: Path, tmp_path: Path) -> None:
    assert [(finding.name, finding.status) for finding in check_recipe(tiny_recipe)] == [
        ("data", "ok"),
        ("checkpoints", "ok"),
        ("start", "ok"),
    ]
    text = tiny_recipe.read_text()
    tiny_recipe.write_text(text.replace("latents", "lost"))
    found = {finding.name: finding for finding in check_recipe(tiny_recipe)}
    assert found["data"].status == found["start"].status == "problem"
    tiny_recipe.write_text("no_such_key: 1\n")
    assert [finding.status for finding in check_recipe(tiny_recipe)] == ["problem"]


def test_the_table_is_aligned_and_says_the_fix() -> None:
    found = [Finding("torch", "2.11"), Finding("a longer name", "0 GB", "problem", "free some")]
    assert lines_of(found) == [
        "ok       torch          2.11",
        "problem  a longer name  0 GB",
        "                        -> free some",
        "",
        "1 problem",
    ]
    assert lines_of(found[:1])[-1] == "all is well"
    assert from_json(to_json(found)) == found


def test_nodes_are_told_by_what_differs() -> None:
    def node(version: str, free: str, *more: Finding) -> list[Finding]:
        return [Finding("torch", version), Finding("disk", free, compared=False), *more]

    full = Finding("/dev/shm", "0.1 GB", "problem", "delete it", compared=False)
    alike = {"a": node("2.11", "5"), "b": node("2.11", "6")}
    assert merge_findings(alike) == ["2 nodes: a, b", "they are all the same, and all is well"]
    assert merge_findings(alike | {"c": node("2.10", "6", full)}) == [
        "3 nodes: a, b, c",
        "differs  torch",
        "           2.10: c",
        "           2.11: a, b",
        "problem  /dev/shm: 0.1 GB (c)",
        "           -> delete it",
    ]
    many = {f"n{number}": node("2.11", "5") for number in range(20)}
    assert merge_findings(many)[0] == "20 nodes: n0, n1, n2, n3, n4, n5, n6, n7 and 12 more"


def test_a_cluster_is_examined_by_what_its_nodes_print(tmp_path: Path) -> None:
    cluster = ClusterConfig("big", nodes_file=str(tmp_path / "nodes.json"), scratch="/local")
    remember(tmp_path / "nodes.json", "node7", "local rank 3: its GPU", 0.0, 72.0)
    seen: list[Sequence[str]] = []

    def run_on_nodes(cluster: ClusterConfig, words: Sequence[str]) -> Mapping[str, str | None]:
        seen.append(words)
        return {"a": "a warning\n" + to_json([Finding("torch", "2.11")]), "b": "Traceback\nImportError: x", "c": None}

    lines, found = doctor_cluster(cluster, run_on_nodes, recipe=Path("r.yaml"), now=3600.0)
    assert seen == [["doctor", "--json", "--scratch", "/local", "--recipe", "r.yaml"]]
    assert found["a"] == [Finding("torch", "2.11")]
    assert "problem  doctor: it said: ImportError: x (b)" in lines
    assert "problem  doctor: it said: nothing (c)" in lines
    assert lines[-1].startswith("  node7  once, last 19") and "left out for 71 h more: local rank 3" in lines[-1]
    assert bad_node_lines(ClusterConfig("x", nodes_file=str(tmp_path / "none")), 0.0)[0].startswith("no bad nodes")
    assert findings_of({"a": "[1]"})["a"][0].status == "problem"


def test_the_verb_exits_with_1_for_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, code in (("ok", 0), ("warning", 0), ("problem", 1)):
        found = [Finding("disk", "full", status, "" if status == "ok" else "free some")]  # type: ignore[arg-type]
        monkeypatch.setattr(doctor, "doctor_here", lambda recipe, scratch, found=found: found)
        result = CliRunner().invoke(cli.app, ["doctor"])
        assert (result.exit_code, result.output.split()[:2]) == (code, [status, "disk"])
        assert json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).output)[0]["value"] == "full"
