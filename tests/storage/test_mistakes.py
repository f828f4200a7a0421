"""A person's mistakes about the place of checkpoints, through the real command: status 2, one message, nothing made."""

import subprocess
from pathlib import Path

import pytest
from object_store import ObjectStore
from refusals import refused_start
from tiny import write_recipe


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
    message, _ = refused_start(recipe, object_store.environment | environment)
    assert store in message and part in message and "wrongsecret" not in message
    assert not (tmp_path / "run").exists()


def test_a_directory_that_may_not_be_written(tiny_shards: Path, tmp_path: Path) -> None:
    """On a file system that is read only, as root may write in every directory of another."""
    locked = tmp_path / "locked"
    locked.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(locked)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        message, _ = refused_start(write_recipe(tmp_path, tiny_shards, [f"checkpoint.store={locked / 'store'}"]), {})
        assert f"this user may not write in {locked}; change its mode or name another directory" in message
        assert not (tmp_path / "run").exists()
    finally:
        subprocess.run(["umount", str(locked)], check=True)
