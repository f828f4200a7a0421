"""Two attempts at once at one store, in each order that matters: at most one commits, and nothing is lost."""

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import kills
import light
import pool
import shadow

from framework.checkpoint.config import CheckpointConfig

LATE = "step-00000004-0000/manifest.json"
START = "fence/0001-start.json"


def two_attempts(
    soak: kills.Soak, place: light.Place, *, keep: int, meanwhile: Callable[[kills.Attempt, kills.Attempt], None]
) -> None:
    """An older attempt stops at `place` of its second save, of step 4; a newer one stops when it has read step 2 and is
    about to put down that it begins there; `meanwhile` says what follows. Then the newer one is killed.
    """
    config = CheckpointConfig(every=2, keep=keep)
    variables = tuple(soak.environment.items())
    plan = light.Plan(soak.store, 2, pause=0.02, checkpoint=config, stop=(4, place), environment=variables)
    with kills.attempt(pool.context(), plan) as older:
        older.listen_until(lambda: older.values("stopping") == [place], "the stop of the older attempt")
        wait_until_stopped(older)
        with kills.attempt(pool.context(), replace(plan, num_ranks=1, stop=(2, "begin"))) as newer:
            newer.listen_until(lambda: newer.values("stopping") == ["begin"], "the stop of the newer attempt")
            wait_until_stopped(newer)
            assert newer.values("resumed") == [(2, 0)]
            meanwhile(older, newer)
            assert not newer.failures()
            newer.send(signal.SIGKILL, [0])
            newer.end(0)


def wait_until_stopped(running: kills.Attempt) -> None:
    """Until rank 0's process is stopped."""
    stat = Path(f"/proc/{running.processes[0].pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def go_on(running: kills.Attempt) -> None:
    """Let a stopped attempt go on."""
    running.send(signal.SIGCONT, [0])


def wait_for_saves(running: kills.Attempt, count: int) -> None:
    """Until it has told of `count` saves more than by now."""
    running.listen(0)
    total = len(running.saved()) + count
    running.listen_until(lambda: len(running.saved()) >= total, f"{count} saves")


def wait_for_start(soak: kills.Soak, running: kills.Attempt) -> None:
    """Until it has put down where it began."""
    running.listen_until(lambda: START in soak.objects.sizes(), "the start of the newer attempt")


def ends_taken_over(older: kills.Attempt) -> None:
    """All its ranks end by themselves, for this reason, and have told of no save but the first."""
    assert older.end(30), "the older attempt goes on"
    failures = older.failures()
    assert len(failures) == older.plan.num_ranks
    assert any("attempt 1 has taken over" in text and "attempt 0, saves nothing more" in text for text in failures)
    assert [entry for entry, _ in older.saved()] == [(2, 0)]


def check_newest(soak: kills.Soak) -> shadow.Scan:
    """The newest is whole and the uninterrupted run's."""
    found = shadow.scan(soak.objects)
    soak.check_newest(found)
    return found


def older_stops(soak: kills.Soak, place: light.Place) -> None:
    """The newer one has begun and saved when the older goes on."""

    def meanwhile(older: kills.Attempt, newer: kills.Attempt) -> None:
        go_on(newer)
        wait_for_saves(newer, 2)
        go_on(older)
        ends_taken_over(older)
        wait_for_saves(newer, 2)  # the first of them may have been on its way

    two_attempts(soak, place, keep=2, meanwhile=meanwhile)
    found = check_newest(soak)
    assert found.newest is not None and found.newest[1] == 1
    assert not [entry for entry in found.folders if entry[1] == 0], "nothing of the older is left"


def late_manifest(soak: kills.Soak) -> None:
    """The older's lands when the newer has put down where it began, and saved nothing yet: it doesn't count."""

    def meanwhile(older: kills.Attempt, newer: kills.Attempt) -> None:
        go_on(newer)
        wait_for_start(soak, newer)
        newer.send(signal.SIGSTOP, [0])
        wait_until_stopped(newer)
        begun = shadow.scan(soak.objects).counted
        go_on(older)
        ends_taken_over(older)
        assert LATE in soak.objects.sizes()
        assert shadow.scan(soak.objects).counted == check_newest(soak).counted == begun
        go_on(newer)
        wait_for_saves(newer, 3)

    two_attempts(soak, "commit", keep=3, meanwhile=meanwhile)
    found = check_newest(soak)
    assert found.newest is not None and found.newest[1] == 1
    assert (4, 0) not in found.folders


def late_commit(soak: kills.Soak) -> None:
    """With one checkpoint to keep, the older commits step 4 while the newer, which has read step 2, hasn't put down yet
    that it began there. Then step 4 doesn't count, and step 2 is all that the run has.
    """

    def meanwhile(older: kills.Attempt, newer: kills.Attempt) -> None:
        go_on(older)
        ends_taken_over(older)
        assert LATE in soak.objects.sizes()
        go_on(newer)
        wait_for_start(soak, newer)

    two_attempts(soak, "commit", keep=1, meanwhile=meanwhile)
    assert check_newest(soak).newest is not None, "all is lost"
