"""Directories as one: a job array's shares, copies of what lies elsewhere, duplicates; read by plain streaming too."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from curated import SMALL, as_captions, make_videos, rows, tree, videos_in, write_jsonl

from framework.curate.merge import merge_directories
from framework.curate.prepare import prepare
from framework.curate.share import Share
from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import LATENT_SCHEMA, Caption, LatentSample, open_shards


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files, of which the last has the bytes of the first."""
    root = make_videos(tmp_path_factory.mktemp("videos"))
    (root / "clip9.mp4").write_bytes((root / "clip0.mp4").read_bytes())
    write_jsonl(root / "captions.jsonl", as_captions(rows(root)))
    return root


def prepare_all(videos: Path, out: Path, count: int) -> None:
    for index in range(count):
        prepare(videos, videos / "captions.jsonl", out, config=SMALL, share=Share(index, count))


@pytest.fixture(scope="module")
def array(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three jobs' shares, merged where they are."""
    out = tmp_path_factory.mktemp("array") / "d"
    prepare_all(videos, out, 3)
    report = merge_directories([str(out)], str(out))
    assert report.num_copied == 0 and report.num_samples == 6
    assert len(report.duplicates) == 1, "the same bytes under two names, that two jobs had"
    return out


def test_a_job_array_gives_what_one_job_gives(videos: Path, array: Path, tmp_path: Path) -> None:
    holders = [path.parent.name for path in array.glob("share-*/report.json") if (path.parent / "cuboid.json").exists()]
    assert len(holders) > 1
    prepare(videos, videos / "captions.jsonl", tmp_path / "whole", config=SMALL)
    found, expected = videos_in(array), videos_in(tmp_path / "whole")
    assert [sample.info.uid for sample in found] == [sample.info.uid for sample in expected]
    assert [sample.video for sample in found] == [sample.video for sample in expected]
    same = [(a, b) for a, b in zip(found, expected, strict=True) if a == b]
    assert len(same) >= 5, "of the duplicate another caption may be kept"
    open_shards(array).verify_hashes()


def test_merging_again_changes_nothing(array: Path) -> None:
    before = tree(array)
    merge_directories([str(array)], str(array))
    assert tree(array) == before


def test_plain_streaming_reads_it(array: Path) -> None:
    """In a process of its own, as StreamingDataset uses shared memory."""
    code = (
        "import json, sys, streaming\n"
        "data = streaming.StreamingDataset(local=sys.argv[1], batch_size=1, validate_hash='sha1')\n"
        "print('UIDS', json.dumps([data[i]['uid'] for i in range(len(data))]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(array)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    uids = json.loads(result.stdout.split("UIDS ")[1])
    assert sorted(uids) == [sample.info.uid for sample in videos_in(array)] and len(set(uids)) == 6


def test_what_lies_elsewhere_is_copied(array: Path, videos: Path, tmp_path: Path) -> None:
    prepare(videos, videos / "captions.jsonl", tmp_path / "other", config=SMALL)
    report = merge_directories([str(array), str(tmp_path / "other")], str(tmp_path / "new"))
    assert report.num_samples == 6 and len(report.duplicates) == 6 and report.num_copied > 0
    assert {each.dropped.split("/")[0] for each in report.duplicates} == {"other"}
    assert videos_in(tmp_path / "new") == videos_in(array)
    open_shards(tmp_path / "new").verify_hashes()
    again = merge_directories([str(tmp_path / "other")], str(tmp_path / "third"))
    assert videos_in(tmp_path / "third") == videos_in(tmp_path / "other") and again.duplicates == ()


def write_latents(out: Path, *, numbers: range = range(4), text: str | None = None, tokenizer: str = "t") -> None:
    files = {"empty_text.npy": b""} if text else {}
    numbers_ = {"part_size": 8, "shard_bytes": 1 << 20}
    with ShardWriter(
        out, schema=LATENT_SCHEMA, tokenizer_version=tokenizer, text_version=text, files=files, **numbers_
    ) as writer:
        for number in numbers:
            for fps in (12.0, 24.0):
                info = SampleInfo(f"v{number}@0", 5, 16, 16, fps)
                latents = np.full((2, 2, 2, 2), number, np.float16)
                writer.write(f"v{number} {fps}", "f", [LatentSample(info, latents, (Caption("c"),))])
        writer.finish()


def test_a_shard_is_written_again_without_what_is_elsewhere(tmp_path: Path) -> None:
    """One shard of each has eight rows, of which the second's first two samples are the first's last two."""
    write_latents(tmp_path / "m" / "a", numbers=range(4))
    write_latents(tmp_path / "m" / "b", numbers=range(3, 6))
    report = merge_directories([str(tmp_path / "m" / "a"), str(tmp_path / "m" / "b")], str(tmp_path / "m"))
    assert [each.uid for each in report.duplicates] == ["v3@0", "v3@0"], "one for each rate"
    shards = open_shards(tmp_path / "m")
    found = [shards.read(number) for number in range(len(shards))]
    assert [(s.info.uid, s.info.fps, float(s.latents.max())) for s in found if isinstance(s, LatentSample)] == [
        (f"v{number}@0", fps, float(number)) for number in range(6) for fps in (12.0, 24.0)
    ]
    shards.verify_hashes()
    (again,) = [file.name for file in shards.files if "without-duplicates" in file.name]
    write_latents(tmp_path / "alone", numbers=range(4, 6))
    written = (tmp_path / "alone" / "part-00000" / "shard.00000.mds").read_bytes()
    assert (tmp_path / "m" / again).read_bytes() == written, "as MDSWriter writes what is left"


def test_what_does_not_belong_together_is_refused(array: Path, tmp_path: Path) -> None:
    write_latents(tmp_path / "a")
    write_latents(tmp_path / "b", tokenizer="u")
    write_latents(tmp_path / "x" / "a", numbers=range(9, 11))
    for others, message in (
        ([array], "samples of schema 'cuboid.video/1', not 'cuboid.latent/2'"),
        ([tmp_path / "b"], "samples of tokenizer 'u', not 't'"),
        ([tmp_path / "x" / "a"], "several of the directories are called a"),
        ([tmp_path / "absent"], "no shard directory"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_directories([str(tmp_path / "a"), *map(str, others)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="can't be merged into itself"):
        merge_directories([str(tmp_path / "a")], str(tmp_path / "a"))


def test_a_share_that_is_missing_is_named(videos: Path, tmp_path: Path) -> None:
    prepare(videos, videos / "captions.jsonl", tmp_path, config=SMALL, share=Share(0, 2))
    with pytest.raises(ValueError, match=r"1 of 2 shares aren't finished, 1/2 for one"):
        merge_directories([str(tmp_path)], str(tmp_path))
    prepare(videos, videos / "captions.jsonl", tmp_path, config=SMALL, share=Share(0, 3))
    with pytest.raises(ValueError, match=r"shares of 2 and of 3"):
        merge_directories([str(tmp_path)], str(tmp_path))


def test_other_data_are_never_replaced(tmp_path: Path) -> None:
    """The place holds what isn't to be merged; or another file of the same name, as yesterday's directory had."""
    for day, numbers in ((1, range(2)), (2, range(2, 4))):
        write_latents(tmp_path / f"day{day}" / "made", numbers=numbers)
    merge_directories([str(tmp_path / "day1" / "made")], str(tmp_path / "all"))
    before = tree(tmp_path / "all")
    with pytest.raises(ValueError, match=r"holds another made/part-00000/shard.00000.mds already"):
        merge_directories([str(tmp_path / "day2" / "made")], str(tmp_path / "all"))
    write_latents(tmp_path / "own")
    with pytest.raises(ValueError, match=r"holds part-00000/shard.00000.mds already, which isn't among"):
        merge_directories([str(tmp_path / "day1" / "made")], str(tmp_path / "own"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an index.json that isn't of `cuboid`"):
        merge_directories([str(tmp_path / "day1" / "made")], str(tmp_path / "other"))
    assert tree(tmp_path / "all") == before
    merge_directories([str(tmp_path / "day1" / "made")], str(tmp_path / "all"))
    assert tree(tmp_path / "all") == before, "the same again is nothing new"
