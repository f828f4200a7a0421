"""Shards: what is written is read, by us and by plain mosaicml-streaming; what is damaged is named."""

import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from framework.data import shard_writer
from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import (
    LATENT_SCHEMA,
    VIDEO_SCHEMA,
    Caption,
    LatentSample,
    Schema,
    VideoSample,
    open_shards,
)
from framework.shapes import ClipShape


def video_sample(number: int, num_bytes: int = 300) -> VideoSample:
    info = SampleInfo(f"uid{number}", 17 + number, 48, 64, 24.5, {"motion": number / 4})
    captions = (Caption(f"a cap {number}", 2.0), Caption("ünïcode ☃", 0.5))
    return VideoSample(info, np.random.default_rng(number).bytes(num_bytes), captions, "somewhere", "CC0")


def latent_sample(number: int, dtype: str) -> LatentSample:
    latents = np.random.default_rng(number).standard_normal((6, 3, 4, 5)).astype(dtype)
    return LatentSample(SampleInfo(f"uid{number}@33", 9, 32, 40, 12.0), latents, (Caption("c"),), "s", "l")


def write(out: Path, numbers: range, *, part_size: int = 4, shard_bytes: int = 1000) -> None:
    with writer(out, part_size=part_size, shard_bytes=shard_bytes) as shards:
        for number in numbers:
            if not shards.covers(f"in{number}", f"print{number}"):
                shards.write(f"in{number}", f"print{number}", [video_sample(number)])
        shards.finish()


def writer(
    out: Path, schema: Schema = VIDEO_SCHEMA, version: str | None = None, *, part_size: int = 4, shard_bytes: int = 1000
) -> ShardWriter:
    return ShardWriter(out, schema=schema, tokenizer_version=version, part_size=part_size, shard_bytes=shard_bytes)


def tree(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_videos_come_back(tmp_path: Path) -> None:
    write(tmp_path / "d", range(10))
    shards = open_shards(str(tmp_path / "d"))
    assert (shards.schema, shards.tokenizer_version, len(shards)) == (VIDEO_SCHEMA, None, 10)
    # A sample is 300 bytes of video, about 150 of the rest; a shard of 1000 takes one, after its header of about 500.
    assert shards.shard_sizes == [1] * 10
    assert list(shards.index) == [video_sample(number).info for number in range(10)]
    for number in (7, 0, 9, 3):
        assert shards.read(number) == video_sample(number)
    with pytest.raises(IndexError):
        shards.read(10)
    shards.verify_hashes()


def test_shards_and_parts_have_the_sizes_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "d", range(10), part_size=6, shard_bytes=2000)
    shards = open_shards(tmp_path / "d")
    assert [part.name for part in sorted((tmp_path / "d").glob("part-*"))] == ["part-00000", "part-00001"]
    assert sum(shards.shard_sizes[:-2]) <= 6 < sum(shards.shard_sizes)
    assert shards.shard_sizes == [3, 3, 3, 1]
    assert all(file.stat().st_size <= 2000 for file in (tmp_path / "d").rglob("*.mds"))
    assert [shards.read(number).info.uid for number in range(10)] == [f"uid{number}" for number in range(10)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_come_back(tmp_path: Path, dtype: str) -> None:
    samples = [latent_sample(number, dtype) for number in range(3)]
    with writer(tmp_path / "d", LATENT_SCHEMA, "dct-1") as shards:
        shards.write("v 9x32x40", "p", samples)
        directory = shards.finish()
    assert (directory.schema, directory.tokenizer_version) == (LATENT_SCHEMA, "dct-1")
    found = directory.read(2)
    assert isinstance(found, LatentSample)
    assert found.latents.dtype == np.dtype(dtype) and np.array_equal(found.latents, samples[2].latents)
    assert found.latents.flags.writeable  # torch.from_numpy warns otherwise
    assert found.clip == ClipShape(9, 32, 40)
    assert replace(found, latents=samples[2].latents) == samples[2]


def test_plain_streaming_reads_it(tmp_path: Path) -> None:
    """In a process of its own, as StreamingDataset uses shared memory."""
    write(tmp_path / "d", range(5), part_size=2)
    code = (
        "import hashlib, json, sys, streaming\n"
        "data = streaming.StreamingDataset(local=sys.argv[1], batch_size=1, validate_hash='sha1')\n"
        "rows = [data[i] for i in range(len(data))]\n"
        "print('ROWS', json.dumps([[r['uid'], int(r['frames']), float(r['fps']), r['captions'], r['scores'],"
        " r['licence'], hashlib.sha256(r['video']).hexdigest()] for r in rows]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "d")], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.split("ROWS ")[1])
    for number, row in enumerate(rows):
        expected = video_sample(number)
        captions = [{"text": f"a cap {number}", "weight": 2.0}, {"text": "ünïcode ☃", "weight": 0.5}]
        digest = hashlib.sha256(expected.video).hexdigest()
        assert row == [f"uid{number}", 17 + number, 24.5, captions, {"motion": number / 4}, "CC0", digest]
    assert len(rows) == 5


def test_opening_imports_neither_torch_nor_streaming_and_starts_no_thread(tmp_path: Path) -> None:
    """Arrow's threads, still starting when a short command ends, abort it: 9 of 150 times on a busy machine."""
    write(tmp_path / "d", range(3))
    code = (
        "import os, sys; from framework.data.shards import open_shards; before = os.listdir('/proc/self/task');"
        "assert len(open_shards(sys.argv[1]).index) == 3; assert os.listdir('/proc/self/task') == before;"
        "assert not {'torch', 'streaming', 'av'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], check=True, timeout=60)


def test_directories_that_are_no_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shard directory .*absent.*cuboid prepare"):
        open_shards(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no shards in .*empty: make them with `cuboid prepare"):
        open_shards(tmp_path / "empty")
    write(tmp_path / "d", range(3))
    manifest = json.loads((tmp_path / "d" / "cuboid.json").read_text())
    (tmp_path / "d" / "cuboid.json").write_text(json.dumps(manifest | {"schema": "cuboid.video/9"}))
    with pytest.raises(ValueError, match=r"cuboid.json has the schema 'cuboid.video/9'.*cuboid.video/1"):
        open_shards(tmp_path / "d")
    (tmp_path / "d" / "cuboid.json").write_text("{")
    with pytest.raises(ValueError, match=r"cuboid.json can't be read"):
        open_shards(tmp_path / "d")
    (tmp_path / "d" / "cuboid.json").unlink()
    with pytest.raises(ValueError, match=r"unfinished \(1 parts"):
        open_shards(tmp_path / "d")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "d", range(6))
    file = tmp_path / "d" / "part-00001" / "shard.00001.mds"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"{file} has {len(whole) - 7} bytes instead of {len(whole)}"):
        open_shards(tmp_path / "d")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    shards = open_shards(tmp_path / "d")  # sizes only: a flipped bit isn't seen
    with pytest.raises(ValueError, match=rf"{file} is damaged"):
        shards.verify_hashes()
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing; it should have {len(whole)} bytes"):
        open_shards(tmp_path / "d")
    file.write_bytes(whole)
    index = tmp_path / "d" / "samples.parquet"
    index.write_bytes(index.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"samples.parquet has"):
        open_shards(tmp_path / "d")


def test_columns_that_run_code_are_refused(tmp_path: Path) -> None:
    """MDS has a column type "pkl", whose decoding would run what a bucket says."""
    write(tmp_path / "d", range(3))
    index = json.loads((tmp_path / "d" / "index.json").read_text())
    shard = index["shards"][0]
    shard["column_encodings"][shard["column_names"].index("captions")] = "pkl"
    (tmp_path / "d" / "index.json").write_text(json.dumps(index))
    manifest = json.loads((tmp_path / "d" / "cuboid.json").read_text())
    manifest["files"]["index.json"] = (tmp_path / "d" / "index.json").stat().st_size
    (tmp_path / "d" / "cuboid.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"shard.00000.mds has the columns .*'captions': 'pkl'.*nothing else is read"):
        open_shards(tmp_path / "d")


def test_more_inputs_add_parts_and_keep_the_others(tmp_path: Path) -> None:
    write(tmp_path / "d", range(6))
    before = tree(tmp_path / "d")
    write(tmp_path / "d", range(6))
    assert tree(tmp_path / "d") == before
    write(tmp_path / "d", range(9))
    shards = open_shards(tmp_path / "d")
    assert [info.uid for info in shards.index] == [f"uid{number}" for number in range(9)]
    after = tree(tmp_path / "d")
    assert all(after[name] == digest for name, digest in before.items() if name.startswith("part-"))


def test_writer_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    write(tmp_path / "d", range(3))
    with pytest.raises(ValueError, match=r"schema 'cuboid.video/1', not 'cuboid.latent/2'"):
        writer(tmp_path / "d", LATENT_SCHEMA, "dct-1")
    with writer(tmp_path / "l", LATENT_SCHEMA, "dct-1") as shards:
        shards.write("v", "p", [latent_sample(0, "float16")])
        shards.finish()
    with pytest.raises(ValueError, match=r"tokenizer 'dct-1', not 'dct-2'"):
        writer(tmp_path / "l", LATENT_SCHEMA, "dct-2")
    with writer(tmp_path / "d") as shards, pytest.raises(ValueError, match=r"holds 'in1' as it was before"):
        shards.covers("in1", "other")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"'thesis.tex' in it"):
        writer(tmp_path / "home")
    with writer(tmp_path / "none") as shards, pytest.raises(ValueError, match="nothing was written"):
        shards.finish()


def test_two_writers_of_one_directory_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "d"), pytest.raises(ValueError, match="another process is writing"):
        writer(tmp_path / "d")
    with writer(tmp_path / "d"):
        pass


def test_sample_above_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "MAX_SAMPLE_BYTES", 299)
    with (
        writer(tmp_path / "d") as shards,
        pytest.raises(ValueError, match="in0: a sample of 300 bytes is above the 299"),
    ):
        shards.write("in0", "p", [video_sample(0)])


def test_reading_beside_another_thread(tmp_path: Path) -> None:
    write(tmp_path / "d", range(8))
    shards = open_shards(tmp_path / "d")
    wrong: list[int] = []

    def read_all() -> None:
        wrong.extend(number for number in range(8) if shards.read(number) != video_sample(number))

    threads = [threading.Thread(target=read_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
