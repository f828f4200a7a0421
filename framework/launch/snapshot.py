"""The code of a job: a copy of this package in the run directory, so that a later attempt runs what was submitted.

    INTO/code-3f9a0c51d2e7/framework/    every file but caches, read-only
    INTO/code-3f9a0c51d2e7/commit        the commit that it was, which no git can tell there; "" where none could before

The name is a hash of both, so that one that is there already is the same and is used again. With that folder as
PYTHONPATH it comes before any installed copy; PYTHONSAFEPATH keeps the working directory from coming before it, which
`python -m` would put first.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from framework.run import COMMIT_FILE, SNAPSHOT_PREFIX, git_commit


def package() -> Path:
    """The folder of the running package."""
    return Path(__file__).resolve().parents[1]


def read_package() -> dict[str, bytes]:
    """The contents of every file."""
    return {name: (package() / name).read_bytes() for name in package_files()}


def snapshot_path(into: Path) -> Path:
    """Where the copy of the running package would be."""
    return into / f"{SNAPSHOT_PREFIX}{content_hash(read_package(), git_commit() or '')}"


def take_snapshot(into: Path) -> Path:
    """Copy the running package; returns the folder to put on PYTHONPATH."""
    commit, root, contents = git_commit() or "", package(), read_package()
    folder = into / f"{SNAPSHOT_PREFIX}{content_hash(contents, commit)}"
    if folder.is_dir():
        return folder
    into.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".code-", suffix=".partial", dir=into))
    try:
        for name, content in contents.items():
            write_read_only(staging / root.name / name, content)
        write_read_only(staging / COMMIT_FILE, commit.encode())
        staging.chmod(0o755)
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another submission has made the same at the same time
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def package_files() -> list[str]:
    """Paths below the package, in order."""
    root = package()
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".partial")
    )


def content_hash(contents: dict[str, bytes], commit: str) -> str:
    """Of names, contents and commit: 12 hexadecimal digits."""
    digest = hashlib.sha256(commit.encode())
    for name, content in sorted(contents.items()):
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def write_read_only(path: Path, content: bytes) -> None:
    """A file that reaches the disk before its folder gets its name, as other nodes read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o444)
