"""A curriculum in four stages over four meshes: an image, a short clip, a long one at half the rate, a long one.

Its videos are decoded and encoded while it trains.
"""

from pathlib import Path
from typing import Any, Final

import yaml
from clips import make_clip
from curated import as_captions, rows, write_jsonl
from tiny import recipe_tree

from framework.curate.config import PrepareConfig
from framework.curate.prepare import prepare

MESHES: Final = ("dp=1", "dp=2", "ring=2", "tp=2")


def write_curriculum(folder: Path) -> Path:
    """Videos, and the recipe; its run is `folder/run`."""
    for number in range(4):
        make_clip(folder / "clips" / f"clip{number}.mp4", frames=20, seed=number)
    captions = write_jsonl(folder / "captions.jsonl", as_captions(rows(folder / "clips")))
    prepare(folder / "clips", captions, folder / "videos", config=PrepareConfig(part_size=2, shard_bytes=20_000))
    path = folder / "curriculum.yaml"
    path.write_text(yaml.safe_dump(curriculum(folder / "videos", folder / "run"), sort_keys=False))
    return path


def curriculum(videos: Path, run: Path) -> dict[str, Any]:
    """The recipe as plain YAML values."""
    return {
        **recipe_tree(videos, run),
        "data": data(videos, frames=17),
        "mesh": {"dp": 1, "tp": 2},
        "ema": {"decay": 0.9},
        "train": {"max_bad_steps": 3},
        "checkpoint": {"every": 2, "keep": 20},
        "log": {"every": 1},
        "stages": [
            {
                "name": "image",
                "exit": {"steps": 3},
                "data": data(videos, frames=1),
                "mesh": {"dp": 1, "tp": 1},
                "optimizer": {"schedule": "cosine", "warmup": 2},
            },
            {
                "name": "short",
                "exit": {"samples": 10},
                "data": data(videos, frames=5),
                "mesh": {"dp": 2, "tp": 1},
                "optimizer": {"lr": 5e-4, "warmup": 2},
                "zero": {"stage": 1},
            },
            {
                "name": "half-rate",
                "exit": {"steps": 3},
                "data": data(videos, frames=9, fps=12.0),
                "mesh": {"tp": 1, "ring": 2},
                "flow": {"shift": {"fixed": {"value": 3.0}}},
                "execution": {"recompute": "all"},
            },
            {"name": "full-rate", "exit": {"steps": 3}},
        ],
    }


def data(videos: Path, *, frames: int, fps: float | None = None) -> dict[str, Any]:
    """The section of one bucket."""
    bucket = {"frames": frames, "height": 16, "width": 16, "fps": fps}
    return {"streams": [{"path": str(videos)}], "buckets": [bucket], "global_batch": 4}
