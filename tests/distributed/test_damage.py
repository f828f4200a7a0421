"""Damaged checkpoints: refused by the file's name on every rank; passed over only where the start says so."""

import json
import os
import pickle
from pathlib import Path

import checkpoint_ranks
import pytest
import ranks
from plain_dcp import digests, folder_of
from pool import RanksFailed, run_ranks
from tiny import write_recipe

from framework.checkpoint.manifest import METADATA, StoredFile, block_checksum, decode_manifest, encode_manifest

WORDS = ["mesh.dp=2", "train.steps=6", "checkpoint.every=2"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_shards: Path) -> Path:
    """A run of six steps, with checkpoints of 2, 4 and 6."""
    path = write_recipe(tmp_path, tiny_shards, WORDS)
    run_ranks(ranks.train, 2, path, [])
    return path


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_byte_is_refused_or_passed_over(recipe: Path) -> None:
    run = recipe.parent / "run"
    expected, newest = digests(folder_of(run, 6)), folder_of(run, 6)
    flip(newest / "exp_avg-00001.distcp")
    message = rf"{newest}/exp_avg-00001\.distcp is damaged between the bytes 0 and \d+.*resume\.fall_back=true.* step 4"
    with pytest.raises(RanksFailed, match=message):
        run_ranks(ranks.train, 2, recipe, [])
    flip(folder_of(run, 4) / METADATA)
    run_ranks(ranks.train, 2, recipe, ["resume.fall_back=true"])
    assert digests(folder_of(run, 6)) == expected, "from step 2, along the same way"
    assert "fall_back: false" in (run / "recipe.yaml").read_text(), "a permission for one start"


def test_all_damaged(recipe: Path) -> None:
    for step in (2, 4, 6):
        flip(folder_of(recipe.parent / "run", step) / "ema-00000.distcp")
    with pytest.raises(RanksFailed, match=r"no checkpoint is whole: .*ema-00000\.distcp is damaged"):
        run_ranks(checkpoint_ranks.load, 2, recipe, ["resume.fall_back=true"])


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_planted_pickle_runs_nothing(recipe: Path) -> None:
    """Its checksums are right: whoever planted it has written the manifest too."""
    folder, trap = folder_of(recipe.parent / "run", 6), recipe.parent / "ran"
    data = pickle.dumps(Evil(trap))
    (folder / METADATA).write_bytes(data)
    manifest = decode_manifest((folder / "manifest.json").read_bytes(), "")
    manifest.files[METADATA] = StoredFile(len(data), (block_checksum(data),))
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(RanksFailed, match=rf"{folder}/\.metadata names posix\.system.*nothing of it was run"):
        run_ranks(checkpoint_ranks.load, 2, recipe, [])
    assert not trap.exists()


def test_a_node_local_copy_is_read_and_a_damaged_one_is_not(recipe: Path) -> None:
    """Written to the node first; with the store's files made useless a resume still finds the copies."""
    folder = recipe.parent
    words = [f"run={folder / 'other'}", f"checkpoint.local={folder / 'node'}"]
    run_ranks(ranks.train, 2, recipe, words)
    copies = sorted((folder / "node").rglob("*.distcp"))
    newest = folder_of(folder / "other", 6)
    assert {copy.name for copy in copies} == {file.name for file in newest.glob("*.distcp")}
    assert all(
        copy.parent.name == newest.name and copy.read_bytes() == (newest / copy.name).read_bytes() for copy in copies
    )
    expected = digests(newest)
    flip(copies[0])
    words += ["train.steps=8"]
    run_ranks(ranks.train, 2, recipe, words)
    lines = [json.loads(line) for line in (folder / "other/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert digests(folder_of(folder / "other", 6)) == expected
