"""A person's mistakes about the place of checkpoints, through the real command: status 2, one message, nothing made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from object_store import ObjectStore
from tiny import write_recipe

ROOT = Path(__file__).parents[2]


def train(recipe: Path, environment: dict[str, str]) -> str:
    """What the command says on standard error, after its status was 2."""
    done = subprocess.run(
        [sys.executable, "-m", "framework.cli", "train", str(recipe)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, ""), (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("store", "environment", "part"),
    [
        ("s3://nowhere/x", {}, "the bucket doesn't exist: make it, or name another"),
        ("s3://vid/x", {"AWS_SECRET_ACCESS_KEY": "wrongsecret"}, "the secret key is wrong: set AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_buckets(
    object_store: ObjectStore, tiny_shards: Path, tmp_path: Path, store: str, environment: dict[str, str], part: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_shards, [f"checkpoint.store={store}"])
    message = train(recipe, object_store.environment | environment)
    assert store in message and part in message and "wrongsecret" not in message
    assert not (tmp_path / "run").exists()


def test_a_directory_that_may_not_be_written(tiny_shards: Path, tmp_path: Path) -> None:
    """On a file system that is read only, as root may write in every directory of another."""
    locked = tmp_path / "locked"
    locked.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(locked)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        message = train(write_recipe(tmp_path, tiny_shards, [f"checkpoint.store={locked / 'store'}"]), {})
        assert f"this user may not write in {locked}; change its mode or name another directory" in message
        assert not (tmp_path / "run").exists()
    finally:
        subprocess.run(["umount", str(locked)], check=True)
