"""Encoding: each latent sample against its own clip, decoded by PyAV alone and encoded by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import all_frames, make_clip
from torch import Tensor

from framework.curate.config import EncodeConfig, PrepareConfig
from framework.curate.encode import EncodeReport, Encoders, encode_shards
from framework.curate.prepare import prepare
from framework.curate.units import Tail, segment_starts
from framework.data.buckets import misfit
from framework.data.config import BucketConfig
from framework.data.index import SampleInfo
from framework.data.shards import LATENT_SCHEMA, LatentSample, ShardDirectory, open_shards
from framework.shapes import ClipShape, Strides


class Blocks:
    """A stand-in tokenizer: the first frame four times, then each latent is the mean of a 4x8x8 block."""

    strides = Strides(4, 8, 8, causal=True)

    def __init__(self, version: str = "blocks-1", gain: float = 1.0) -> None:
        self.version, self._gain = version, gain

    def encode(self, video: Tensor) -> Tensor:
        assert video.dtype == torch.float32 and video.ndim == 5 and video.abs().max() <= 1
        padded = torch.cat([video[:, :, :1].repeat(1, 1, 3, 1, 1), video], 2)
        return torch.nn.functional.avg_pool3d(padded, (4, 8, 8)) * self._gain


def encode(
    source: ShardDirectory, buckets: list[BucketConfig], blocks: Blocks, out: Path, **numbers: object
) -> EncodeReport:
    """The only share of one."""
    config = EncodeConfig(**numbers)  # type: ignore[arg-type]
    report = encode_shards(source, buckets, Encoders(blocks), out, config=config)
    assert report is not None
    return report


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a: 23 frames 48x64; b: 9 frames 64x64; c: 4 frames, too few for any bucket here."""
    root = tmp_path_factory.mktemp("videos")
    make_clip(root / "a.mp4", frames=23, seed=1)
    make_clip(root / "b.mp4", frames=9, height=64, seed=2)
    make_clip(root / "c.mp4", frames=4, seed=3)
    lines = [{"file": f"{name}.mp4", "caption": name, "source": "made", "scores": {"q": 1}} for name in "abc"]
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def source(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    out = tmp_path_factory.mktemp("shards") / "d"
    prepare(videos, videos / "captions.jsonl", out, config=PrepareConfig(min_frames=1))
    return open_shards(out)


BUCKETS = [BucketConfig(5, 48, 64), BucketConfig(5, 64, 64, fps=12.0)]


def test_segments_by_hand() -> None:
    info = SampleInfo("u", 23, 48, 64, 24.0)
    assert segment_starts(info, BucketConfig(5, 48, 64)) == [0, 5, 10, 15]  # 3 are left
    assert segment_starts(info, BucketConfig(5, 48, 64, fps=12.0)) == [0, 9]  # 9 source frames each, 5 are left
    assert segment_starts(info, BucketConfig(25, 48, 64)) == []
    assert misfit(info, BucketConfig(25, 48, 64)) == "23 frames are fewer than the 25 that 25x48x64 takes"
    assert misfit(info, BucketConfig(5, 64, 64)) == "48x64 pixels are fewer than 64x64"
    assert misfit(info, BucketConfig(5, 48, 64, fps=30.0)) == "24 frames a second are fewer than 30"
    ntsc = SampleInfo("u", 23, 48, 64, 24000 / 1001)
    assert misfit(ntsc, BucketConfig(5, 48, 64, fps=24.0)) is None


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_are_those_of_their_own_frames(
    source: ShardDirectory, videos: Path, tmp_path: Path, dtype: str
) -> None:
    report = encode(source, BUCKETS, Blocks(), tmp_path / "l", dtype=dtype)
    latents = open_shards(tmp_path / "l")
    assert (latents.schema, latents.tokenizer_version) == (LATENT_SCHEMA, "blocks-1")
    a, b, c = (info.uid for info in source.index)
    assert [info.uid for info in latents.index] == [f"{a}@0", f"{a}@5", f"{a}@10", f"{a}@15", f"{b}@0", f"{b}@0"]
    assert report.num_samples == {"5x48x64": 5, "5x64x64@12.0": 1}
    assert report.tails == (Tail(a, "5x48x64", 3), Tail(b, "5x48x64", 4))
    assert [(m.uid, m.reason) for m in report.misfits] == [(c, "fits no bucket")]
    assert "4 frames are fewer than the 5" in report.misfits[0].detail

    sample = latents.read(2)
    assert isinstance(sample, LatentSample)
    assert sample.clip == ClipShape(5, 48, 64) and sample.info.fps == 24.0 and sample.info.scores == {"q": 1.0}
    assert sample.captions[0].text == "a" and sample.source == "made"
    frames = all_frames(videos / "a.mp4")[10:15].astype(np.float64) / 127.5 - 1
    blocks = frames.reshape(5, 6, 8, 8, 8, 3).mean((2, 4))  # T h w C
    expected = np.stack([blocks[0], blocks[1:].mean(0)]).transpose(3, 0, 1, 2)
    assert sample.latents.dtype == np.dtype(dtype) and sample.latents.shape == (3, 2, 6, 8)
    assert np.abs(sample.latents - expected).max() < {"float16": 5e-4, "float32": 5e-6}[dtype]  # 256 float32 summed

    slow = latents.read(5)
    assert isinstance(slow, LatentSample) and slow.info.fps == 12.0 and slow.clip == ClipShape(5, 64, 64)
    first = all_frames(videos / "b.mp4")[0].astype(np.float64).reshape(8, 8, 8, 8, 3).mean((1, 3)) / 127.5 - 1
    assert np.abs(slow.latents[:, 0].transpose(1, 2, 0) - first).max() < 1e-3
    rest = all_frames(videos / "b.mp4")[2::2].astype(np.float64).reshape(4, 8, 8, 8, 8, 3).mean((0, 2, 4)) / 127.5 - 1
    assert np.abs(slow.latents[:, 1].transpose(1, 2, 0) - rest).max() < 1e-3


def test_stopped_and_run_again_is_the_whole(source: ShardDirectory, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stopping(Blocks):
        left = 3

        def encode(self, video: Tensor) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise Stopped
            return super().encode(video)

    encode(source, BUCKETS, Blocks(), tmp_path / "whole", part_size=1)
    stopping = Stopping()
    stopping.left = 4  # a's four segments make the first part
    with pytest.raises(Stopped):
        encode(source, BUCKETS, stopping, tmp_path / "l", part_size=1)
    stopping.left = 2  # enough for what is missing, and for nothing else
    encode(source, BUCKETS, stopping, tmp_path / "l", part_size=1)
    files = sorted(file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.*"))
    assert files == sorted(file.relative_to(tmp_path / "l") for file in (tmp_path / "l").rglob("*.*"))
    assert all((tmp_path / "l" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)


def test_a_bucket_can_come_later(source: ShardDirectory, tmp_path: Path) -> None:
    encode(source, BUCKETS[:1], Blocks(), tmp_path / "l")
    report = encode(source, BUCKETS, Blocks(), tmp_path / "l")
    assert report.num_samples == {"5x48x64": 5, "5x64x64@12.0": 1}
    assert len(open_shards(tmp_path / "l")) == 6


def test_a_damaged_video_is_reported_and_the_others_go_on(
    source: ShardDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(video: bytes, *, name: str, **rest: object) -> np.ndarray:
        if name == source.index[0].uid:
            raise ValueError(f"{name} is broken: torn")
        return np.zeros((5, 48, 64, 3), np.uint8)

    monkeypatch.setattr("framework.curate.clips.decode_clip", decode)
    report = encode(source, BUCKETS[:1], Blocks(), tmp_path / "l")
    assert (source.index[0].uid, "broken") in [(m.uid, m.reason) for m in report.misfits]
    assert report.num_samples == {"5x48x64": 1}
    assert [tail.uid for tail in report.tails] == [source.index[1].uid]


def test_what_can_not_be_is_refused(source: ShardDirectory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest are 5 and 9"):
        encode(source, [BucketConfig(7, 48, 64)], Blocks(), tmp_path / "l")
    with pytest.raises(ValueError, match="no bucket"):
        encode(source, [], Blocks(), tmp_path / "l")
    with pytest.raises(ValueError, match=r"nothing to encode(.|\n)*23 frames are fewer than the 101"):
        encode(source, [BucketConfig(101, 48, 64)], Blocks(), tmp_path / "l")
    with pytest.raises(ValueError, match="aren't finite in float16"):
        encode(source, BUCKETS, Blocks(gain=1e6), tmp_path / "inf")
    encode(source, BUCKETS, Blocks(), tmp_path / "l")
    with pytest.raises(ValueError, match="tokenizer 'blocks-1', not 'blocks-2'"):
        encode(source, BUCKETS, Blocks("blocks-2"), tmp_path / "l")
    with pytest.raises(ValueError, match=r"holds cuboid.latent/2, not cuboid.video/1"):
        encode(open_shards(tmp_path / "l"), BUCKETS, Blocks(), tmp_path / "m")
    with pytest.raises(ValueError, match="as it was before"):
        encode(source, BUCKETS, Blocks(), tmp_path / "l", dtype="float32")
