"""Training data from a bucket: kills at random moments on changing meshes, a whole run, damage, and mistakes."""

import json
import os
from pathlib import Path

import checkpoint_ranks
import pool
import pytest
import ranks
import stream
from object_store import ObjectStore
from pool import RanksFailed, run_ranks
from refusals import refused_start
from tiny import write_recipe

from framework.data.shards import open_shards
from framework.storage.storage import open_storage

READER = {"AWS_ACCESS_KEY_ID": "readerkey", "AWS_SECRET_ACCESS_KEY": "readersecret"}


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def place(object_store: ObjectStore, tiny_shards: Path, tmp_path: Path) -> str:
    """The tiny shards in the bucket."""
    return stream.upload(tiny_shards, "vid", f"streaming/{tmp_path.name}", object_store.environment)


def test_kills(object_store: ObjectStore, tmp_path: Path) -> None:
    """Eight of them, with the server restarted or frozen now and then; a hundred in tools/soak/stream.py."""
    environment = dict(os.environ)
    os.environ.update(READER)
    try:
        soak = stream.build_soak(pool.context(), tmp_path, object_store, seed=5, outages=True, kills=8)
        for number in range(8):
            print(f"{number:4} {soak.cycle(stream.MESHES[number % 2] if number < 4 else None)}")
    finally:
        os.environ.update({name: environment[name] for name in READER})
    print(soak.finish())
    assert soak.tally.kills == 8 and soak.tally.steps > 8


def test_a_run_from_a_bucket(object_store: ObjectStore, place: str, tiny_shards: Path, tmp_path: Path) -> None:
    """By an identity that may only read, two ranks a sample, stopped and resumed on others: as from a directory."""
    words = [
        "data.global_batch=6",
        "checkpoint.every=3",
        "optimizer.decay_steps=6",
        f"data.cache.path={tmp_path / 'c'}",
    ]
    local = write_recipe(tmp_path, tiny_shards, [*words, f"run={tmp_path / 'local'}"], name="local.yaml")
    run_ranks(ranks.train, 2, local, ["mesh.dp=2", "train.steps=6"])
    recipe = write_recipe(tmp_path, tiny_shards, [*words, f"data.streams.0.path={place}"])
    environment = object_store.environment | READER
    run_ranks(checkpoint_ranks.train_with, 2, environment, recipe, ["mesh.ring=2", "train.steps=3"])
    run_ranks(checkpoint_ranks.train_with, 3, environment, recipe, ["mesh.dp=3", "mesh.ring=1", "train.steps=6"])
    found, expected = ([line["loss"] for line in lines_of(tmp_path / name)] for name in ("run", "local"))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 6
    assert {path.suffix for path in (tmp_path / "c").rglob("*") if path.is_file()} <= {".mds", ""}


def test_a_damaged_shard(object_store: ObjectStore, place: str, tiny_shards: Path, tmp_path: Path) -> None:
    """It ends the run by its name; or its samples are left out, and counted."""
    storage = open_storage(place)
    name = open_shards(place).files[1].name
    data = bytearray(storage.read(name))
    data[-9] ^= 1
    storage.put(name, bytes(data))
    words = [f"data.streams.0.path={place}", f"data.cache.path={tmp_path / 'c'}", "data.cache.patience=1"]
    recipe = write_recipe(tmp_path, tiny_shards, [*words, "train.steps=7"])
    with pytest.raises(RanksFailed, match=f"{place}/{name} can't be had"):
        run_ranks(checkpoint_ranks.train_with, 1, object_store.environment, recipe, [])
    words = ["data.bad_shards=skip", f"run={tmp_path / 'skips'}"]
    run_ranks(checkpoint_ranks.train_with, 1, object_store.environment, recipe, words)
    # Before the last step 24 draws of 8 samples in shards of 3, 3 and 2: nine of them in the damaged one.
    assert lines_of(tmp_path / "skips")[-1]["lost_samples"] == 9


@pytest.mark.parametrize(
    ("path", "environment", "part"),
    [
        ("s3://nowhere/x", {}, "the bucket doesn't exist"),
        ("s3://vid/x", {"AWS_SECRET_ACCESS_KEY": "wrongsecret"}, "the secret key is wrong"),
        ("s3://vid/x", {"AWS_ACCESS_KEY_ID": "wrongkey"}, "the access key is unknown there"),
        ("s3://hidden/x", READER, "may not do that"),
        ("s3://vid/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "is the server there"),
    ],
)
def test_mistakes(
    object_store: ObjectStore, tiny_shards: Path, tmp_path: Path, path: str, environment: dict[str, str], part: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_shards, [f"data.streams.0.path={path}"])
    message, seconds = refused_start(recipe, object_store.environment | environment)
    assert path in message and part in message and seconds < 30
    assert not any(secret in message for secret in ("trainersecret", "readersecret", "wrongsecret"))
    assert not (tmp_path / "run").exists()
