"""Encoding in shares: any number of jobs, stopped anywhere, gives the samples of one; others' samples are copied."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import make_clip
from curated import SMALL, latents_in, tree
from torch import Tensor

from framework.curate.clips import unpadded
from framework.curate.config import EncodeConfig
from framework.curate.encode import EncodeReport, Encoders, encode_shards, read_report
from framework.curate.merge import merge_directories
from framework.curate.prepare import prepare
from framework.curate.share import Share
from framework.data.buckets import open_streams
from framework.data.config import BucketConfig, StreamConfig
from framework.data.shards import LatentSample, ShardDirectory, open_shards
from framework.text.bytes import ByteEncoder
from framework.text.config import BytesConfig
from framework.tokenizer.config import DctConfig
from framework.tokenizer.dct import DctTokenizer

BUCKETS = [BucketConfig(5, 48, 64), BucketConfig(5, 32, 32, fps=12.0), BucketConfig(1, 48, 48)]
CONFIG = EncodeConfig(part_size=3)


class Counting(DctTokenizer):
    """Counts the segments that are encoded, and stops before one."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__(DctConfig(coefficients=8))
        self.count, self.batches, self._stop = 0, list[int](), stop

    def encode(self, video_bcthw: Tensor, *, first: bool = True) -> Tensor:
        if self.count == self._stop:
            raise KeyboardInterrupt
        self.count += len(video_bcthw)
        self.batches.append(len(video_bcthw))
        return super().encode(video_bcthw, first=first)


def prepare_videos(root: Path, out: Path, caption: str = "clip") -> ShardDirectory:
    lines = []
    for number in range(4):
        name = f"{number}.mp4"
        if not (root / name).exists():
            make_clip(root / name, frames=8 + 3 * number, seed=number)
        captions = [{"text": f"{caption} {number}"}, {"text": "ü" * number + "x", "weight": 2}]
        lines.append({"file": name, "captions": captions, "source": "made"})
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(root, root / "captions.jsonl", out, config=SMALL)
    return open_shards(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    return prepare_videos(root, tmp_path_factory.mktemp("shards") / "d")


def encode(
    source: ShardDirectory,
    out: Path,
    share: Share | None = None,
    *,
    tokenizer: DctTokenizer | None = None,
    text: int | None = 16,
    reuse: Sequence[Path] = (),
    config: EncodeConfig = CONFIG,
    buckets: list[BucketConfig] = BUCKETS,
) -> EncodeReport | None:
    """text: the length of the byte encoder."""
    encoder = None if text is None else ByteEncoder(BytesConfig(text))
    encoders = Encoders(tokenizer or Counting(), encoder)
    return encode_shards(source, buckets, encoders, out, config=config, reuse=[str(url) for url in reuse], share=share)


@pytest.fixture(scope="module")
def whole(source: ShardDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "l"
    report = encode(source, out)
    # 8, 11, 14 and 17 frames: segments of 5, of 9 source frames at half the rate, and of 1.
    assert report is not None and report == read_report(str(out))
    assert report.num_samples == {"1x48x48": 50, "5x32x32@12.0": 3, "5x48x64": 8} and report.num_reused == 0
    return out


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [2, 0, 1]])
def test_any_number_of_jobs_gives_the_same_samples(
    source: ShardDirectory, whole: Path, tmp_path: Path, order: list[int]
) -> None:
    for done, index in enumerate(order):
        with pytest.raises(ValueError, match=r"no shard|unfinished"):
            open_shards(tmp_path / "l")
        report = encode(source, tmp_path / "l", Share(index, len(order)))
        assert (report is None) == (done + 1 < len(order)), "the last to finish makes the index"
    assert latents_in(tmp_path / "l") == latents_in(whole)
    assert report is not None and report.num_samples == read_report(str(whole)).num_samples
    counts = [len(open_shards(folder)) for folder in (tmp_path / "l").glob("share-*")]
    assert len(counts) == len(order) and max(counts) < 61
    before = tree(tmp_path / "l")
    encode(source, tmp_path / "l", Share(0, len(order)))
    assert tree(tmp_path / "l") == before


def test_stopped_and_gone_on_with_by_another_number_of_jobs(
    source: ShardDirectory, whole: Path, tmp_path: Path
) -> None:
    for index, stop in ((0, 4), (1, 9)):
        with pytest.raises(KeyboardInterrupt):
            encode(source, tmp_path / "l", Share(index, 3), tokenizer=Counting(stop))
    with pytest.raises(ValueError, match="unfinished"):
        open_shards(tmp_path / "l")
    left = [Counting(), Counting()]
    reports = [encode(source, tmp_path / "l", Share(index, 2), tokenizer=left[index]) for index in range(2)]
    assert reports[0] is None and reports[1] is not None
    assert 0 < sum(tokenizer.count for tokenizer in left) < 61 - 3, "a part of each of the stopped is there"
    assert latents_in(tmp_path / "l") == latents_in(whole)


def test_what_finished_another_work_does_not_count(source: ShardDirectory, whole: Path, tmp_path: Path) -> None:
    for index in range(2):
        encode(source, tmp_path / "l", Share(index, 2), buckets=BUCKETS[:1])
    assert len(open_shards(tmp_path / "l")) == 8
    assert encode(source, tmp_path / "l", Share(0, 2)) is None, "the other job hasn't begun with the buckets that came"
    assert len(open_shards(tmp_path / "l")) == 8
    assert encode(source, tmp_path / "l", Share(1, 2)) is not None
    assert latents_in(tmp_path / "l") == latents_in(whole)


def test_a_batch_is_of_one_shape_and_changes_nothing(source: ShardDirectory, whole: Path, tmp_path: Path) -> None:
    tokenizer = Counting()
    encode(source, tmp_path / "l", tokenizer=tokenizer, config=EncodeConfig(part_size=3, batch=4))
    assert tokenizer.batches == [4, 4, 3, *[4] * 12, 2]
    assert latents_in(tmp_path / "l") == latents_in(whole), "the dct's latents are bitwise those of each alone"


def test_texts_are_stored_without_padding(whole: Path) -> None:
    shards, encoder = open_shards(whole), ByteEncoder(BytesConfig(16))
    assert shards.text_version == encoder.version
    for number in range(len(shards)):
        sample = shards.read(number)
        assert isinstance(sample, LatentSample)
        for caption, text in zip(sample.captions, sample.texts, strict=True):
            length = min(16, len(caption.text.encode()) + 1)
            expected = encoder.encode([caption.text])[0][0, :length].numpy().astype(np.float16)
            assert text.dtype == np.float16 and np.array_equal(text, expected)
    empty = shards.empty_text
    assert empty is not None and empty.shape == (1, 256)
    assert np.array_equal(empty, encoder.encode([""])[0][0, :1].numpy().astype(np.float16))


def test_texts_that_the_dtype_does_not_hold() -> None:
    class Large:
        width, max_length, masked, version = 2, 4, True, "large"

        def embed(self, captions: Sequence[str]) -> list[Tensor]:
            return [torch.tensor([[1e5, float(len(caption))]]) for caption in captions]

    (found,) = unpadded(Large(), ["abc"], "float32")  # type: ignore[arg-type]
    assert found.tolist() == [[1e5, 3]]
    with pytest.raises(ValueError, match="isn't finite in float16"):
        unpadded(Large(), ["abc"], "float16")  # type: ignore[arg-type]


def test_without_texts(source: ShardDirectory, tmp_path: Path) -> None:
    encode(source, tmp_path / "l", text=None)
    shards = open_shards(tmp_path / "l")
    sample = shards.read(0)
    assert isinstance(sample, LatentSample) and sample.texts == () and shards.text_version is None
    assert shards.empty_text is None and not (tmp_path / "l" / "empty_text.npy").exists()
    with pytest.raises(ValueError, match=r"samples of text None, not 'bytes"):
        encode(source, tmp_path / "l")


def test_what_another_directory_has_is_copied(source: ShardDirectory, whole: Path, tmp_path: Path) -> None:
    tokenizer = Counting()
    report = encode(source, tmp_path / "l", tokenizer=tokenizer, reuse=[whole])
    assert report is not None and (tokenizer.count, report.num_reused) == (0, 61)
    assert latents_in(tmp_path / "l") == latents_in(whole)
    other = Counting()
    report = encode(source, tmp_path / "f", tokenizer=other, reuse=[whole], config=EncodeConfig("float32"))
    assert report is not None and (other.count, report.num_reused) == (61, 0), "another dtype isn't the same"


def test_new_captions_and_another_text_encoder_keep_the_latents(root: Path, whole: Path, tmp_path: Path) -> None:
    videos = prepare_videos(root, tmp_path / "v", caption="renamed")
    with pytest.raises(ValueError, match=rf"as it was before.*--reuse {whole}"):
        encode(videos, whole)
    tokenizer = Counting()
    report = encode(videos, tmp_path / "l", tokenizer=tokenizer, text=24, reuse=[whole])
    assert report is not None and (tokenizer.count, report.num_reused) == (0, 61)
    encode(videos, tmp_path / "anew", text=24)
    assert latents_in(tmp_path / "l") == latents_in(tmp_path / "anew")


def test_what_can_not_be_is_refused(source: ShardDirectory, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only latents of dct-.* can be used again"):
        encode(source, tmp_path / "l", reuse=[Path(source.url)])
    with pytest.raises(ValueError, match=r"has 'part-00000' in it, which `cuboid encode` didn't write"):
        encode(source, Path(source.url))
    with pytest.raises(ValueError, match=r"encode.batch=0 must be at least 1"):
        EncodeConfig(batch=0)
    streams, version = [StreamConfig(str(whole))], Counting().version
    for text in (None, "bytes/1-16"):
        assert len(open_streams(streams, tokenizer=version, text=text)) == 1
    with pytest.raises(ValueError, match=r"holds texts of the encoder bytes/1-16, the recipe's is bytes/1-64"):
        open_streams(streams, tokenizer=version, text="bytes/1-64")


def test_a_text_is_that_of_the_caption_that_stayed(root: Path, tmp_path: Path) -> None:
    """Two directories say different things of the same videos; merged, the second's stays and its texts are made."""
    first = prepare_videos(root, tmp_path / "m" / "a", caption="one")
    prepare_videos(root, tmp_path / "m" / "b", caption="another")
    encode(first, tmp_path / "la")
    merge_directories([str(tmp_path / "m" / "b"), str(tmp_path / "m" / "a")], str(tmp_path / "m"))
    merged = open_shards(tmp_path / "m")
    encode(merged, tmp_path / "lm", reuse=[tmp_path / "la"])
    encode(merged, tmp_path / "anew")
    assert latents_in(tmp_path / "lm") == latents_in(tmp_path / "anew")
