"""Shards of videos -> shards of latents, so that training decodes no video (measured: ten times faster to load).

The work is a list of units (units.py). Each of N jobs, or ranks, takes every N-th and writes `DIR/share-I-of-N/`, a
directory of its own; who finishes last makes DIR's index of all parts below it. No job waits for another, and what an
earlier run finished, with whatever N, is found by its keys and left alone. With a text encoder the captions'
embeddings are stored too, and training needs none.

Shapes: `T H W C` uint8 decoded, `B C T H W` float32 in [-1, 1] to the tokenizer, `c t h w` latents, `L D` texts.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from framework.curate.clips import ClipEncoder, Encoder, unpadded
from framework.curate.config import EncodeConfig
from framework.curate.reuse import Reuse
from framework.curate.share import Share, share_of_folder
from framework.curate.units import (
    Misfit,
    Tail,
    Unit,
    digest_of,
    inputs_of,
    list_tails,
    list_unfit,
    list_units,
    parts_below,
)
from framework.data.config import BucketConfig
from framework.data.merge import contents_of_parts, read_records, without_duplicates, write_top
from framework.data.parts import REPORT
from framework.data.shard_writer import ShardWriter, refuse_other
from framework.data.shards import (
    EMPTY_TEXT,
    LATENT_SCHEMA,
    VIDEO_SCHEMA,
    ShardDirectory,
    json_bytes,
    parse_json,
)
from framework.shapes import latent_shape
from framework.storage.storage import Storage, open_storage
from framework.text.encoder import TextEncoder

_PART = re.compile(r"(share-\d+-of-\d+)/part-\d+")


@dataclass(frozen=True)
class EncodeReport:
    """What became of each video. num_samples: bucket -> latent samples in `out`, those of earlier runs included.
    num_reused: how many of all were copied from other directories, instead of being encoded.
    """

    out: str
    num_samples: dict[str, int]
    num_reused: int
    tails: tuple[Tail, ...]
    misfits: tuple[Misfit, ...]


@dataclass(frozen=True)
class Encoders:
    """tokenizer: of the latents. text: of the captions, None where these are embedded while training. device: where
    the tokenizer is to compute.
    """

    tokenizer: Encoder
    text: TextEncoder | None = None
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, str | None]:
        """What all samples of a directory have in common."""
        text = None if self.text is None else self.text.version
        return {"schema": LATENT_SCHEMA, "tokenizer": self.tokenizer.version, "text": text}


def encode_shards(
    source: ShardDirectory,
    buckets: Sequence[BucketConfig],
    encoders: Encoders,
    out: str | Path,
    *,
    config: EncodeConfig | None = None,
    reuse: Sequence[str] = (),
    share: Share | None = None,
) -> EncodeReport | None:
    """Encode a share of every video for every bucket it fits; a run that was stopped goes on. None while other shares
    aren't finished.

    reuse: directories of latents whose samples are copied where they are what would be encoded.
    Raises ValueError: shards that aren't of videos, no bucket, one that the tokenizer doesn't take, `out` holding
    something else, latents that aren't finite in the dtype, nothing usable.
    """
    config, share, url = config or EncodeConfig(), share or Share(), str(out).rstrip("/")
    if source.schema != VIDEO_SCHEMA:
        raise ValueError(f"{source.url} holds {source.schema}, not {VIDEO_SCHEMA}: latents can't be encoded again")
    if not buckets:
        raise ValueError("no bucket to encode for: give data.buckets at least one")
    for bucket in buckets:
        latent_shape(bucket.clip, encoders.tokenizer.strides)
    identity = encoders.identity
    units = list_units(
        source, buckets, config, tokenizer_version=encoders.tokenizer.version, text_version=identity["text"]
    )
    if not units:
        raise ValueError(_nothing(source, list_unfit(source, buckets)))
    store, work = open_storage(url), digest_of(units, share.count)
    left = _left(share.of(units), _covered(store, identity), url)
    found = Reuse(reuse, encoders.tokenizer.version)
    files = {} if encoders.text is None else {EMPTY_TEXT: _empty_text(encoders.text, config)}
    with ShardWriter(
        f"{url}/{share.folder}",
        schema=LATENT_SCHEMA,
        tokenizer_version=encoders.tokenizer.version,
        text_version=identity["text"],
        files=files,
        part_size=config.part_size,
        shard_bytes=config.shard_bytes,
    ) as writer:
        clips = ClipEncoder(source, encoders.tokenizer, encoders.text, found, config, encoders.device)
        for unit, samples, num_reused in clips.encode(left):
            writer.write(unit.name, unit.fingerprint, samples, reused=num_reused)
        if writer.num_samples:
            writer.finish()
        broken = {name: asdict(misfit) for name, misfit in clips.broken.items()}
        writer.put(REPORT, json_bytes({"work": work, "broken": broken}))
    reports = _reports(store, share.count, work)
    return None if reports is None else _finish(store, source, buckets, units, reports, (identity, files))


def read_report(out: str) -> EncodeReport:
    """The report of a finished directory."""
    content = parse_json(open_storage(out).read(REPORT), f"{out}/{REPORT}")
    tails, misfits = (Tail(**tail) for tail in content["tails"]), (Misfit(**misfit) for misfit in content["misfits"])
    return EncodeReport(out, content["num_samples"], content["num_reused"], tuple(tails), tuple(misfits))


def _covered(store: Storage, identity: Mapping[str, str | None]) -> dict[str, str]:
    """What finished parts of any run below a place have: name of a unit -> fingerprint. Raises ValueError where
    something else lies there.
    """
    try:
        first = {name.split("/")[0] for name in store.list()}
        parts = _parts(store)
    except OSError as error:
        raise ValueError(str(error)) from None
    own = ("index.json", "samples.parquet", "cuboid.json", "without-duplicates", REPORT, EMPTY_TEXT)
    for name in sorted(first):
        if not (share_of_folder(name) or name in own or name.startswith(".") or "~" in name):
            raise ValueError(f"{store.url} has {name!r} in it, which `cuboid encode` didn't write: name an empty place")
    records = read_records(store.read, parts)
    for record in records:
        refuse_other(store.url, identity, record)
    return {item["name"]: item["fingerprint"] for item in inputs_of(records)}


def _parts(store: Storage) -> list[str]:
    """The finished parts of every share, of this number and of others."""
    return [part for part in parts_below(store) if _PART.fullmatch(part)]


def _left(units: Sequence[Unit], covered: Mapping[str, str], url: str) -> list[Unit]:
    """What no finished part has. Raises ValueError for a unit that has changed since."""
    for unit in units:
        if covered.get(unit.name, unit.fingerprint) != unit.fingerprint:
            raise ValueError(
                f"{url} holds {unit.name!r} as it was before: the video, or what is said about it, has changed since, "
                f"or it was encoded otherwise; write to a new directory, with --reuse {url}"
            )
    return [unit for unit in units if unit.name not in covered]


def _empty_text(encoder: TextEncoder, config: EncodeConfig) -> bytes:
    """The empty caption's embedding as a file of numpy."""
    sink = BytesIO()
    np.save(sink, unpadded(encoder, [""], config.dtype)[0], allow_pickle=False)
    return sink.getvalue()


def _reports(store: Storage, count: int, work: str) -> list[dict[str, Any]] | None:
    """What every share of this work left when it was finished; None while one isn't."""
    names = [f"{Share(index, count).folder}/{REPORT}" for index in range(count)]
    if not set(names) <= store.list("share-").keys():
        return None
    reports = [parse_json(store.read(name), name) for name in names]
    return reports if all(report.get("work") == work for report in reports) else None


def _finish(
    store: Storage,
    source: ShardDirectory,
    buckets: Sequence[BucketConfig],
    units: Sequence[Unit],
    reports: Sequence[Mapping[str, Any]],
    top: tuple[Mapping[str, str | None], Mapping[str, bytes]],
) -> EncodeReport:
    """Make the place one directory. Two that finish at once write the same bytes. top: its identity and more files."""
    broken = {name: Misfit(**item) for report in reports for name, item in report["broken"].items()}
    misfits = list_unfit(source, buckets) + list({m.uid: m for _, m in sorted(broken.items())}.values())
    parts = _parts(store)
    if not parts:
        raise ValueError(_nothing(source, misfits))
    contents, _ = without_duplicates(store, contents_of_parts(store, parts))
    identity, files = top
    write_top(store, identity, contents, files)
    inputs = {item["name"]: item for item in inputs_of(read_records(store.read, parts))}
    counts = Counter[str]()
    for name, item in inputs.items():
        counts[name.split(" ")[1]] += len(item["uids"])
    reused = sum(item.get("reused", 0) for item in inputs.values())
    tails = list_tails(source, units, broken)
    report = EncodeReport(store.url, dict(sorted(counts.items())), reused, tuple(tails), tuple(misfits))
    content = asdict(report)
    del content["out"]
    store.put(REPORT, json_bytes(content))
    return report


def _nothing(source: ShardDirectory, misfits: Sequence[Misfit]) -> str:
    return f"nothing to encode in {source.url}" + "".join(f"\n  {m.uid}: {m.detail}" for m in misfits)
