"""Manifests and tars give the shards that the same videos in a folder give; what can't be used is named."""

import json
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clips import make_clip
from curated import SMALL, Row, as_captions, make_videos, rows, videos_in, write_jsonl, write_tar

from framework.curate.prepare import PrepareReport, prepare
from framework.curate.share import Share, read_share
from framework.data.shards import VideoSample


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def reasons(report: PrepareReport) -> dict[str, str]:
    return {skip.file: skip.reason for skip in report.skipped}


@pytest.fixture(scope="module")
def expected(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[VideoSample]:
    """By way of a folder and its captions."""
    folder = tmp_path_factory.mktemp("folder")
    captions = write_jsonl(folder / "captions.jsonl", as_captions(rows(videos)))
    prepare(videos, captions, folder / "d", config=SMALL)
    found = videos_in(folder / "d")
    assert len(found) == 6 and {sample.licence for sample in found} == {"CC0"}
    return found


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_manifest(videos: Path, expected: list[VideoSample], tmp_path: Path, kind: str) -> None:
    (videos / "notes.txt").write_text("no video")
    extra: list[Row] = [
        {"uri": str(videos / "clip0.mp4"), "caption": "the same bytes under another name"},
        {"uri": "clip3.mp4", "caption": "the same name again"},
        {"uri": "ghost.mp4", "caption": "isn't there"},
        {"uri": "clip3.mp4/x.mp4", "caption": "can't be opened"},
        {"uri": "notes.txt", "caption": "no video"},
        {"uri": str(tmp_path / "mute.mp4")},
    ]
    make_clip(tmp_path / "mute.mp4", frames=6, seed=9)
    table = rows(videos) + extra
    manifest = videos / f"list.{kind}"
    if kind == "jsonl":
        write_jsonl(manifest, table)
    else:
        columns = {key: [row.get(key) for row in table] for key in ("uri", "caption", "licence")}
        scores = pa.array(
            [row.get("scores") for row in table], pa.struct([("q", pa.float64()), ("none", pa.float64())])
        )
        pq.write_table(pa.table(columns | {"scores": scores}), manifest)
    report = prepare(str(manifest), None, tmp_path / "d", config=SMALL)
    assert reasons(report) == {
        "clip0.mp4": "duplicate",
        "clip3.mp4": "duplicate",
        "ghost.mp4": "no such file",
        "clip3.mp4/x.mp4": "can't be read",
        "notes.txt": "not a video",
        str(tmp_path / "mute.mp4"): "no caption",
    }
    found = videos_in(tmp_path / "d")
    assert [sample for sample in found if sample.licence] == [s for s in expected if s.info.scores["q"] > 0]
    (first,) = [sample for sample in found if not sample.licence]
    assert first.captions[0].text.startswith("the same bytes"), "an absolute path sorts before the others"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"uri": "a.mp4", "caption": "x"', "not JSON"),
        ('{"caption": "x"}', 'exactly one of "uri" and "file"'),
        ('{"uri": "a.mp4", "file": "a.mp4"}', 'exactly one of "uri" and "file"'),
        ('{"url": "a.mp4"}', "unknown key 'url'; did you mean 'uri'"),
        ('{"uri": "a.mp4", "caption": " "}', "a caption is empty"),
    ],
)
def test_a_malformed_row_is_named_before_anything_is_written(tmp_path: Path, line: str, message: str) -> None:
    manifest = tmp_path / "list.jsonl"
    manifest.write_text('{"uri": "b.mp4", "caption": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        prepare(str(manifest), None, tmp_path / "d", config=SMALL)
    assert str(caught.value).startswith(f"{manifest}, row 2: ") and message in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"list.parquet is no Parquet file"):
        prepare(tmp_path / "list.parquet", None, tmp_path / "d", config=SMALL)
    with pytest.raises(ValueError, match=r"absent\.jsonl"):
        prepare(tmp_path / "absent.jsonl", None, tmp_path / "d", config=SMALL)
    with pytest.raises(ValueError, match=r"is a folder of videos: name their captions with --captions"):
        prepare(tmp_path, None, tmp_path / "d", config=SMALL)
    with pytest.raises(ValueError, match="two numbers"):
        prepare(f"{tmp_path}/{{9..1}}.tar", None, tmp_path / "d", config=SMALL)
    assert not (tmp_path / "d").exists()


def test_tars(videos: Path, expected: list[VideoSample], tmp_path: Path) -> None:
    table = {str(row["uri"]): row for row in rows(videos)}
    for number in range(3):
        members: dict[str, bytes] = {}
        for which in (2 * number, 2 * number + 1):
            row = table[f"clip{which}.mp4"]
            key = f"./set/{which:04}"
            said = {k: v for k, v in row.items() if k != "uri"} | {"width": 64, "url": "left alone"}
            members |= {f"{key}.json": json.dumps(said).encode()}
            members |= {f"{key}.mp4": (videos / f"clip{which}.mp4").read_bytes(), f"{key}.npy": b"left alone"}
        write_tar(tmp_path / f"{number:05}.tar", members)
    clip = (videos / "clip0.mp4").read_bytes()
    make_clip(tmp_path / "v" / "new.mp4", frames=9, seed=12)
    new = (tmp_path / "v" / "new.mp4").read_bytes()
    odd = {"a.mp4": clip, "a.txt": b"again", "b.mp4": new, "c.txt": b"no video", "d.txt": b"d", "d.mp4": clip[:200]}
    odd |= {"e.mp4": new, "e.json": b"{", "f.one.mp4": new, "f.txt": b"of f\n"}
    write_tar(tmp_path / "00003.tar", odd)
    whole = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00004.tar").write_bytes(whole[: len(whole) // 4])

    # Cut between two members, and with a header that is none: tarfile takes both for the end.
    between = whole.index(b"./set/0005.json")
    (tmp_path / "00006.tar").write_bytes(whole[:between])
    (tmp_path / "00007.tar").write_bytes(whole[:between] + b"\xff" * 512 + whole[between + 512 :])

    report = prepare(f"{tmp_path}/{{00000..00007}}.tar", None, tmp_path / "d", config=SMALL)
    assert reasons(report) == {
        "00003.tar/a.mp4": "duplicate",
        "00003.tar/b.mp4": "no caption",
        "00003.tar/c": "not a video",
        "00003.tar/d.mp4": "broken",
        "00003.tar/e.mp4": "no caption",
        "00004.tar": "broken",
        "00005.tar": "no such file",
        "00006.tar": "broken",
        "00006.tar/set/0004.mp4": "duplicate",
        "00007.tar": "broken",
        "00007.tar/set/0004.mp4": "duplicate",
    }
    found = {sample.info.uid: sample for sample in videos_in(tmp_path / "d")}
    assert [found.pop(sample.info.uid) for sample in expected] == expected
    (last,) = found.values()
    assert last.video == new and last.captions[0].text == "of f"


def test_tars_of_a_folder(videos: Path, expected: list[VideoSample], tmp_path: Path) -> None:
    for number, sample in enumerate(expected):
        said = json.dumps({"caption": sample.captions[0].text, "licence": "CC0", "scores": sample.info.scores})
        write_tar(tmp_path / f"{number}.tar", {"x.webm": sample.video, "x.json": said.encode()})
    for index in range(4):
        share = Share(index, 4)
        report = prepare(tmp_path, None, tmp_path.with_name("out"), config=SMALL, share=share)
        assert report.num_samples == (2, 2, 1, 1)[index]
    shares = [videos_in(tmp_path.with_name("out") / f"share-000{index}-of-0004") for index in range(4)]
    assert sorted(chain(*shares), key=lambda sample: sample.info.uid) == expected


def test_shares() -> None:
    names = [f"clip{number}" for number in range(1000)]
    taken = [[name for name in names if Share(index, 7).takes(name)] for index in range(7)]
    assert sorted(chain(*taken)) == sorted(names) and all(100 < len(each) < 190 for each in taken)
    assert [Share(index, 3).of(range(7)) for index in range(3)] == [range(0, 9, 3), range(1, 7, 3), range(2, 8, 3)]
    assert read_share("0/2") == Share(0, 2) and read_share("1/2").folder == "share-0001-of-0002"
    for wrong, message in (("2/2", "the last of 2 is 1/2"), ("1", "must be I/N"), ("-1/2", "must be I/N")):
        with pytest.raises(ValueError, match=message):
            read_share(wrong)
