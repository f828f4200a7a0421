"""Kills at random moments, and two attempts at once, on a light run (tools/soak): at most one commits, none is lost."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kills
import light
import pool
import pytest
import shadow

from framework.checkpoint.config import CheckpointConfig

SEED = 20


@pytest.fixture(scope="module")
def run() -> shadow.Uninterrupted:
    return shadow.Uninterrupted()


def test_eight_kills(tmp_path: Path) -> None:
    """tools/soak/checkpoint.py in short, the same each time as far as the moments go."""
    soak = kills.soak_directory(pool.context(), tmp_path / "store", ranks=2, seed=SEED)
    for number in range(8):
        print(f"{number:4} {soak.cycle()}")
    print(soak.finish())
    assert soak.tally.kills.total() == 8
    assert soak.floor > 7, "there were commits"


def two_attempts(
    store: str, place: light.Place, *, keep: int, meanwhile: Callable[[kills.Attempt, kills.Attempt], None]
) -> tuple[kills.Attempt, kills.Attempt]:
    """An older attempt stops at step 4, in its second save; a newer one begins; `meanwhile` says what follows."""
    config = CheckpointConfig(every=2, keep=keep)
    # The newer one stops where it begins, as often as it may be asked to.
    plan = light.Plan(store, num_ranks=2, pause=0.02, checkpoint=config, stop=(4, place))
    newer_plan = replace(plan, num_ranks=1, stop=(2, "begin"))
    with kills.attempt(pool.context(), plan) as older:
        older.listen_until(lambda: older.values("stopping") == [place], "the stop of the older attempt")
        wait_until_stopped(older)
        with kills.attempt(pool.context(), newer_plan) as newer:
            newer.listen_until(lambda: newer.values("stopping") == ["begin"], "the stop of the newer attempt")
            wait_until_stopped(newer)
            assert newer.values("resumed") == [(2, 0)]
            meanwhile(older, newer)
            newer.send(signal.SIGKILL, [0])
            newer.end(0)
    return older, newer


def wait_until_stopped(running: kills.Attempt) -> None:
    stat = Path(f"/proc/{running.processes[0].pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def go_on(running: kills.Attempt) -> None:
    running.send(signal.SIGCONT, [0])


def saves(running: kills.Attempt, count: int) -> None:
    running.listen_until(lambda: len(running.saved()) >= count, f"{count} saves")


def ends_taken_over(older: kills.Attempt) -> None:
    """All its ranks end by themselves, for this reason, and nothing after its first save has come of it."""
    assert older.end(30), "the older attempt goes on"
    failures = older.failures()
    assert len(failures) == older.plan.num_ranks
    assert any("attempt 1 has taken over" in text and "attempt 0, saves nothing more" in text for text in failures)
    assert [entry for entry, _ in older.saved()] == [(2, 0)]


def check_newest(store: Path, run: shadow.Uninterrupted, *, attempt: int) -> shadow.Scan:
    """The newest is one of `attempt`, whole, and the uninterrupted run's, as torch's DCP reads it."""
    soak = kills.Soak(pool.context(), str(store), shadow.Files(store), 1, random.Random(0), run=run)
    found = shadow.scan(soak.objects)
    assert found.newest is not None and found.newest[1] == attempt, found
    soak.check_newest(found)
    return found


@pytest.mark.parametrize("place", ["write", "commit"])
def test_the_older_of_two_attempts_stops(tmp_path: Path, run: shadow.Uninterrupted, place: light.Place) -> None:
    """It stalls before it writes its files, or when it has looked at the fence and is about to write the manifest.

    The newer one has begun and saved when the older goes on; it keeps both of its checkpoints whatever lands late.
    """

    def meanwhile(older: kills.Attempt, newer: kills.Attempt) -> None:
        go_on(newer)
        saves(newer, 2)
        go_on(older)
        ends_taken_over(older)
        newer.listen(0)  # to what it has told by now
        saves(newer, len(newer.saved()) + 2)  # the first of them may have been on its way

    _, newer = two_attempts(str(tmp_path), place, keep=2, meanwhile=meanwhile)
    assert not newer.failures()
    found = check_newest(tmp_path, run, attempt=1)
    assert not [entry for entry in found.folders if entry[1] == 0], "nothing of the older is left"


def test_a_late_manifest_does_not_count(tmp_path: Path, run: shadow.Uninterrupted) -> None:
    """It lands when the newer attempt has put down where it began, and saved nothing yet."""

    def meanwhile(older: kills.Attempt, newer: kills.Attempt) -> None:
        go_on(newer)
        newer.listen_until(lambda: (tmp_path / "fence/0001-start.json").exists(), "the start of the newer attempt")
        newer.send(signal.SIGSTOP, [0])
        wait_until_stopped(newer)
        go_on(older)
        ends_taken_over(older)
        assert (tmp_path / "step-00000004-0000/manifest.json").exists()
        found = shadow.scan(shadow.Files(tmp_path))
        assert (4, 0) not in found.counted
        go_on(newer)
        saves(newer, 2)

    two_attempts(str(tmp_path), "commit", keep=3, meanwhile=meanwhile)
    found = check_newest(tmp_path, run, attempt=1)
    assert (4, 0) not in found.folders


def test_a_late_commit_deletes_nothing_that_a_newer_attempt_needs(tmp_path: Path, run: shadow.Uninterrupted) -> None:
    """With one checkpoint to keep: the older commits step 4 while the newer, which has read step 2, hasn't put down yet
    that it began there. Then step 4 doesn't count, and step 2 is all that the run has.
    """

    def meanwhile(older: kills.Attempt, newer: kills.Attempt) -> None:
        go_on(older)
        ends_taken_over(older)
        go_on(newer)
        newer.listen_until(lambda: (tmp_path / "fence/0001-start.json").exists(), "the start of the newer attempt")

    two_attempts(str(tmp_path), "commit", keep=1, meanwhile=meanwhile)
    found = shadow.scan(shadow.Files(tmp_path))
    assert found.newest is not None, "all is lost"
    kills.Soak(pool.context(), str(tmp_path), shadow.Files(tmp_path), 1, random.Random(0), run=run).check_newest(found)


def test_a_wrong_value_is_seen(tmp_path: Path, run: shadow.Uninterrupted) -> None:
    """The soak itself can fail: an attempt that doesn't go on where it was is noticed."""
    found: dict[str, Any] = {f"model.{name}": light.frozen_value(name) for name in light.FROZEN}
    found |= {key: light.torch.from_numpy(value.copy()) for key, value in run.tensors(3).items()}
    shadow.check_values(found, run, 3)
    with pytest.raises(shadow.Violation, match=r"step 4 differs from the uninterrupted run in \d+ elements"):
        shadow.check_values(found, run, 4)
