"""Small sources of videos in every form that `cuboid prepare` takes, and what became of them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from clips import make_clip

from framework.curate.config import PrepareConfig
from framework.data.shards import LatentSample, VideoSample, open_shards

SMALL = PrepareConfig(part_size=2, shard_bytes=20_000)
Row = dict[str, object]


def make_videos(root: Path, count: int = 6) -> Path:
    """clip0.mp4 of 6 frames, clip1.mp4 of 7, ..."""
    for number in range(count):
        make_clip(root / f"clip{number}.mp4", frames=6 + number, seed=number)
    return root


def rows(videos: Path) -> list[Row]:
    """A row of a manifest for each."""
    return [
        {"uri": file.name, "caption": f"this is {file.name}", "licence": "CC0", "scores": {"q": number / 4}}
        for number, file in enumerate(sorted(videos.glob("*.mp4")))
    ]


def as_captions(table: Sequence[Row]) -> list[Row]:
    """The same rows as lines of captions."""
    return [{"file": row["uri"]} | {key: value for key, value in row.items() if key != "uri"} for row in table]


def write_jsonl(path: Path, lines: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def videos_in(out: Path | str) -> list[VideoSample]:
    """The samples of a directory of videos, by uid."""
    shards = open_shards(out)
    found = [shards.read(number) for number in range(len(shards))]
    assert [sample.info for sample in found] == list(shards.index)
    return sorted((s for s in found if isinstance(s, VideoSample)), key=lambda sample: sample.info.uid)


def latents_in(out: Path | str) -> dict[tuple[object, ...], tuple[object, ...]]:
    """The samples of a directory of latents: uid, shape and rate -> all that is stored, as bytes where it is long."""
    shards = open_shards(out)
    found: dict[tuple[object, ...], tuple[object, ...]] = {}
    for number, info in enumerate(shards.index):
        sample = shards.read(number)
        assert isinstance(sample, LatentSample) and sample.info == info
        name = (info.uid, info.frames, info.height, info.width, info.fps)
        assert name not in found
        arrays = [sample.latents, *sample.texts]
        stored = [(array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for array in arrays]
        found[name] = (sample.captions, sample.source, sample.licence, tuple(info.scores.items()), *stored)
    return found


def tree(path: Path) -> dict[str, str]:
    """Every file of a directory -> its hash."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
