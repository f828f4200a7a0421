"""Where the time went, against sums by hand; every account adds up to the wall time."""

from dataclasses import replace

import pytest
from histories import DIED, LAUNCHED, RESTARTED, RUNS

from framework.history import Event
from framework.launch.account import Account, Attempt, account
from framework.run import Verdict


def parts(found: Account) -> dict[str, float]:
    assert sum(found.parts.values()) == pytest.approx(found.wall, abs=1e-9)
    return {part: round(seconds, 6) for part, seconds in found.parts.items() if seconds}


def test_a_run_that_restarts_in_its_job() -> None:
    """Attempt 0: 129 usual steps in 258 s and 2 s of the first, of which 100 of 130 count: 200 s; 60 s are lost, and
    the second in which it died. Attempt 1: 30 steps in 62 s after a first of 12: a usual one takes 62 / 30.
    """
    attempts = [Attempt(0, DIED), Attempt(1, RUNS, alive=True)]
    found = account([*LAUNCHED, *RESTARTED], attempts, now=1621.0)
    usual = 62 / 30
    assert found.wall == 621 and found.idle == 0
    assert parts(found) == {
        "queue": 100,
        "launch": 30 + 5 + (1619 - 108 - 1510),
        "import": 20,
        "init": 10,
        "build": 20,
        "load": 15,
        "first_step": round(20 + 12 - usual, 6),
        "steps": round(200 + 62 + usual + 2, 6),
        "lost": 61,
        "save": 10,
        "observe": 9,
        "detect": 34,
        "between": 10,
    }
    assert found.num_steps == 131
    assert found.ratio == pytest.approx((264 + usual) / 621)
    (restart,) = found.restarts
    assert (restart.attempt, restart.detect, restart.lost) == (1, 34, 61)
    assert restart.seconds == pytest.approx(10 + 1 + 25 + 12 - usual)


def test_a_dead_attempt_counts_up_to_its_checkpoint() -> None:
    """Nobody knows yet where the next one goes on."""
    found = account([*LAUNCHED, RESTARTED[0]], [Attempt(0, DIED)], now=1520.0)
    assert (found.num_steps, parts(found)["steps"], parts(found)["between"]) == (100, 200, 20)
    alive = account(LAUNCHED, [Attempt(0, DIED, alive=True)], now=1470.0)
    assert (alive.num_steps, parts(alive)["steps"], "lost" in parts(alive)) == (130, 265, False)
    silent = account(LAUNCHED, [Attempt(0, DIED, alive=True, silent=True)], now=1600.0)
    assert (silent.num_steps, parts(silent)["detect"]) == (100, 134)


def test_a_later_attempt_may_go_back_further() -> None:
    """The third goes on at 50: of the first 50 steps count, of the second none."""
    third = replace(RUNS, attempt=2, resumed=50, step=50, phase="first_step", seconds={"import": 5.0}, since=1706.0)
    events = [*LAUNCHED, *RESTARTED, Event("launched", 1700.0, job="7", attempt=2)]
    attempts = [Attempt(0, DIED), Attempt(1, RUNS), Attempt(2, third, alive=True)]
    found = account(events, attempts, now=1710.0)
    assert found.num_steps == 50
    assert parts(found)["steps"] == 100


def test_an_attempt_that_came_not_so_far_tells_nothing() -> None:
    """It died while importing, before it knew where it goes on."""
    second = replace(RUNS, resumed=0, step=0, last=0, phase="import", since=1511.0, time=1512.0, seconds={})
    attempts = [Attempt(0, DIED), Attempt(1, second)]
    assert account([*LAUNCHED, *RESTARTED], attempts, now=1521.0).num_steps == 100


def test_a_requeue_and_the_time_nobody_wanted() -> None:
    """Stopped by a signal at 130, saved; 50 s in the queue again; finished. 1,000 s later it is submitted again."""
    verdict = Verdict("stopped", 130, 10)
    first = replace(DIED, phase="end", since=1465.0, time=1470.0, saved=130)
    events = [
        *LAUNCHED,
        Event("ended", 1471.0, job="7", attempt=0, outcome="preempted", step=130),
        Event("requeued", 1472.0, job="7"),
        Event("started", 1522.0, job="7", restart=1),
        Event("finished", 1530.0, job="7", outcome="retry"),
        Event("submitted", 2530.0, job="8"),
    ]
    found = account(events, [Attempt(0, first, verdict, closed=1470.5)], now=2540.0)
    assert (found.wall, found.idle) == (540, 1000)
    expected = {"queue": 100 + 50 + 10, "launch": 30 + 5 + 8, "steps": 260, "first_step": 20, "end": 6, "between": 1}
    assert {part: parts(found)[part] for part in expected} == expected
    over = account(events[:-1], [Attempt(0, first, verdict, closed=1470.5)], now=9999.0)
    assert over.wall == 530


def test_a_node_is_lost_with_its_supervisor() -> None:
    """Nothing tells of the end; the scheduler starts the job again."""
    events = [*LAUNCHED, Event("started", 1600.0, job="7", restart=1)]
    found = account(events, [Attempt(0, DIED)], now=1610.0)
    assert (parts(found)["between"], parts(found)["launch"], "detect" in parts(found)) == (134, 45, False)


def test_a_run_started_by_hand() -> None:
    """Two attempts and no history: 40 s between them, none after."""
    end = {"import": 3.0, "first_step": 5.0, "step": 40.0, "end": 2.0}
    first = replace(DIED, phase="end", since=150.0, time=151.0, step=11, seconds=end)
    second = replace(first, attempt=1, resumed=11, step=12, since=200.0, time=201.0, seconds={"first_step": 9.0})
    attempts = [
        Attempt(0, first, Verdict("stopped", 11, 15), 151.0),
        Attempt(1, second, Verdict("done", 12), closed=202.0),
    ]
    found = account([], attempts, now=5000.0)
    assert parts(found) == {"import": 3, "first_step": 1 + 5, "steps": 44 + 4, "between": 40, "end": 3 + 2}
    assert (found.wall, found.num_steps) == (102, 12)


def test_clocks_that_differ_break_nothing() -> None:
    """The ranks' clock is 500 s behind the supervisor's, or before it, and the end is seen before its time: what can't
    be is cut off.
    """
    ended = replace(RESTARTED[0], time=1300.0)
    for off in (-500, 500):
        other = replace(DIED, since=DIED.since + off, time=DIED.time + off)
        found = account([*LAUNCHED, ended], [Attempt(0, other)], now=1300.0)
        assert found.wall == 300 and sum(parts(found).values()) == 300


def test_nothing_yet() -> None:
    assert account([], [], now=5.0).wall == 0
    assert parts(account(LAUNCHED[:1], [], now=1010.0)) == {"queue": 10}
