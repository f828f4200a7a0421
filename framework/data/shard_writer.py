"""Writing a directory of shards (shards.py says what is in one) in parts, so that it may be stopped at any moment."""

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from framework.data.index import INDEX_NAME, SampleInfo, index_of, index_to_parquet
from framework.data.shards import (
    MARKER,
    MAX_SAMPLE_BYTES,
    LatentSample,
    Schema,
    ShardDirectory,
    VideoSample,
    columns,
    finished_parts,
    load_json,
    open_shards,
    part_name,
    row_from_sample,
    sync,
    write_bytes,
    write_json,
)


class ShardWriter:
    """Writes samples to a directory so that it may be killed at any moment and goes on where it was.

    Samples come grouped by input (a video file, a clip). A part is closed after the first input that brings it to
    `part_size` samples, so the boundaries follow from the inputs' order alone; it is written under a name ending in
    `.partial` and renamed when its bytes are on the disk. Equal inputs give equal bytes, wherever it was stopped.

    covered: the inputs of finished parts, name -> (fingerprint, uids of its samples).
    """

    def __init__(
        self,
        out: Path,
        *,
        schema: Schema,
        tokenizer_version: str | None,
        text_version: str | None = None,
        part_size: int,
        shard_bytes: int,
    ) -> None:
        _refuse_foreign(out)
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.covered: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._identity = {"schema": schema, "tokenizer": tokenizer_version, "text": text_version}
        self._schema, self._part_size, self._shard_bytes = schema, part_size, shard_bytes
        self._lock = _lock(out)
        try:
            self._parts = finished_parts(out)
            for record in [load_json(part / "part.json") for part in self._parts]:
                self._refuse_other(record)
                self.covered |= {item["name"]: (item["fingerprint"], tuple(item["uids"])) for item in record["inputs"]}
        except ValueError:
            os.close(self._lock)
            raise
        for leftover in out.glob("part-*.partial"):
            shutil.rmtree(leftover)
        self._mds: Any = None
        self._inputs: list[dict[str, Any]] = []
        self._infos: list[SampleInfo] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the directory go; an unfinished part is left to be thrown away by the next run."""
        os.close(self._lock)

    @property
    def num_samples(self) -> int:
        """Samples in finished parts and in the one being written."""
        return sum(len(uids) for _, uids in self.covered.values()) + len(self._infos)

    def covers(self, name: str, fingerprint: str) -> bool:
        """Whether an input is in a finished part already. Raises ValueError when it has changed since."""
        if name not in self.covered:
            return False
        if self.covered[name][0] != fingerprint:
            raise ValueError(
                f"{self.out} holds {name!r} as it was before: it, or what is said about it, has changed since; "
                f"write to a new directory"
            )
        return True

    def write(self, name: str, fingerprint: str, samples: Sequence[VideoSample | LatentSample]) -> None:
        """Add the samples of one input. fingerprint: anything that changes when the input does."""
        assert name not in self.covered and samples, name
        if self._mds is None:
            from streaming import MDSWriter

            self._mds = MDSWriter(
                out=str(self._partial),
                columns=columns(self._schema),
                hashes=["sha1", "xxh64"],
                size_limit=self._shard_bytes,
            )
        for sample in samples:
            num_bytes = len(sample.video) if isinstance(sample, VideoSample) else sample.latents.nbytes
            if num_bytes > MAX_SAMPLE_BYTES:
                raise ValueError(
                    f"{name}: a sample of {num_bytes} bytes is above the {MAX_SAMPLE_BYTES} that a shard holds"
                )
            self._mds.write(row_from_sample(sample))
            self._infos.append(sample.info)
        uids = [sample.info.uid for sample in samples]
        self._inputs.append({"name": name, "fingerprint": fingerprint, "uids": uids})
        if len(self._infos) >= self._part_size:
            self._close_part()

    def finish(self) -> ShardDirectory:
        """Close the last part and write the files of the whole directory, `cuboid.json` last.

        Raises ValueError when there's no sample at all.
        """
        if self._infos:
            self._close_part()
        if not self._parts:
            raise ValueError(f"nothing was written to {self.out}: no input gave a sample")
        shards: list[dict[str, Any]] = []
        infos: list[SampleInfo] = []
        for part in self._parts:
            for shard in load_json(part / "index.json")["shards"]:
                shard["raw_data"]["basename"] = f"{part.name}/{shard['raw_data']['basename']}"
                shards.append(shard)
            infos += [SampleInfo(**info) for info in load_json(part / "part.json")["samples"]]
        contents = {
            INDEX_NAME: index_to_parquet(index_of(infos)),
            "index.json": json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode(),
        }
        sizes = {name: len(content) for name, content in contents.items()}
        manifest = self._identity | {"num_samples": len(infos), "num_shards": len(shards), "files": sizes}
        marker = self.out / MARKER
        if marker.exists() and load_json(marker) != manifest:
            marker.unlink()
        for name, content in contents.items():
            write_bytes(self.out / name, content)
        write_json(marker, manifest)
        return open_shards(self.out)

    @property
    def _partial(self) -> Path:
        return self.out / (part_name(len(self._parts)) + ".partial")

    def _close_part(self) -> None:
        self._mds.finish()
        partial, final = self._partial, self.out / part_name(len(self._parts))
        record = {"inputs": self._inputs, "samples": [asdict(info) for info in self._infos]}
        write_json(partial / "part.json", self._identity | record)
        for file in [*partial.iterdir(), partial]:
            sync(file)
        os.replace(partial, final)
        sync(self.out)
        self._parts.append(final)
        self.covered |= {item["name"]: (item["fingerprint"], tuple(item["uids"])) for item in self._inputs}
        self._mds, self._inputs, self._infos = None, [], []

    def _refuse_other(self, record: dict[str, Any]) -> None:
        for what, value in self._identity.items():
            if record.get(what) != value:
                raise ValueError(
                    f"{self.out} holds samples of {what} {record.get(what)!r}, not {value!r}: write to a new directory"
                )


def _refuse_foreign(out: Path) -> None:
    """Raise ValueError when the directory has something in it that no ShardWriter wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a directory of shards is to be written there")
    own = ("index.json", INDEX_NAME, MARKER, "report.json")
    for entry in sorted(out.iterdir()) if out.exists() else []:
        name = entry.name.removesuffix(".partial")
        if not (name in own or name.startswith(("part-", "."))):
            raise ValueError(f"{out} has {entry.name!r} in it, which isn't part of shards: write to an empty directory")
        if name == "index.json" and not (out / part_name(0)).exists():
            raise ValueError(f"{out} holds an MDS data set that cuboid didn't make: write to an empty directory")


def _lock(out: Path) -> int:
    """An advisory lock on the directory itself, which the system takes back when the process ends in any way."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"another process is writing to {out}: wait for it, or write to another directory") from error
    return descriptor
