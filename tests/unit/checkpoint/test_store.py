"""What counts as a checkpoint, what is refused, what stays: on a directory."""

import json
import shutil
from pathlib import Path

import pytest
from stores import TinyState, open_saver, save_steps

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.fence import Fence, TakenOver, check_owner, claim, own
from framework.checkpoint.find import list_checkpoints, newest, open_checkpoint
from framework.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Entry, Progress
from framework.checkpoint.retention import give_name, surplus
from framework.run import RunFailure
from framework.storage.directory import Directory


def folder(step: int, attempt: int = 0) -> str:
    return f"step-{step:08}-{attempt:04}"


def steps(storage: Directory) -> list[int]:
    return sorted(int(name.split("-")[1]) for name in storage.list() if name.endswith(MANIFEST))


def test_a_committed_checkpoint_is_found(tmp_path: Path) -> None:
    storage = save_steps(tmp_path, [3, 7])
    found = newest(storage)
    assert found is not None and found.manifest.progress == Progress(step=7, samples=28, updates=7)
    files = {path.name: path.stat().st_size for path in (tmp_path / folder(7)).iterdir() if path.name != MANIFEST}
    assert {name: file.size for name, file in found.manifest.files.items()} == files
    assert newest(Directory(str(tmp_path / "absent"))) is None


def test_without_a_manifest_there_is_none(tmp_path: Path) -> None:
    storage = save_steps(tmp_path, [3, 7])
    (tmp_path / folder(7) / MANIFEST).unlink()
    found = newest(storage)
    assert found is not None and found.entry == Entry(3, 0)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": lambda path: (path / "model-00000.distcp").unlink(),
    "truncated": lambda path: (path / "ema-00000.distcp").write_bytes((path / "ema-00000.distcp").read_bytes()[:-1]),
    "no metadata": lambda path: (path / ".metadata").unlink(),
    "manifest cut": lambda path: (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:-50]),
    "manifest changed": lambda path: flip(path / MANIFEST, 40),
    "manifest empty": lambda path: (path / MANIFEST).write_bytes(b""),
    "newer": lambda path: (path / MANIFEST).write_text(json.dumps({"format": "cuboid.checkpoint/3"})),
}
NAMED = {"missing": "model-00000.distcp is missing", "truncated": "ema-00000.distcp has", "no metadata": ".metadata"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    storage = save_steps(tmp_path, [3, 5, 7])
    DAMAGES[damage](tmp_path / folder(7))
    with pytest.raises(DamagedCheckpoint) as refusal:
        newest(storage)
    assert f"{tmp_path}/{folder(7)}/" in str(refusal.value)
    assert NAMED.get(damage, MANIFEST) in str(refusal.value)
    assert "resume.fall_back=true goes on from the one before it, of step 5" in str(refusal.value)
    found = newest(storage, fall_back=True)
    assert found is not None and found.entry.step == 5
    if damage == "newer":
        assert "format cuboid.checkpoint/3" in str(refusal.value) and "install the cuboid that wrote it" in str(
            refusal.value
        )


def test_a_folder_of_something_else_is_nothing(tmp_path: Path) -> None:
    storage = save_steps(tmp_path, [3])
    shutil.copytree(tmp_path / folder(3), tmp_path / "step-00000009-0000.copy")
    shutil.copytree(tmp_path / folder(3), tmp_path / "copy-of-step-3")
    found = newest(storage)
    assert found is not None and found.entry.step == 3


def test_words_for_a_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, [3, 7])
    for place, step, expected in ((tmp_path, None, 7), (tmp_path, 3, 3), (tmp_path / folder(3), None, 3)):
        _, found = open_checkpoint(f"{place}/", step=step)
        assert found.entry.step == expected
    with pytest.raises(ValueError, match=r"has no checkpoint of step 4 yet; it has those of the steps 3, 7"):
        open_checkpoint(str(tmp_path), step=4)
    (tmp_path / folder(7) / MANIFEST).unlink()
    with pytest.raises(ValueError, match="it has no manifest, so it was never finished"):
        open_checkpoint(str(tmp_path / folder(7)))


def test_an_older_attempt_cannot_commit(tmp_path: Path) -> None:
    storage, state = Directory(str(tmp_path)), TinyState()
    first = claim(storage, first=0)
    first.begin(0)
    saver = open_saver(storage, state, first, CheckpointConfig())
    saver.save(Progress(step=1))
    saver.wait()
    second = claim(storage, first=0)
    assert (first.attempt, second.attempt) == (0, 1)
    second.check()
    with pytest.raises(TakenOver):
        first.check()
    saver.save(Progress(step=2))
    with pytest.raises(RunFailure, match=r"attempt 1 has taken over .*; this one, attempt 0, saves nothing more"):
        saver.wait()
    assert saver.failed and steps(storage) == [1]
    saver.close()


def test_a_commit_that_came_too_late_does_not_count(tmp_path: Path) -> None:
    """Attempt 0 had looked at the fence before attempt 1 claimed the store, and wrote its manifest after that."""
    storage = save_steps(tmp_path, [1, 2])
    Fence(storage, 1).begin(1)
    found = newest(storage)
    assert found is not None and found.entry == Entry(1, 0)
    Fence(storage, 1).begin(2)
    found = newest(storage)
    assert found is not None and found.entry == Entry(2, 0)


def test_a_store_is_one_run_s(tmp_path: Path) -> None:
    storage = save_steps(tmp_path, [1])
    check_owner(storage, None)
    own(storage, "a", "runs/a")
    own(storage, "a", "runs/moved")
    for identity in ("b", None):
        with pytest.raises(ValueError, match=r"holds the checkpoints of another run, runs/a: .*checkpoint\.store"):
            check_owner(storage, identity)
    with pytest.raises(ValueError, match="another run, runs/a"):
        own(storage, "b", "runs/b")


def test_what_stays() -> None:
    entries = [Entry(step, 0) for step in range(10, 110, 10)]
    sizes = dict.fromkeys(entries, 10**9)

    def gone(**words: float) -> list[int]:
        config = CheckpointConfig(**words)  # type: ignore[arg-type]
        return [entry.step for entry in surplus(entries, sizes, {Entry(10, 0)}, config)]

    assert gone(keep=3) == [20, 30, 40, 50, 60, 70]
    assert gone(keep=2, keep_every=40) == [20, 30, 50, 60, 70]
    assert gone(keep=20) == []
    # 10 has a name; of the others the newest that fit into 4 GB beside it.
    assert gone(keep=20, max_gigabytes=4) == [20, 30, 40, 50, 60, 70]
    assert gone(keep=20, max_gigabytes=0.5) == [20, 30, 40, 50, 60, 70, 80, 90]
    assert surplus([], {}, set(), CheckpointConfig()) == []


def test_retention_and_names_in_a_store(tmp_path: Path) -> None:
    storage = save_steps(tmp_path, [1, 2])
    give_name(storage, Entry(1, 0), "before-the-decay")
    with pytest.raises(ValueError, match="must consist of letters"):
        give_name(storage, Entry(1, 0), "../x")
    leftover = tmp_path / folder(9)
    leftover.mkdir()
    (leftover / "model-00000.distcp").write_bytes(b"x")
    second = claim(storage, first=0)
    second.begin(2)
    saver = open_saver(storage, TinyState().at(3), second, CheckpointConfig(keep=1))
    saver.save(Progress(step=3))
    saver.wait()
    saver.close()
    assert steps(storage) == [1, 3]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [folder(1), folder(3, 1)]


def test_a_name_keeps_what_no_longer_counts(tmp_path: Path) -> None:
    """A later attempt went on from before it, as a person does who passes over a damaged one."""
    storage = save_steps(tmp_path, [1, 2, 3])
    give_name(storage, Entry(2, 0), "to-look-at")
    second = claim(storage, first=0)
    second.begin(1)
    saver = open_saver(storage, TinyState().at(2), second, CheckpointConfig(keep=1))
    saver.save(Progress(step=2))
    saver.close()
    assert list_checkpoints(storage)[0] == [Entry(2, 1)]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [folder(2), folder(2, 1)]


def test_a_failing_write_is_tried_again_then_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framework.checkpoint import save, writer

    monkeypatch.setattr(save, "FIRST_WAIT_SECONDS", 0.01)
    storage, state = Directory(str(tmp_path)), TinyState()
    fence, failures = claim(storage, first=0), [2]
    saver = open_saver(storage, state, fence, CheckpointConfig(retries=2))
    original = writer.write_file

    def failing(store, name, *rest):  # type: ignore[no-untyped-def]
        if name.endswith("exp_avg-00000.distcp") and failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error", name)
        return original(store, name, *rest)

    monkeypatch.setattr(writer, "write_file", failing)
    saver.save(Progress(step=1))
    saver.wait()
    lines = saver.report()
    assert len(lines) == 3 and "Input/output error" in lines[0] and "trying again, 1 of 2" in lines[0]
    assert lines[2].startswith("saved step-00000001-0000") and saver.report() == []
    failures[0] = 3
    state.at(2)
    saver.save(Progress(step=2))
    with pytest.raises(RunFailure, match=r"rank 0 couldn't write step-00000002-0000: Input/output error .*untouched"):
        saver.wait()
    assert steps(storage) == [1]
    saver.close()
