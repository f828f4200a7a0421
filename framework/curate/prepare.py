"""Videos and captions -> shards of videos.

A video's uid is the first 16 hex digits of the SHA-256 of its bytes: the same wherever the file lies and whatever its
name. Every video is decoded once, whole: what is broken is found here and not on a thousand GPUs. Each input of the
source (inputs.py) and each line of the captions ends either in the shards or, with its reason, in the report.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from framework.curate.captions import CaptionLine, read_captions
from framework.curate.config import PrepareConfig
from framework.curate.folder import folder_inputs
from framework.curate.inputs import IMAGE_SUFFIXES, SUFFIXES, Found, Input, Reader, Skip
from framework.curate.manifest import MANIFESTS, manifest_inputs
from framework.curate.share import Share
from framework.curate.tars import tar_inputs, tar_urls
from framework.data.decode import probe
from framework.data.index import SampleInfo
from framework.data.parts import REPORT
from framework.data.shard_writer import ShardWriter
from framework.data.shards import MAX_SAMPLE_BYTES, VIDEO_SCHEMA, VideoSample, json_bytes


@dataclass(frozen=True)
class PrepareReport:
    """What became of each input. kept: inputs of an earlier run that are gone now; their samples stay in the shards."""

    out: str
    num_samples: int
    num_frames: int
    skipped: tuple[Skip, ...]
    kept: tuple[str, ...]

    @property
    def num_skipped(self) -> dict[str, int]:
        """Reason -> how many inputs were skipped for it."""
        return dict(sorted(Counter(skip.reason for skip in self.skipped).items()))

    @property
    def num_unread(self) -> int:
        """How many inputs can't be read, which may be mended: running it again goes on with them."""
        return self.num_skipped.get("can't be read", 0)


def prepare(
    source: str | Path, captions: Path | None, out: str | Path, *, config: PrepareConfig, share: Share | None = None
) -> PrepareReport:
    """Write the videos that have a caption to shards. A run that was stopped goes on; what is new is added.

    source: a folder of videos, a manifest, or tars. captions: lines that stand for, or instead of, what the source
    says. out: a directory or a prefix of an object store; of one share of several, its folder there.

    Raises ValueError: no such source or caption file, a malformed line or row (before anything is written), `out`
    holding something else, a video in `out` that has changed since, nothing usable.
    """
    share = share or Share()
    place = str(out) if share.count == 1 else f"{str(out).rstrip('/')}/{share.folder}"
    lines = read_captions(captions) if captions else {}
    inputs, by_name = open_inputs(str(source), captions, str(out), share)
    names: set[str] = set()
    skipped: list[Skip] = []
    with ShardWriter(
        place, schema=VIDEO_SCHEMA, tokenizer_version=None, part_size=config.part_size, shard_bytes=config.shard_bytes
    ) as writer:
        owners = {uid: name for name, (_, uids) in writer.covered.items() for uid in uids}
        for item in inputs:
            if isinstance(item, Skip):
                skipped.append(item)
                continue
            if item.name in names:
                skipped.append(Skip(item.name, "duplicate", "the source has another one of that name"))
                continue
            names.add(item.name)
            skip = _write(writer, item, lines.get(item.name, item.line), owners, config)
            skipped += [skip] if skip else []
        # Which of the tars has a line's video only the job that reads it knows.
        mine = [name for name in lines if share.takes(name)] if by_name else lines if share.count == 1 else []
        absent = set(mine) - names - {skip.file for skip in skipped}
        skipped += [Skip(name, "no such file", f"the captions name it; it isn't in {source}") for name in absent]
        skipped.sort(key=lambda skip: (skip.file, skip.reason))
        if not owners and share.count == 1:
            reasons = "".join(f"\n  {skip.file}: {skip.reason}, {skip.detail}" for skip in skipped)
            raise ValueError(f"nothing usable in {source}" + (reasons or ": no file ends in " + ", ".join(SUFFIXES)))
        frames = int(writer.finish().index.frames.sum()) if owners else 0
        kept = tuple(sorted(writer.covered.keys() - names))
        report = PrepareReport(writer.url, writer.num_samples, frames, tuple(skipped), kept)
        content = asdict(report) | {"num_skipped": report.num_skipped}
        del content["out"]
        if not report.num_unread or share.count == 1:
            writer.put(REPORT, json_bytes(content))  # without it a share doesn't count as finished
    return report


def open_inputs(source: str, captions: Path | None, out: str, share: Share) -> tuple[Found, bool]:
    """The inputs of a folder, a manifest or tars, and whether they are shared out by their names. What is wrong with
    the source as a whole is found here. Raises ValueError, also where it is none of them.
    """
    reader = Reader()
    try:
        if source.endswith(MANIFESTS):
            return _begun(manifest_inputs(source, reader, share)), True
        if urls := tar_urls(source, reader):
            return tar_inputs(urls, reader, share), False
    except OSError as error:
        raise ValueError(str(error)) from None
    if "://" in source:
        raise ValueError(f"no .tar below {source}: name a manifest ({' or '.join(MANIFESTS)}), tars, or a local folder")
    if not Path(source).is_dir():
        raise ValueError(f"no folder of videos {source}")
    if captions is None:
        raise ValueError(f"{source} is a folder of videos: name their captions with --captions FILE.jsonl")
    return folder_inputs(Path(source), captions, out, share), True


def _begun(inputs: Found) -> Found:
    """The same; a manifest is read whole before its first row comes."""
    first = next(inputs, None)
    return iter(()) if first is None else chain([first], inputs)


def _write(
    writer: ShardWriter, item: Input, line: CaptionLine | None, owners: dict[str, str], config: PrepareConfig
) -> Skip | None:
    """Write one video, unless a finished part has it; or say why not. owners: uid -> input, to which it is added."""
    name = item.name
    if line is None:
        return Skip(name, "no caption", "nothing is said of it")
    if item.size is not None and item.size > MAX_SAMPLE_BYTES:
        return _too_large(name, item.size)
    if item.costly and _is_covered(writer.covered, name, line):
        return None
    try:
        video = item.read()
    except FileNotFoundError as error:
        return Skip(name, "no such file", str(error))
    except (OSError, ValueError) as error:  # a server's trouble; a URI of no store
        return Skip(name, "can't be read", str(error))
    if len(video) > MAX_SAMPLE_BYTES:
        return _too_large(name, len(video))
    digest = hashlib.sha256(video).hexdigest()
    uid = digest[:16]
    if owners.get(uid, name) != name:
        return Skip(name, "duplicate", f"same content as {owners[uid]}")
    fingerprint = f"{digest}-{_said(line)}"
    if writer.covers(name, fingerprint):
        return None
    try:
        stream = probe(video, name=name)
    except ValueError as error:
        return Skip(name, "broken", str(error))
    # An image is what it is; a video of a frame or two is a mistake of the cutting.
    if stream.frames < config.min_frames and not name.lower().endswith(IMAGE_SUFFIXES):
        return Skip(name, "too short", f"{stream.frames} frames; at least {config.min_frames} are wanted")
    info = SampleInfo(uid, stream.frames, stream.height, stream.width, stream.fps, line.scores)
    writer.write(name, fingerprint, [VideoSample(info, video, line.captions, line.source, line.licence)])
    owners[uid] = name
    return None


def _too_large(name: str, size: int) -> Skip:
    return Skip(name, "too large", f"{size} bytes; a sample has at most {MAX_SAMPLE_BYTES}: cut it into clips")


def _said(line: CaptionLine) -> str:
    """Changes when what is said about a video does."""
    return hashlib.sha256(json.dumps(asdict(line), sort_keys=True).encode()).hexdigest()


def _is_covered(covered: Mapping[str, tuple[str, tuple[str, ...]]], name: str, line: CaptionLine) -> bool:
    """Whether a finished part has an input of this name of which the same was said."""
    return name in covered and covered[name][0].endswith("-" + _said(line))
