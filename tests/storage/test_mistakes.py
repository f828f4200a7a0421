"""A person's mistakes about the place of checkpoints, through the real command: status 2, one message, nothing made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from object_store import ObjectStore
from tiny import write_recipe

from framework import cli

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
    """By another user, since root may write anywhere; in a fork of this process, as that user may not read our code."""
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    recipe = write_recipe(tmp_path, tiny_shards, [f"checkpoint.store={tmp_path / 'locked/store'}"])
    (tmp_path / "locked").mkdir(mode=0o755)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    told = tmp_path / "told"
    with told.open("wb") as file:
        pid = os.fork()
        if pid == 0:
            os.dup2(file.fileno(), sys.stderr.fileno())
            os.setuid(65534)
            sys.argv = ["cuboid", "train", str(recipe)]
            os._exit(cli.run())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 2 and len(told.read_text().splitlines()) == 1
    assert f"this user may not write in {tmp_path / 'locked'}; change its mode" in told.read_text()
    assert not (tmp_path / "locked/store").exists()
