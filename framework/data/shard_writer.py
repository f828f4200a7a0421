"""Writing a directory of shards (shards.py says what is in one) in parts, so that it may be stopped at any moment."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from framework.data.index import SampleInfo
from framework.data.merge import contents_of_parts, read_records, write_top
from framework.data.parts import RECORD, open_parts
from framework.data.shards import (
    MAX_SAMPLE_BYTES,
    LatentSample,
    Schema,
    ShardDirectory,
    VideoSample,
    columns,
    open_shards,
    part_name,
    row_from_sample,
    write_json,
)


class ShardWriter:
    """Writes samples to a directory, local or in an object store, so that it may be killed at any moment and goes on
    where it was.

    Samples come grouped by input (a video file, a clip). A part is closed after the first input that brings it to
    `part_size` samples, so the boundaries follow from the inputs' order alone. Equal inputs give equal bytes, wherever
    it was stopped and wherever it writes.

    covered: the inputs of finished parts, name -> (fingerprint, uids of its samples).
    """

    def __init__(
        self,
        out: str | Path,
        *,
        schema: Schema,
        tokenizer_version: str | None,
        text_version: str | None = None,
        files: Mapping[str, bytes] | None = None,
        part_size: int,
        shard_bytes: int,
    ) -> None:
        """files: more files of the top, which the manifest lists."""
        self._parts = open_parts(out)
        self.url = self._parts.url
        self.covered: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._identity = {"schema": schema, "tokenizer": tokenizer_version, "text": text_version}
        self._files = dict(files or {})
        self._schema, self._part_size, self._shard_bytes = schema, part_size, shard_bytes
        try:
            for record in read_records(self._parts.read, self._parts.finished):
                refuse_other(self.url, self._identity, record)
                self.covered |= {item["name"]: (item["fingerprint"], tuple(item["uids"])) for item in record["inputs"]}
        except BaseException:
            self._parts.close()
            raise
        self._mds: Any = None
        self._inputs: list[dict[str, Any]] = []
        self._infos: list[SampleInfo] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the directory go; an unfinished part is left to be thrown away by the next run."""
        self._parts.close()

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
                f"{self.url} holds {name!r} as it was before: it, or what is said about it, has changed since; "
                f"write to a new directory"
            )
        return True

    def write(
        self, name: str, fingerprint: str, samples: Sequence[VideoSample | LatentSample], *, reused: int = 0
    ) -> None:
        """Add the samples of one input. fingerprint: anything that changes when the input does. reused: how many of
        them were copied from another directory, which the part's record then says.
        """
        assert name not in self.covered and samples, name
        if self._mds is None:
            from streaming import MDSWriter

            self._mds = MDSWriter(
                out=str(self._parts.stage(self._next)),
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
        item = {"name": name, "fingerprint": fingerprint, "uids": uids}
        self._inputs.append(item | ({"reused": reused} if reused else {}))
        if len(self._infos) >= self._part_size:
            self._close_part()

    def finish(self) -> ShardDirectory:
        """Close the last part and write the files of the whole directory, `cuboid.json` last.

        Raises ValueError when there's no sample at all.
        """
        if self._infos:
            self._close_part()
        if not self._parts.finished:
            raise ValueError(f"nothing was written to {self.url}: no input gave a sample")
        contents = contents_of_parts(self._parts, self._parts.finished)
        write_top(self._parts, self._identity, contents, self._files)
        return open_shards(self.url)

    def put(self, name: str, data: bytes) -> None:
        """Write another file of the top, such as a report, which doesn't belong to the shards."""
        self._parts.put(name, data)

    @property
    def _next(self) -> str:
        return part_name(len(self._parts.finished))

    def _close_part(self) -> None:
        self._mds.finish()
        record = {"inputs": self._inputs, "samples": [asdict(info) for info in self._infos]}
        write_json(self._parts.stage(self._next) / RECORD, self._identity | record)
        self._parts.publish(self._next)
        self.covered |= {item["name"]: (item["fingerprint"], tuple(item["uids"])) for item in self._inputs}
        self._mds, self._inputs, self._infos = None, [], []


def refuse_other(url: str, identity: Mapping[str, str | None], record: Mapping[str, Any]) -> None:
    """Raise ValueError when a part, or another directory's manifest, is of another schema, tokenizer or text."""
    for what, value in identity.items():
        if record.get(what) != value:
            raise ValueError(
                f"{url} holds samples of {what} {record.get(what)!r}, not {value!r}: write to a new directory"
            )
