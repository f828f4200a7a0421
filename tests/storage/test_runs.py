"""A run whose checkpoints lie in a bucket: the same as one with a directory, on any mesh, and refused as early."""

import json
from pathlib import Path

import checkpoint_ranks
import pytest
import ranks
from object_store import ObjectStore
from pool import run_ranks
from tiny import write_recipe

from framework.checkpoint.find import list_checkpoints, newest, open_checkpoint
from framework.checkpoint.read import CheckpointReader
from framework.launch.check import check_store
from framework.recipe import load_recipe
from framework.storage.storage import open_storage


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_run_saves_to_a_bucket_and_resumes(object_store: ObjectStore, tiny_shards: Path, tmp_path: Path) -> None:
    words = ["mesh.dp=2", "checkpoint.every=2", "checkpoint.keep=2", "data.global_batch=6"]
    place = f"s3://vid/{tmp_path.name}"
    whole = write_recipe(
        tmp_path, tiny_shards, [*words, "train.steps=8", f"run={tmp_path / 'whole'}"], name="whole.yaml"
    )
    recipe = write_recipe(tmp_path, tiny_shards, [*words, "train.steps=4", f"checkpoint.store={place}"])
    run_ranks(ranks.train, 2, whole, ["optimizer.decay_steps=8"])
    environment = object_store.environment
    run_ranks(checkpoint_ranks.train_with, 2, environment, recipe, ["optimizer.decay_steps=8"])
    assert not (tmp_path / "run/checkpoints").exists()
    run_ranks(checkpoint_ranks.train_with, 2, environment, recipe, ["train.steps=6"])
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")[:6]
    moved = ["train.steps=8", "mesh.dp=3", "zero.engine=fsdp2", f"checkpoint.local={tmp_path / 'node'}"]
    run_ranks(checkpoint_ranks.train_with, 3, environment, recipe, moved)
    values = [[loss for _, loss in losses(tmp_path / name)[6:]] for name in ("run", "whole")]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    storage = open_storage(place)
    entries, names = list_checkpoints(storage)
    assert [(entry.step, entry.attempt) for entry in entries] == [(6, 1), (8, 2)]
    assert {name.split("/")[0] for name in names} == {"fence", "run.json", *(entry.folder for entry in entries)}
    assert CheckpointReader(*open_checkpoint(place)).check() > 0


def test_damage_in_a_bucket(object_store: ObjectStore, tmp_path: Path, tiny_shards: Path) -> None:
    from stores import save_steps

    save_steps(tmp_path / "made", [1, 2])
    place = f"s3://vid/{tmp_path.name}"
    storage = open_storage(place)
    for path in (tmp_path / "made").rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(tmp_path / "made").as_posix(), path.read_bytes())
    name = "step-00000002-0000/ema-00000.distcp"
    data = bytearray(storage.read(name))
    data[4_200_000] ^= 1
    storage.put(name, bytes(data))
    reader = CheckpointReader(*open_checkpoint(place))
    with pytest.raises(ValueError, match=rf"{place}/{name} is damaged between the bytes 4194304 and"):
        reader.check()
    storage.delete([name])
    with pytest.raises(ValueError, match=f"{place}/{name} is missing"):
        newest(storage)
    recipe = write_recipe(tmp_path, tiny_shards, [f"checkpoint.store={place}"])
    with pytest.raises(ValueError, match=f"{name} is missing"):
        check_store(load_recipe(recipe, []))
    with pytest.raises(ValueError, match="the bucket doesn't exist"):
        check_store(load_recipe(recipe, ["checkpoint.store=s3://nowhere/x"]))
