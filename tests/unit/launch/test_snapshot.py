"""A job's copy of the code: what is in it, that it is used, and which commit it says it is."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from syntax import REPOSITORY

from framework.launch import snapshot as snapshot_module
from framework.launch.snapshot import content_hash, package_files, take_snapshot
from framework.run import git_commit

PACKAGE = REPOSITORY / "framework"


def run_with(snapshot: Path, *words: str, cwd: Path) -> str:
    """Python under a snapshot, in some directory, without what the tests set."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(snapshot), "PYTHONSAFEPATH": "1"}  # as the job script sets them
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=True).stdout


def test_every_file_is_copied_but_caches(tmp_path: Path) -> None:
    folder = take_snapshot(tmp_path)
    copied = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    tracked = {
        str(path.relative_to(REPOSITORY)) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml", ".json")
    }
    assert copied.keys() - {"commit"} >= tracked and len(tracked) > 150
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in copied)
    for name in tracked:
        assert copied[name].read_bytes() == (REPOSITORY / name).read_bytes()
    assert folder.parent == tmp_path and [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert folder.name.startswith("code-") and len(folder.name) == len("code-") + 12
    assert copied["framework/run.py"].stat().st_mode & 0o222 == 0


def test_it_wins_over_the_installed_package_and_the_working_directory(tmp_path: Path) -> None:
    """In a checkout, where `python -m` would find framework/ first."""
    folder = take_snapshot(tmp_path / "jobs")
    code = (
        "import framework, framework.run as run, framework.cli as cli\n"
        "print(*framework.__path__, run.__file__, cli.__file__, run.git_commit())"
    )
    package, run, cli, commit = run_with(folder, "-c", code, cwd=REPOSITORY).split()
    assert Path(package) == folder / "framework" and commit == str(git_commit())
    assert [Path(run).parent, Path(cli).parent] == [folder / "framework"] * 2


def test_the_command_runs_from_it(tmp_path: Path) -> None:
    """With the copy's own text changed, so that it can be no other that answers."""
    folder = take_snapshot(tmp_path)
    cli = folder / "framework" / "cli.py"
    cli.chmod(0o644)
    cli.write_text(cli.read_text().replace("Train video diffusion transformers", "Copied: train"))
    assert "Copied: train" in run_with(folder, "-m", "framework.cli", "--help", cwd=REPOSITORY)


def fail_to_write(path: Path, content: bytes) -> None:
    raise OSError("no space left")


def test_the_same_code_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take_snapshot(tmp_path)
    monkeypatch.delattr(snapshot_module, "write_read_only")
    assert take_snapshot(tmp_path) == first


def test_many_at_once_make_one(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(take_snapshot(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and [path.name for path in tmp_path.iterdir()] == [found[0].name]


def test_other_code_and_another_commit_are_other_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take_snapshot(tmp_path)
    monkeypatch.setattr(snapshot_module, "git_commit", lambda: "0123abcd+")
    other = take_snapshot(tmp_path)
    assert other != first and (other / "commit").read_text() == "0123abcd+"
    monkeypatch.setattr(snapshot_module, "git_commit", lambda: None)
    assert (take_snapshot(tmp_path) / "commit").read_text() == ""
    assert len({content_hash(*made) for made in (({"a": b"b"}, ""), ({"a": b"c"}, ""), ({"ab": b""}, ""))}) == 3


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "write_read_only", fail_to_write)
    with pytest.raises(OSError, match="no space left"):
        take_snapshot(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_commit_is_a_commit_of_this_checkout() -> None:
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    if not head:
        pytest.skip("no checkout")
    assert str(git_commit()).removesuffix("+") == head


def test_every_folder_is_copied() -> None:
    assert json.dumps(package_files()).count("__init__.py") > 10
