"""The JSONL of captions: one line a video, checked whole before anything is written.

    {"file": "a.mp4", "caption": "..."}
    {"file": "b/c.mp4", "captions": [{"text": "...", "weight": 2}], "source": "...", "licence": "...",
     "scores": {"motion": 0.4}}            (on one line)

file is relative to the folder of videos; of a manifest it is the URI as that has it, of tars TAR/MEMBER. A weight is
how often that caption is drawn, relative to its video's others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from framework.data.shards import Caption

_KEYS = ("file", "caption", "captions", "source", "licence", "scores")


@dataclass(frozen=True)
class CaptionLine:
    """What the JSONL says of one video."""

    captions: tuple[Caption, ...]
    source: str
    licence: str
    scores: dict[str, float]


def read_captions(path: Path) -> dict[str, CaptionLine]:
    """File name (posix, relative to the folder of videos) -> its line.

    Raises ValueError naming the file, the line's number and what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(
            f"no caption file {path}: it is a JSONL of lines like " + '{"file": "a.mp4", "caption": "..."}'
        )
    lines: dict[str, CaptionLine] = {}
    numbers: dict[str, int] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            name, line = _parse(raw)
            if name in lines:
                raise ValueError(
                    f"{name!r} is on line {numbers[name]} already; put its captions into one list, `captions`"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        lines[name], numbers[name] = line, number
    return lines


def _parse(raw: bytes) -> tuple[str, CaptionLine]:
    try:
        line = json.loads(raw)
    except ValueError as error:  # also for bytes that aren't UTF-8
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(line, dict):
        raise ValueError(f"expected an object in braces, found {type(line).__name__}")
    check_keys(line, _KEYS)
    if not isinstance(line.get("file"), str) or not line["file"].strip():
        raise ValueError('"file" must be the name of a video, relative to the folder of videos')
    name = line["file"]
    return name if "://" in name else str(PurePosixPath(name)), caption_line(line)


def check_keys(line: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ValueError for a key that isn't known, with the nearest that is."""
    for key in sorted(line.keys() - set(known)):
        nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown key {key!r}; did you mean {nearest!r}?")


def caption_line(line: Mapping[str, Any]) -> CaptionLine:
    """What the keys caption or captions, source, licence and scores say. Raises ValueError with what is wrong."""
    if ("caption" in line) == ("captions" in line):
        raise ValueError('exactly one of "caption" (a text) and "captions" (a list) must be there')
    items = [{"text": line["caption"]}] if "caption" in line else line["captions"]
    if not isinstance(items, list) or not items:
        raise ValueError('"captions" must be a list of {"text": ..., "weight": ...}, at least one')
    for key in ("source", "licence"):
        if not isinstance(line.get(key, ""), str):
            raise ValueError(f"{key!r} must be a text, found {line[key]!r}")
    scores = line.get("scores", {})
    if not isinstance(scores, dict) or not all(_is_number(score) for score in scores.values()):
        raise ValueError(f'"scores" must be an object of numbers, found {scores!r}')
    captions = tuple(_caption(item) for item in items)
    numbers = {key: float(scores[key]) for key in sorted(scores)}
    return CaptionLine(captions, line.get("source", ""), line.get("licence", ""), numbers)


def _caption(item: Any) -> Caption:
    if not isinstance(item, dict) or item.keys() - {"text", "weight"} or not isinstance(item.get("text"), str):
        raise ValueError(f'a caption must be {{"text": ..., "weight": ...}}, found {item!r}')
    if not item["text"].strip():
        raise ValueError("a caption is empty; leave the line out, and the video is reported as one without a caption")
    weight = item.get("weight", 1.0)
    if not _is_number(weight) or weight <= 0:
        raise ValueError(f"a caption's weight must be a number above 0, found {weight!r}")
    return Caption(item["text"], float(weight))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
