"""The index of a shard directory: what buckets choose by, as columns, in the order of the shards.

It is one Parquet file, `samples.parquet`, which any tool reads: uid, frames, height, width, fps, and `scores.NAME` for
each score. Ten million samples are 0.5 GB in memory and read in seconds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

INDEX_NAME = "samples.parquet"
SCORES = "scores."


@dataclass(frozen=True)
class SampleInfo:
    """What buckets choose by. height, width: in pixels. fps: frames a second. scores: any numbers of the curation."""

    uid: str
    frames: int
    height: int
    width: int
    fps: float
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleIndex:
    """Columns of `n` samples. uids: bytes, UTF-8. frames, heights, widths: int32. fps: float64. scores: by name, NaN
    where a sample has none.
    """

    uids: np.ndarray
    frames: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    fps: np.ndarray
    scores: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, index: int) -> SampleInfo:
        scores = {name: float(column[index]) for name, column in self.scores.items() if not np.isnan(column[index])}
        size = (int(self.frames[index]), int(self.heights[index]), int(self.widths[index]))
        return SampleInfo(self.uid(index), *size, float(self.fps[index]), scores)

    def __iter__(self) -> Iterator[SampleInfo]:
        return (self[index] for index in range(len(self)))

    def uid(self, index: int) -> str:
        """A sample's name."""
        return bytes(self.uids[index]).decode()

    def videos(self) -> np.ndarray:
        """The video that each sample is of, as bytes: a segment's uid is "<uid of the video>@<first frame>"."""
        return np.char.partition(self.uids, b"@")[:, 0] if len(self) else self.uids


def index_of(infos: Sequence[SampleInfo]) -> SampleIndex:
    """The columns of some samples."""
    names = sorted({name for info in infos for name in info.scores})
    return SampleIndex(
        uids=np.array([info.uid.encode() for info in infos], dtype=np.bytes_),
        frames=np.array([info.frames for info in infos], dtype=np.int32),
        heights=np.array([info.height for info in infos], dtype=np.int32),
        widths=np.array([info.width for info in infos], dtype=np.int32),
        fps=np.array([info.fps for info in infos], dtype=np.float64),
        scores={name: np.array([info.scores.get(name, np.nan) for info in infos], dtype=np.float64) for name in names},
    )


def join_indexes(indexes: Sequence[SampleIndex]) -> SampleIndex:
    """One index after the other."""
    names = sorted({name for index in indexes for name in index.scores})

    def score(index: SampleIndex, name: str) -> np.ndarray:
        return index.scores.get(name, np.full(len(index), np.nan))

    return SampleIndex(
        uids=np.concatenate([index.uids for index in indexes]),
        frames=np.concatenate([index.frames for index in indexes]),
        heights=np.concatenate([index.heights for index in indexes]),
        widths=np.concatenate([index.widths for index in indexes]),
        fps=np.concatenate([index.fps for index in indexes]),
        scores={name: np.concatenate([score(index, name) for index in indexes]) for name in names},
    )


def index_to_parquet(index: SampleIndex) -> bytes:
    """The file; equal indexes give equal bytes."""
    columns = {
        "uid": pa.array([uid.decode() for uid in index.uids.tolist()], pa.string()),
        "frames": index.frames,
        "height": index.heights,
        "width": index.widths,
        "fps": index.fps,
    }
    columns |= {SCORES + name: column for name, column in index.scores.items()}
    sink = BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def index_from_parquet(data: bytes, name: str) -> SampleIndex:
    """The index in a file. Raises ValueError with its name where it is none."""
    try:
        # Without Arrow's threads: a process that ends while they start (a verb that only looks) is aborted.
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        uids = [np.array(chunk.to_pylist(), dtype=object) for chunk in table["uid"].chunks]
        numbers = {key: table[key].to_numpy() for key in table.column_names if key != "uid"}
        return SampleIndex(
            uids=np.concatenate([np.char.encode(chunk.astype(np.str_), "utf-8") for chunk in uids]),
            frames=numbers["frames"].astype(np.int32),
            heights=numbers["height"].astype(np.int32),
            widths=numbers["width"].astype(np.int32),
            fps=numbers["fps"].astype(np.float64),
            scores={k.removeprefix(SCORES): v for k, v in numbers.items() if k.startswith(SCORES)},
        )
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{name} is no index of samples: {error}") from None
