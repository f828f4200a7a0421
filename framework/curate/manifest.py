"""A manifest: a JSONL or Parquet file with a row for each video, read whole and checked before anything is written.

    {"uri": "s3://bucket/a.mp4", "caption": "..."}          "file" is another word for "uri"

The other keys are those of a line of captions (captions.py). A URI without a scheme is a path, relative to the manifest
(which may lie in an object store itself). A row without a caption is skipped and reported.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from framework.curate.captions import caption_line, check_keys
from framework.curate.inputs import SUFFIXES, Found, Input, Reader, Skip, is_video
from framework.curate.share import Share

MANIFESTS = (".jsonl", ".parquet")
_PLACES = ("uri", "file")
_SAID = ("caption", "captions", "source", "licence", "scores")


def manifest_inputs(url: str, reader: Reader, share: Share) -> Found:
    """The rows of a manifest. Raises ValueError naming the row and what is wrong with it, OSError."""
    inputs: dict[str, Input] = {}
    skips: list[Skip] = []
    rows: dict[str, int] = {}
    folder = url.rpartition("/")[0]
    for number, row in _rows(url, reader.read(url)):
        try:
            name = _place(row)
            if not share.takes(name):
                continue
            said = {key: value for key, value in row.items() if key in _SAID}
            line = caption_line(said) if "caption" in said or "captions" in said else None
        except ValueError as error:
            raise ValueError(f"{url}, row {number}: {error}") from error
        uri = name if "://" in name or name.startswith("/") or not folder else f"{folder}/{name}"
        if name in rows:
            skips.append(Skip(name, "duplicate", f"row {number} names it again, as row {rows[name]} did"))
        elif not is_video(name):
            skips.append(Skip(name, "not a video", f"its name doesn't end in {', '.join(SUFFIXES)}"))
        else:
            inputs[name] = Input(name, line, partial(reader.read, uri), costly="://" in uri)
        rows.setdefault(name, number)
    yield from skips
    for name in sorted(inputs):
        yield inputs[name]


def _place(row: dict[str, Any]) -> str:
    check_keys(row, (*_PLACES, *_SAID))
    places = [row[key] for key in _PLACES if key in row]
    if len(places) != 1 or not isinstance(places[0], str) or not places[0].strip():
        raise ValueError('exactly one of "uri" and "file" must be there: where the video is')
    return places[0].strip()


def _rows(url: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers from 1, without keys that hold nothing."""
    if url.endswith(".parquet"):
        try:
            file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
            number = 0
            for batch in file.iter_batches(use_threads=False):  # data/index.py says why
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{url} is no Parquet file: {error}") from None
        return
    for number, raw in enumerate(data.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except ValueError as error:  # also for bytes that aren't UTF-8
            raise ValueError(f"{url}, row {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{url}, row {number}: expected an object in braces, found {type(row).__name__}")
        yield number, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Parquet has every column in every row, with null where nothing was meant."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        if value and all(isinstance(each, tuple) for each in value):  # a map of Parquet
            return _without_nulls(dict(value))
        return [_without_nulls(each) for each in value if each is not None]
    return value
