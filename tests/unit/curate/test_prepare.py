"""`prepare` on real and made clips: each input ends in the shards or, named, in the report; a killed run goes on."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from clips import ASSET, make_clip

from framework.curate.config import PrepareConfig
from framework.curate.prepare import prepare
from framework.data.index import SampleInfo
from framework.data.shards import Caption, VideoSample, open_shards

SMALL = PrepareConfig(min_frames=5, part_size=2, shard_bytes=20_000)


def write_captions(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tree(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven good clips in two folders, and captions of them."""
    root = tmp_path_factory.mktemp("videos")
    names = [f"{'sub/' if number % 2 else ''}clip{number}.mp4" for number in range(7)]
    for number, name in enumerate(names):
        make_clip(root / name, frames=6 + number, seed=number)
    write_captions(root / "captions.jsonl", [{"file": name, "caption": f"this is {name}"} for name in names])
    return root


def test_asset(tmp_path: Path) -> None:
    report = prepare(ASSET.parent, ASSET.parent / "captions.jsonl", tmp_path / "d", config=PrepareConfig())
    assert (report.num_samples, report.num_frames) == (1, 132)
    sample = open_shards(tmp_path / "d").read(0)
    assert isinstance(sample, VideoSample)
    assert sample.info == SampleInfo(hashlib.sha256(ASSET.read_bytes()).hexdigest()[:16], 132, 720, 1280, 25.0)
    assert sample.video == ASSET.read_bytes()
    assert [caption.weight for caption in sample.captions] == [2.0, 1.0, 0.5]
    assert "Blender Foundation" in sample.source and sample.licence == "CC BY 3.0"


def test_every_input_is_accounted_for(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    good = make_clip(videos / "b.mp4", frames=8, seed=1)
    make_clip(videos / "deep" / "er.MKV", frames=9, seed=2)
    make_clip(videos / "short.mp4", frames=4, seed=3)
    make_clip(videos / "mute.webm", frames=8, seed=4, codec="libvpx-vp9", options={"deadline": "realtime"})
    shutil.copy(good, videos / "copy.mp4")
    (videos / "broken.mov").write_bytes(good.read_bytes()[:300])
    (videos / "notes.txt").write_text("hello")
    (videos / "link.mp4").symlink_to(videos / "nowhere.mp4")
    (videos / ".hidden.mp4").write_bytes(b"x")
    named = ["b.mp4", "deep/er.MKV", "short.mp4", "./copy.mp4", "broken.mov", "ghost.mp4", "../captions.jsonl"]
    captions = write_captions(
        tmp_path / "captions.jsonl", [{"file": name, "caption": name, "scores": {"b": 2, "a": 1.5}} for name in named]
    )
    report = prepare(videos, captions, tmp_path / "d", config=SMALL)
    assert {(skip.file, skip.reason) for skip in report.skipped} == {
        ("broken.mov", "broken"),
        ("short.mp4", "too short"),
        ("mute.webm", "no caption"),
        ("copy.mp4", "duplicate"),
        ("ghost.mp4", "no such file"),
        ("../captions.jsonl", "no such file"),
        ("notes.txt", "not a video"),
        ("link.mp4", "not a video"),
    }
    assert report.num_skipped["no such file"] == 2
    details = {skip.file: skip.detail for skip in report.skipped}
    assert "4 frames; at least 5" in details["short.mp4"] and "b.mp4" in details["copy.mp4"]
    shards = open_shards(tmp_path / "d")
    assert [(info.frames, info.scores) for info in shards.index] == [
        (8, {"a": 1.5, "b": 2.0}),
        (9, {"a": 1.5, "b": 2.0}),
    ]
    assert shards.read(1).captions == (Caption("deep/er.MKV", 1.0),)
    written = json.loads((tmp_path / "d" / "report.json").read_text())
    assert written["skipped"] == [asdict(skip) for skip in report.skipped]
    assert written["num_skipped"] == report.num_skipped


def test_new_clips_are_added_and_changed_ones_refused(folder: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(folder, tmp_path / "videos")
    late = (videos / "sub" / "clip3.mp4").rename(tmp_path / "clip3.mp4")
    report = prepare(videos, videos / "captions.jsonl", tmp_path / "d", config=SMALL)
    assert report.num_samples == 6 and report.num_skipped == {"no such file": 1}
    late.rename(videos / "sub" / "clip3.mp4")
    (videos / "clip0.mp4").unlink()
    report = prepare(videos, videos / "captions.jsonl", tmp_path / "d", config=SMALL)
    assert report.num_samples == 7 and report.kept == ("clip0.mp4",)
    assert open_shards(tmp_path / "d").index[-1].frames == 9
    lines = [json.loads(line) for line in (videos / "captions.jsonl").read_text().splitlines()]
    write_captions(videos / "captions.jsonl", [line | {"caption": "new"} for line in lines])
    with pytest.raises(ValueError, match=r"holds 'clip2.mp4' as it was before"):
        prepare(videos, videos / "captions.jsonl", tmp_path / "d", config=SMALL)


def killed_at(rename: int, run: Callable[[], object]) -> bool:
    """Run in a forked process that kills itself before its `rename`-th rename. Whether it was killed."""

    def child() -> None:
        original, count = os.replace, 0

        def replace(source: object, target: object) -> None:
            nonlocal count
            if count == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            original(source, target)  # type: ignore[arg-type]

        os.replace = replace  # type: ignore[assignment]
        run()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


def test_killed_anywhere_gives_the_bytes_of_the_uninterrupted_run(folder: Path, tmp_path: Path) -> None:
    """Killed before every single rename (of a part's record, a part, and each file of the root), then run again."""

    def run_into(out: Path) -> Callable[[], object]:
        return lambda: prepare(folder, folder / "captions.jsonl", out, config=SMALL)

    run_into(tmp_path / "whole")()
    expected = tree(tmp_path / "whole")
    assert sum(name.endswith("part.json") for name in expected) == 4
    rename = 0
    while killed_at(rename, run_into(tmp_path / str(rename))):
        out = tmp_path / str(rename)
        if not (out / "cuboid.json").exists():
            with pytest.raises(ValueError, match=r"unfinished|no shards in"):
                open_shards(out)
        run_into(out)()
        assert tree(out) == expected, rename
        rename += 1
    assert (
        rename == 4 * 2 + 4
    )  # part.json and the part, four times; samples.parquet, index.json, cuboid.json, report.json


def test_killed_while_adding_is_never_read_as_a_mixture(folder: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(folder, tmp_path / "videos")
    captions = videos / "captions.jsonl"
    moved = [(videos / f"clip{number}.mp4", tmp_path / f"clip{number}.mp4") for number in (4, 6)]
    for inside, outside in moved:
        inside.rename(outside)
    prepare(videos, captions, tmp_path / "before", config=SMALL)
    for inside, outside in moved:
        outside.rename(inside)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    prepare(videos, captions, tmp_path / "after", config=SMALL)
    counts: set[int | str] = set()
    for rename in range(6):  # part.json, the part, samples.parquet, index.json, cuboid.json, report.json
        out = shutil.copytree(tmp_path / "before", tmp_path / str(rename))
        assert killed_at(rename, lambda out=out: prepare(videos, captions, out, config=SMALL))  # type: ignore[misc]
        try:
            counts.add(len(open_shards(out).index))
        except ValueError as error:
            counts.add("unfinished" if "is unfinished" in str(error) else str(error))
        prepare(videos, captions, out, config=SMALL)
        assert tree(out) == tree(tmp_path / "after"), rename
    assert counts == {5, "unfinished", 7}


def test_killed_again_and_again_goes_on(folder: Path, tmp_path: Path) -> None:
    """Each attempt finishes one part and is killed in the next; it doesn't begin anew."""
    out = tmp_path / "d"
    for attempt in range(3):
        assert killed_at(2, lambda: prepare(folder, folder / "captions.jsonl", out, config=SMALL))
        assert len(list(out.glob("part-0000?"))) == attempt + 1
    prepare(folder, folder / "captions.jsonl", out, config=SMALL)
    prepare(folder, folder / "captions.jsonl", tmp_path / "whole", config=SMALL)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.mp4", "caption": "x"', "not JSON"),
        ('["a.mp4", "x"]', "expected an object"),
        ('{"caption": "x"}', '"file" must be the name'),
        ('{"file": "a.mp4"}', 'exactly one of "caption"'),
        ('{"file": "a.mp4", "caption": "x", "captions": []}', 'exactly one of "caption"'),
        ('{"file": "a.mp4", "captions": []}', "at least one"),
        ('{"file": "a.mp4", "captions": ["x"]}', "a caption must be"),
        ('{"file": "a.mp4", "caption": 3}', "a caption must be"),
        ('{"file": "a.mp4", "caption": " "}', "a caption is empty"),
        ('{"file": "a.mp4", "captions": [{"text": "x", "weight": 0}]}', "a number above 0, found 0"),
        ('{"file": "a.mp4", "captions": [{"text": "x", "weight": NaN}]}', "a number above 0, found nan"),
        ('{"file": "a.mp4", "captions": [{"text": "x", "wieght": 1}]}', "a caption must be"),
        ('{"file": "a.mp4", "caption": "x", "license": "CC0"}', "unknown key 'license'; did you mean 'licence'"),
        ('{"file": "a.mp4", "caption": "x", "scores": {"q": "high"}}', '"scores" must be an object of numbers'),
        ('{"file": "a.mp4", "caption": "x", "source": 4}', "'source' must be a text"),
        ('{"file": "./clip0.mp4", "caption": "x"}', "'clip0.mp4' is on line 1 already"),
        ('{"file": "a.mp4", "caption": "\xff"}', "not JSON"),
    ],
)
def test_malformed_lines_are_named_before_anything_is_written(
    folder: Path, tmp_path: Path, line: str, message: str
) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_bytes(b'{"file": "clip0.mp4", "caption": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError) as caught:
        prepare(folder, captions, tmp_path / "d", config=SMALL)
    assert str(caught.value).startswith(f"{captions}, line 3: ") and message in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    make_clip(tmp_path / "v" / "a.mp4", frames=3)
    captions = write_captions(tmp_path / "captions.jsonl", [{"file": "a.mp4", "caption": "x"}])
    with pytest.raises(ValueError, match=r"nothing usable in .*\n  a.mp4: too short, 3 frames"):
        prepare(tmp_path / "v", captions, tmp_path / "d", config=SMALL)
    with pytest.raises(ValueError, match="no folder of videos"):
        prepare(tmp_path / "w", captions, tmp_path / "d", config=SMALL)
    with pytest.raises(ValueError, match="no caption file"):
        prepare(tmp_path / "v", tmp_path / "none.jsonl", tmp_path / "d", config=SMALL)


@pytest.mark.parametrize("wrong", [{"min_frames": 0}, {"part_size": 0}, {"shard_bytes": 0}, {"shard_bytes": 1 << 32}])
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"prepare.{next(iter(wrong))}="):
        PrepareConfig(**wrong)
