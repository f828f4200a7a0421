"""`cuboid data report` on a stream in a bucket: the same numbers as in a directory, and the cache they need."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from object_store import ObjectStore
from tiny import write_recipe

from framework.storage.storage import open_storage

ROOT = Path(__file__).parents[2]


def report(recipe: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "framework.cli", "data", "report", str(recipe), "--json", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_stream_in_a_bucket(object_store: ObjectStore, tiny_shards: Path, tmp_path: Path) -> None:
    place = f"s3://vid/{tmp_path.name}"
    storage = open_storage(place)
    for path in tiny_shards.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(tiny_shards).as_posix(), path.read_bytes())
    recipe = write_recipe(tmp_path, tiny_shards)
    near, far = report(recipe), report(recipe, f"data.streams.0.path={place}", "data.cache.gigabytes=1e-9")
    (here,), (there,) = near["streams"], far["streams"]
    assert there | {"path": here["path"], "cache_bytes": 0} == here
    assert there["cache_bytes"] == there["num_bytes"], "a window of 8 is more than all three shards"
    assert [key for key in near if near[key] != far[key]] == ["streams", "warnings"]
    assert "data.cache.gigabytes=1e-09 is below one window" in far["warnings"][0]
