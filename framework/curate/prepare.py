"""A folder of videos and a JSONL of captions -> shards of videos.

A video's uid is the first 16 hex digits of the SHA-256 of its bytes: the same wherever the file lies and whatever its
name. Every video is decoded once, whole: what is broken is found here and not on a thousand GPUs. Each file of the
folder and each line of the JSONL ends either in the shards or, with its reason, in the report.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from framework.curate.captions import CaptionLine, read_captions
from framework.curate.config import PrepareConfig
from framework.data.decode import probe
from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import MAX_SAMPLE_BYTES, VIDEO_SCHEMA, VideoSample, write_json

Reason = Literal["broken", "no caption", "too short", "duplicate", "too large", "not a video", "no such file"]

_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")


@dataclass(frozen=True)
class Skip:
    """A file that isn't in the shards. file: relative to the folder of videos. detail: what lies behind the reason."""

    file: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class PrepareReport:
    """What became of each input. kept: files of an earlier run that are gone now; their samples stay in the shards."""

    out: Path
    num_samples: int
    num_frames: int
    skipped: tuple[Skip, ...]
    kept: tuple[str, ...]

    @property
    def num_skipped(self) -> dict[str, int]:
        """Reason -> how many files were skipped for it."""
        return dict(sorted(Counter(skip.reason for skip in self.skipped).items()))


def prepare(videos: Path, captions: Path, out: Path, *, config: PrepareConfig) -> PrepareReport:
    """Write the videos that have a caption to shards in `out`. A run that was stopped goes on; what is new is added.

    Raises ValueError: no such folder or caption file, a malformed line (before anything is written), `out` holding
    something else, a video in `out` that has changed since, nothing usable.
    """
    if not videos.is_dir():
        raise ValueError(f"no folder of videos {videos}")
    lines = read_captions(captions)
    files, skipped = _list_files(videos, captions, out)
    absent = lines.keys() - files - {skip.file for skip in skipped}
    skipped += [Skip(name, "no such file", f"{captions.name} names it; it isn't in {videos}") for name in absent]
    with ShardWriter(
        out, schema=VIDEO_SCHEMA, tokenizer_version=None, part_size=config.part_size, shard_bytes=config.shard_bytes
    ) as writer:
        owners = {uid: name for name, (_, uids) in writer.covered.items() for uid in uids}
        kept = tuple(sorted(writer.covered.keys() - files))
        for name in files:
            skip = _write(writer, videos / name, name, lines.get(name), owners, config)
            skipped += [skip] if skip else []
        skipped.sort(key=lambda skip: (skip.file, skip.reason))
        if not owners:
            reasons = "".join(f"\n  {skip.file}: {skip.reason}, {skip.detail}" for skip in skipped)
            raise ValueError(f"nothing usable in {videos}" + (reasons or ": no file ends in " + ", ".join(_SUFFIXES)))
        shards = writer.finish()
        report = PrepareReport(out, len(shards), int(shards.index.frames.sum()), tuple(skipped), kept)
        content = asdict(report) | {"num_skipped": report.num_skipped}
        del content["out"]
        write_json(out / "report.json", content)
    return report


def _write(
    writer: ShardWriter, path: Path, name: str, line: CaptionLine | None, owners: dict[str, str], config: PrepareConfig
) -> Skip | None:
    """Write one video, unless a finished part has it; or say why not. owners: uid -> file, to which it is added."""
    if line is None:
        return Skip(name, "no caption", "no line of the caption file names it")
    if (size := path.stat().st_size) > MAX_SAMPLE_BYTES:
        return Skip(name, "too large", f"{size} bytes; a sample has at most {MAX_SAMPLE_BYTES}: cut it into clips")
    video = path.read_bytes()
    digest = hashlib.sha256(video).hexdigest()
    uid = digest[:16]
    if owners.get(uid, name) != name:
        return Skip(name, "duplicate", f"same content as {owners[uid]}")
    fingerprint = hashlib.sha256((digest + json.dumps(asdict(line), sort_keys=True)).encode()).hexdigest()
    if writer.covers(name, fingerprint):
        return None
    try:
        stream = probe(video, name=name)
    except ValueError as error:
        return Skip(name, "broken", str(error))
    if stream.frames < config.min_frames:
        return Skip(name, "too short", f"{stream.frames} frames; at least {config.min_frames} are wanted")
    info = SampleInfo(uid, stream.frames, stream.height, stream.width, stream.fps, line.scores)
    writer.write(name, fingerprint, [VideoSample(info, video, line.captions, line.source, line.licence)])
    owners[uid] = name
    return None


def _list_files(videos: Path, captions: Path, out: Path) -> tuple[list[str], list[Skip]]:
    """The videos of a folder, recursively and sorted, and the files that aren't videos. Hidden files are left out."""
    names, others = [], []
    for path in sorted(videos.rglob("*")):
        name = path.relative_to(videos)
        hidden = any(part.startswith(".") for part in name.parts)
        own = path.resolve() == captions.resolve() or path.resolve().is_relative_to(out.resolve())
        if hidden or own or (path.is_dir() and not path.is_symlink()):
            continue
        if not path.is_file():
            others.append(
                Skip(name.as_posix(), "not a video", "a linked folder isn't followed, a link to nothing is none")
            )
        elif path.suffix.lower() in _SUFFIXES:
            names.append(name.as_posix())
        else:
            others.append(Skip(name.as_posix(), "not a video", f"its name doesn't end in {', '.join(_SUFFIXES)}"))
    return sorted(names), others
