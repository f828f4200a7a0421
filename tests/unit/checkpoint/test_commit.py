"""A checkpoint is valid with its manifest and every file at its size, and never otherwise."""

import json
from pathlib import Path

import pytest
from framework.checkpoint.commit import (
    MANIFEST,
    Progress,
    commit,
    finished_steps,
    newest_checkpoint,
    newest_of_run,
    read_manifest,
    valid_checkpoints,
)

from framework.parallel.config import MeshShape

MESH = MeshShape(dp=2, ring=1, ulysses=1, tp=1)
DEGREES = {"dp": 2, "ring": 1, "ulysses": 1, "tp": 1}


def write(folder: Path, step: int, *, committed: bool = True) -> Path:
    path = folder / f"step-{step:08}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"x" * 100)
    (path / ".metadata").write_bytes(b"y" * 10)
    if committed:
        commit(path, progress=Progress(step=step, samples=4 * step), mesh=DEGREES, zero_stage=2, attempt=0)
    return path


def test_a_committed_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    manifest = read_manifest(path)
    assert manifest is not None and manifest.progress == Progress(step=7, samples=28)
    assert manifest.files == {"__0_0.distcp": 100, ".metadata": 10}
    assert sorted(p.name for p in path.iterdir()) == [".metadata", "__0_0.distcp", MANIFEST]


def test_without_manifest_it_is_none(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, 1, committed=False)) is None
    assert read_manifest(tmp_path / "absent") is None


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_cut_or_missing_file_makes_it_invalid(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 1)
    (path / name).write_bytes(b"x" * 9)
    assert read_manifest(path) is None
    (path / name).unlink()
    assert read_manifest(path) is None


def test_a_cut_manifest_makes_it_invalid(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    text = (path / MANIFEST).read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        (path / MANIFEST).write_text(text[:length])
        assert read_manifest(path) is None


def test_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    fields = json.loads((path / MANIFEST).read_text()) | {"format": "cuboid.checkpoint/2"}
    (path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"cuboid\.checkpoint/2"):
        read_manifest(path)


def test_the_newest_valid_one_counts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 10, 4):
        write(folder, step)
    write(folder, 12, committed=False)
    assert [found.manifest.progress.step for found in valid_checkpoints(folder)] == [2, 4, 10]
    assert finished_steps(folder) == 10
    assert newest_of_run(tmp_path).path.name == "step-00000010"
    assert finished_steps(tmp_path / "absent") == 0
    with pytest.raises(ValueError, match="no checkpoint yet"):
        newest_of_run(tmp_path / "absent")


def test_another_mesh_or_stage_is_refused_with_the_fix(tmp_path: Path) -> None:
    write(tmp_path, 3)
    assert newest_checkpoint(tmp_path, MESH, 2) is not None
    with pytest.raises(ValueError, match=r"isn't there yet; resume with zero\.stage=2$"):
        newest_checkpoint(tmp_path, MESH, 3)
    with pytest.raises(ValueError, match=r"isn't there yet; resume with mesh\.dp=2$"):
        newest_checkpoint(tmp_path, MeshShape(dp=4, ring=1, ulysses=1, tp=1), 2)
