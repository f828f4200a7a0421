"""A crash before any change that a save makes to the disk, and an error of any of them."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from framework.checkpoint import save as save_module
from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.fence import claim
from framework.checkpoint.find import newest
from framework.checkpoint.manifest import Origin, Progress
from framework.checkpoint.read import CheckpointReader
from framework.checkpoint.resume import resume
from framework.checkpoint.save import Saver
from framework.checkpoint.writer import Subject
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import lone_mesh
from framework.run import RunFailure
from framework.storage.directory import Directory

CHANGES: Final = ("open", "write", "fsync", "replace", "link", "unlink", "rmdir", "mkdir")
SHARDS: Final = (
    ParameterShard.whole("a", (5, 3)),
    ParameterShard("frozen", (4,), (0,), (4,), trainable=False),
)
FROZEN: Final = torch.arange(4.0)


class Crash(BaseException):
    """The process is gone."""


@contextmanager
def before_each_change(monkeypatch: pytest.MonkeyPatch, action: Callable[[str], None]) -> Iterator[None]:
    """Call `action` before every call that changes the file system."""
    with monkeypatch.context() as patch:
        for name in CHANGES:
            original = getattr(os, name)

            def replacement(
                *args: Any, name: str = name, original: Callable[..., Any] = original, **kwargs: Any
            ) -> Any:
                if name != "open" or args[1] & os.O_CREAT:
                    action(name)
                return original(*args, **kwargs)

            patch.setattr(os, name, replacement)
        yield


def values(step: int) -> torch.Tensor:
    return torch.arange(15.0) + 100 * step


class Run:
    """An attempt of one rank at a store; its weights are a function of the step."""

    def __init__(self, path: Path, **config: Any) -> None:
        self.storage = Directory(str(path))
        self.fence = claim(self.storage, first=0)
        self.flat, frozen = torch.zeros(15), torch.zeros(4)
        fragments = [Fragment("model", SHARDS[0], 0, self.flat), Fragment("model", SHARDS[1], 0, frozen)]
        mesh = lone_mesh()
        resumed = resume(self.storage, fragments, mesh.control, fall_back=False)
        self.step = 0
        if resumed is None:
            self.flat.copy_(values(0))
            frozen.copy_(FROZEN)
        else:
            self.step = resumed.found.entry.step
        assert torch.equal(self.flat, values(self.step)) and torch.equal(frozen, FROZEN)
        self.fence.begin(self.step)
        known = None if resumed is None else resumed.frozen
        self.saver = Saver(
            self.storage,
            CheckpointConfig(every=1, **config),
            mesh,
            fence=self.fence,
            subject=Subject(Origin(attempt=self.fence.attempt), {}, SHARDS, known=known),
            fragments=fragments,
        )

    def save(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step += 1
            self.flat.copy_(values(self.step))
            self.saver.save(Progress(step=self.step))
            self.saver.wait()


def check(path: Path) -> int:
    """The newest checkpoint is whole and has the values of its step; its step."""
    storage = Directory(str(path))
    found = newest(storage)
    if found is None:
        return 0
    reader = CheckpointReader(storage, found)
    reader.check()
    assert torch.equal(reader.whole("model.a").view(-1), values(found.entry.step))
    assert torch.equal(reader.whole("model.frozen"), FROZEN)
    return found.entry.step


def count_changes(path: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> list[str]:
    """What a run of four saves does."""
    calls: list[str] = []
    with before_each_change(monkeypatch, calls.append):
        Run(path, **config).save(4)
    return calls


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_before_any_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    """What is there is whole, is no older than what was there, and the next attempt leaves nothing of the wreck."""
    total = len(count_changes(tmp_path / "whole", monkeypatch, keep=keep))
    for number in range(total):
        path, left, dead = tmp_path / str(number), [number], [False]

        def crash(name: str, left: list[int] = left, dead: list[bool] = dead) -> None:
            left[0] -= 1
            if left[0] < 0 or dead[0]:
                dead[0] = True
                raise Crash

        committed = 0
        with before_each_change(monkeypatch, crash):
            with suppress(Crash):
                run = Run(path, keep=keep)
                for _ in range(4):
                    run.save(1)
                    committed = run.step
        assert dead[0]
        assert check(path) in (committed, committed + 1)
        run = Run(path, keep=keep)
        assert run.step in (committed, committed + 1)
        run.save(2)
        folders = {name.name for name in path.iterdir() if any(name.iterdir())} - {"fence", "frozen"}
        kept = list(range(1, run.step + 1))[-keep:]
        assert {folder.split("-")[1] for folder in folders} == {f"{step:08}" for step in kept}, number
        for folder in folders:
            assert {name.name for name in (path / folder).iterdir()} == {
                ".metadata",
                "manifest.json",
                "model-00000.distcp",
            }


def test_an_error_of_any_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is tried again, and whatever it overwrites then, the newest checkpoint is whole at every moment."""
    monkeypatch.setattr(save_module, "FIRST_WAIT_SECONDS", 0.001)
    for number in range(len(count_changes(tmp_path / "counted", monkeypatch, keep=1))):
        path, left, floor = tmp_path / str(number), [number], [0]
        run = Run(path, keep=1)

        def fail_once(name: str, path: Path = path, left: list[int] = left, floor: list[int] = floor) -> None:
            left[0] -= 1
            if left[0] < 0:
                step = check(path)
                assert step >= floor[0]
                floor[0] = step
            if left[0] == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with before_each_change(monkeypatch, fail_once):
            run.save(4)
        assert check(path) == 4


def test_a_disk_that_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "FIRST_WAIT_SECONDS", 0.001)
    run = Run(tmp_path)
    run.save(2)

    def full(name: str) -> None:
        if name in ("write", "fsync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    with before_each_change(monkeypatch, full):
        with pytest.raises(RunFailure, match=r"rank 0 couldn't write step-00000003-0000: No space left .* untouched"):
            run.save(1)
    assert sum("trying again" in line for line in run.saver.report()) == 2
    assert check(tmp_path) == 2
    assert not list(tmp_path.rglob("step-00000003*/*")), "nothing takes up room"
    assert Run(tmp_path).step == 2


def test_a_listing_that_fails_is_not_an_empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for empty, the run would begin anew, and its first save delete everything older."""
    Run(tmp_path).save(1)

    def broken(path: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match="Input/output error"):
        newest(Directory(str(tmp_path)))


def test_what_leads_to_a_file_is_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of a new folder lies in the folder above it."""
    flushed: list[str] = []
    original = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (flushed.append(os.readlink(f"/proc/self/fd/{file}")), original(file))
    )
    Directory(str(tmp_path / "a/b")).put("c/d", b"x")
    assert {str(tmp_path / name) for name in ("", "a", "a/b", "a/b/c")} <= set(flushed)


def test_what_cannot_be_deleted_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is saved: written anew it wouldn't help, and the run needn't stop."""
    run = Run(tmp_path, keep=1)

    def fixed(name: str) -> None:
        if name == "unlink":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(tmp_path))

    with before_each_change(monkeypatch, fixed):
        run.save(3)
    assert capfd.readouterr().err.count("should go but can't be deleted: Operation not permitted") == 2
    assert not [line for line in run.saver.report() if "trying again" in line]
    assert check(tmp_path) == 3
    run.save(1)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000004-0000"]


def test_two_claims_are_never_the_same_bytes(tmp_path: Path) -> None:
    """A store that tries a conditional write again tells its own from another's by what is in it."""
    storage = Directory(str(tmp_path))
    claims = [storage.read(f"fence/{claim(storage, first=0).attempt:04}.json") for _ in range(2)]
    assert claims[0] != claims[1]
