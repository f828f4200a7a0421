"""Curation on a real S3 server: what is read there and written there is what a directory gives, killed anywhere too."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from curated import SMALL, as_captions, latents_in, make_videos, rows, tree, videos_in, write_jsonl, write_tar
from object_store import ObjectStore
from tiny import recipe_tree

from framework.curate.merge import merge_directories
from framework.curate.prepare import prepare
from framework.curate.share import Share
from framework.data import parts
from framework.data.parts import CLAIM, open_parts
from framework.data.shards import open_shards
from framework.programs.encode import encode
from framework.recipe import Recipe, load_recipe
from framework.storage.s3 import S3
from framework.storage.storage import open_storage


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_videos(tmp_path_factory.mktemp("videos"))
    write_jsonl(root / "captions.jsonl", as_captions(rows(root)))
    return root


@pytest.fixture(scope="module")
def local(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "d"
    prepare(videos, videos / "captions.jsonl", out, config=SMALL)
    return out


@pytest.fixture
def url(object_store: ObjectStore, tmp_path: Path) -> str:
    """A prefix of this test's own."""
    return f"s3://vid/{tmp_path.name}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    content = recipe_tree(tmp_path / "none", tmp_path / "run")
    content["data"]["buckets"] = [{"frames": 5, "height": 48, "width": 64}, {"frames": 1, "height": 32, "width": 32}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def stored(url: str) -> dict[str, bytes]:
    store = open_storage(url)
    return {name: store.read(name) for name in store.list()}


def held(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def killed_at(write: int, run: Callable[[], object]) -> bool:
    """Run in a forked process that kills itself before its `write`-th object. Whether it was killed."""

    def child() -> None:
        put, close, count = S3.put, parts.upload, 0

        def due() -> None:
            nonlocal count
            if count == write:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        S3.put = lambda *words: (due(), put(*words))[1]  # type: ignore[method-assign, assignment, return-value]
        parts.upload = lambda *words: close(*words)
        run()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


def test_a_place_in_a_bucket_has_the_bytes_of_a_directory(videos: Path, local: Path, url: str) -> None:
    prepare(videos, videos / "captions.jsonl", url, config=SMALL)
    assert stored(url) == held(local)
    prepare(videos, videos / "captions.jsonl", f"{url}/", config=SMALL)
    assert stored(url) == held(local)


def test_killed_before_an_object_goes_on_to_the_same_bytes(url: str, tmp_path: Path) -> None:
    """Of two parts of three objects, and samples.parquet, index.json, cuboid.json, report.json: before each in turn."""
    videos = make_videos(tmp_path / "videos", count=4)
    captions = write_jsonl(tmp_path / "captions.jsonl", as_captions(rows(videos)))
    prepare(videos, captions, tmp_path / "d", config=SMALL)
    expected = held(tmp_path / "d")
    assert len(expected) == 10
    for write in (0, 2, 3, 5, 6, 8, 9, 10):
        place = f"{url}/{write}"
        killed = killed_at(write, lambda place=place: prepare(videos, captions, place, config=SMALL))  # type: ignore[misc]
        assert killed == (write < 10)
        found = stored(place)
        assert found.items() - {(CLAIM, found.get(CLAIM))} <= expected.items() and (CLAIM in found) == killed
        if "cuboid.json" not in found:
            with pytest.raises(ValueError, match=r"unfinished|no shards in"):
                open_shards(place)
        prepare(videos, captions, place, config=SMALL)  # at once, since the one who held it is known to be dead
        assert stored(place) == expected, write


def test_one_writes_to_a_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_parts(url)
    with pytest.raises(ValueError, match=r"another process is writing to .*wait for it, .*try again in 1\d\d s"):
        open_parts(url)
    monkeypatch.setattr(parts, "HOLD", 0.0)
    second = open_parts(url)
    with pytest.raises(OSError, match=r"another process has taken .* over"):
        first.put("index.json", b"")
    first.close()
    second.put("report.json", b"{}")
    second.close()
    assert stored(url) == {"report.json": b"{}"}


def test_a_claim_is_renewed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BEAT", 0.05)
    place = open_parts(url)
    before = json.loads(open_storage(url).read(CLAIM))["time"]
    deadline = time.monotonic() + 20
    while json.loads(open_storage(url).read(CLAIM))["time"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    place.close()
    assert stored(url) == {}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_manifest_of_uris(videos: Path, local: Path, url: str, tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = open_storage(f"{url}/in")
    table = rows(videos)
    for row in table:
        store.put(f"deep/{row['uri']}", (videos / str(row["uri"])).read_bytes())
        row["uri"] = f"{url}/in/deep/{row['uri']}"
    table[1]["uri"] = str(table[1]["uri"]).removeprefix(f"{url}/in/")  # relative to the manifest
    table += [{"uri": f"{url}/in/gone.mp4", "caption": "x"}, {"uri": "s3://no-such-bucket/a.mp4", "caption": "x"}]
    columns = {key: [row.get(key) for row in table] for key in ("uri", "caption", "licence", "scores")}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    write_jsonl(tmp_path / "list.jsonl", table)
    store.put(f"list.{kind}", (tmp_path / f"list.{kind}").read_bytes())
    report = prepare(f"{url}/in/list.{kind}", None, f"{url}/out", config=SMALL)
    assert {skip.file: skip.reason for skip in report.skipped} == {
        f"{url}/in/gone.mp4": "no such file",
        "s3://no-such-bucket/a.mp4": "can't be read",
    }
    assert "the bucket doesn't exist" in report.skipped[0].detail
    assert videos_in(f"{url}/out") == videos_in(local)
    # What finished parts have isn't read again.
    store.delete([name for name in store.list() if name.endswith(".mp4")])
    again = prepare(f"{url}/in/list.{kind}", None, f"{url}/out", config=SMALL)
    assert again.num_samples == 6 and again.skipped == report.skipped


def test_tars_and_a_job_array(videos: Path, local: Path, url: str, tmp_path: Path) -> None:
    for number, row in enumerate(rows(videos)):
        said = {key: value for key, value in row.items() if key != "uri"}
        members = {"v.mp4": (videos / str(row["uri"])).read_bytes(), "v.json": json.dumps(said).encode()}
        open_storage(f"{url}/in").put(f"{number}.tar", write_tar(tmp_path / "one.tar", members).read_bytes())
    for index in range(2):
        prepare(f"{url}/in", None, f"{url}/out", config=SMALL, share=Share(index, 2))
    report = merge_directories([f"{url}/out"], f"{url}/out")
    assert (report.num_samples, report.num_copied) == (6, 0)
    assert videos_in(f"{url}/out") == videos_in(local)
    brace = prepare(f"{url}/in/{{0..2}}.tar", None, tmp_path / "brace", config=SMALL)
    assert brace.num_samples == 3


def test_encoding_in_a_bucket_killed_anywhere(local: Path, url: str, recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, [])

    def run_into(out: str | Path, share: Share, source: Recipe = loaded) -> None:
        encode(source, local, out, share=share, text=True)

    for index in range(2):
        run_into(tmp_path / "l", Share(index, 2))
    expected = held(tmp_path / "l")
    for write in (2, 6):
        place = f"{url}/{write}"
        run_into(place, Share(0, 2))
        assert killed_at(write, lambda place=place: run_into(place, Share(1, 2)))  # type: ignore[misc]
        run_into(place, Share(1, 2))
        assert stored(place) == expected, write
    # Another number of jobs takes over what one of two has finished.
    run_into(f"{url}/other", Share(0, 2))
    for index in range(3):
        run_into(f"{url}/other", Share(index, 3))
    assert latents_in(f"{url}/other") == latents_in(tmp_path / "l")


def test_the_command_on_two_ranks(local: Path, url: str, recipe: Path, tmp_path: Path) -> None:
    lines = encode(load_recipe(recipe, []), local, tmp_path / "one", text=True)
    assert any("encoded, 0 copied" in line for line in lines)
    words = ["encode", str(recipe), "--videos", str(local), "--out", url, "--ranks", "2", "--text", "--batch", "3"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "framework.cli", *words], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert latents_in(url) == latents_in(tmp_path / "one")
    assert done.stdout.splitlines() == [line.replace(str(tmp_path / "one"), url) for line in lines]
