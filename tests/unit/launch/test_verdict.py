"""How attempts end, and what follows: every row of the guide's table, by hand."""

from dataclasses import replace

import pytest

from framework.failure import Failure
from framework.heartbeat import Heartbeat
from framework.history import Event
from framework.launch.verdict import Ended, Evidence, Hang, decide, headline, judge, killed_tasks, lost_nodes
from framework.run import Verdict

KILLED = """\
srun: error: node1: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=2.0
slurmstepd-node0: error: *** STEP 2.0 ON node0 CANCELLED AT 2026-11-26T17:30:59 ***
srun: error: node0: tasks 0-1: Exited with exit code 143
"""
LOST = """\
srun: error: Node failure on node2
srun: error: node0: tasks 0-1: Killed
"""
BEAT = Heartbeat(attempt=2, phase="step", time=0.0, since=0.0, step=47, saved=45)
FAILURE = Failure(3, "error: something", 1, 0.0, "failure", "RunFailure", "step", 47)
SEEN = Evidence(status=1, srun="", beat=BEAT)


def verdict_of(**changes: object) -> Ended:
    return judge(replace(SEEN, **changes))  # type: ignore[arg-type]


def test_all_steps() -> None:
    ended = verdict_of(status=0, verdict=Verdict("done", 50))
    assert (ended.outcome, ended.step) == ("done", 50)


def test_a_signal_that_saved() -> None:
    ended = verdict_of(verdict=Verdict("stopped", 48, 12))
    assert (ended.outcome, ended.step, ended.reason) == ("preempted", 48, "SIGUSR2: every rank has saved step 48")


def test_cancelled_with_and_without_a_step_saved() -> None:
    saved = verdict_of(verdict=Verdict("stopped", 48, 15), told=True, cancelled=True)
    assert (saved.outcome, saved.step, saved.reason) == ("cancelled", 48, "cancelled; every rank has saved step 48")
    cut = verdict_of(srun=KILLED, told=True, cancelled=True)
    assert (cut.outcome, cut.step) == ("cancelled", 45) and "nothing was saved" in cut.reason


def test_a_killed_rank_names_its_node() -> None:
    consequence = replace(FAILURE, kind="lost_peer", message="error: Connection closed by peer")
    ended = verdict_of(srun=KILLED, failure=consequence)
    assert (ended.outcome, ended.suspect, ended.reason) == ("retry", "node1", "task 3: Killed")
    assert killed_tasks(KILLED) == [("node1", "task 3: Killed")]


def test_a_lost_node_is_bad_and_the_killed_tasks_a_consequence() -> None:
    assert lost_nodes(LOST) == ("node2",)
    ended = verdict_of(srun=LOST, lost=("node2",))
    assert (ended.outcome, ended.bad, ended.suspect) == ("retry", ("node2",), None)


def test_a_hang_names_who_gave_no_sign() -> None:
    ended = verdict_of(hang=Hang("step", 901.0, 900.0, {6: "node3", 7: "node3"}))
    assert (ended.outcome, ended.suspect) == ("retry", "node3")
    assert "rank 6 on node3, rank 7 on node3" in ended.reason and "watch.step=900" in ended.reason
    both = verdict_of(hang=Hang("import", 10.0, 5.0, {0: "node0", 7: "node3"}))
    assert both.suspect is None and "watch.start=5" in both.reason


@pytest.mark.parametrize("kind", ["mistake", "numbers"])
def test_what_would_fail_again_is_fatal(kind: str) -> None:
    ended = verdict_of(failure=replace(FAILURE, kind=kind))
    assert (ended.outcome, ended.reason) == ("fatal", "something")


def test_a_crash_is_fatal_before_the_first_step_only() -> None:
    trace = "Traceback (most recent call last):\n  File x\nNameError: name 'modle' is not defined\n"
    crash = replace(FAILURE, kind="crash", message=trace, phase="build")
    assert verdict_of(failure=crash).outcome == "fatal"
    assert "NameError: name 'modle' is not defined" in verdict_of(failure=crash).reason
    assert verdict_of(failure=replace(crash, phase="step")).outcome == "retry"
    assert verdict_of(failure=replace(crash, kind="storage")).outcome == "retry"


def test_a_newer_attempt_ends_the_older_job() -> None:
    assert verdict_of(failure=replace(FAILURE, kind="storage", error="TakenOver")).outcome == "fatal"


def test_nothing_known() -> None:
    ended = verdict_of(status=137, srun="srun: error: something\n")
    assert ended.outcome == "retry" and "status 137: srun: error: something" in ended.reason


def test_headlines() -> None:
    assert headline("error: a\nb") == "a"
    assert headline("Traceback (most recent call last):\n  x\nKeyError: 'a'\n") == "KeyError: 'a'"
    assert headline("") == "no message"


def event(name: str, **fields: object) -> Event:
    return Event(name, 0.0, **fields)  # type: ignore[arg-type]


RETRY = Ended("retry", "task 3: Killed on node1", 45, kind="killed")
LOST_ONE = event("ended", outcome="retry", step=45, kind="killed")
BEGUN = [event("submitted"), event("started"), event("launched")]


def follows(ended: Ended, *past: Event, restarts: int = 2, requeues: int = 1) -> str:
    return decide(ended, [*BEGUN, *past], restarts=restarts, requeues=requeues).what


def test_ends_that_end_the_job() -> None:
    for outcome in ("done", "fatal", "cancelled"):
        assert follows(replace(RETRY, outcome=outcome)) == "finish"
    assert follows(Ended("preempted", "", 48)) == "requeue"


def test_restarts_then_requeues_then_gives_up() -> None:
    """restarts=2, requeues=1: three attempts, the queue, three more, the end. The first end brings step 45."""
    first = [LOST_ONE]
    assert follows(RETRY) == "restart"
    assert follows(RETRY, *first) == "restart"
    assert follows(RETRY, *first, LOST_ONE) == "restart"
    assert follows(RETRY, *first, LOST_ONE, LOST_ONE) == "requeue"
    again = [*first, LOST_ONE, LOST_ONE, LOST_ONE, event("requeued", outcome="retry"), event("started")]
    assert follows(RETRY, *again) == "restart"
    assert follows(RETRY, *again, LOST_ONE, LOST_ONE) == "finish"
    given_up = decide(RETRY, [*BEGUN, *again, LOST_ONE, LOST_ONE], restarts=2, requeues=1)
    assert given_up.outcome == "fatal" and "gave up after 6 failures" in given_up.reason


def test_a_new_checkpoint_starts_the_count_again() -> None:
    past = [LOST_ONE] * 3
    assert follows(replace(RETRY, step=50), *past) == "restart"
    assert follows(RETRY, *past, replace(LOST_ONE, step=50)) == "restart"


def test_a_preemption_doesnt_count_as_a_failure() -> None:
    past = [event("requeued", outcome="preempted"), event("started")] * 5
    assert follows(RETRY, *past, LOST_ONE, LOST_ONE, LOST_ONE) == "requeue"


def test_no_restart_where_none_is_allowed() -> None:
    assert follows(RETRY, restarts=0) == "requeue"
    assert follows(RETRY, restarts=0, requeues=0) == "finish"


def test_the_same_memory_twice() -> None:
    memory = Ended("retry", "out of memory", 45, kind="memory 47")
    assert follows(memory, event("ended", outcome="retry", step=45, kind="memory 47")) == "finish"
    assert follows(memory, event("ended", outcome="retry", step=45, kind="memory 46")) == "restart"


def test_a_new_submission_starts_the_count_again() -> None:
    past = [LOST_ONE] * 3
    assert follows(RETRY, *past, event("submitted"), event("started")) == "restart"


def test_preemptions_that_bring_nothing_end_after_a_while() -> None:
    idle = event("ended", outcome="preempted", step=45)
    stopped = Ended("preempted", "SIGUSR2", 45)
    assert follows(stopped, *[idle] * 20) == "requeue"  # the first of them brought step 45
    assert follows(stopped, *[idle] * 21) == "finish"
    assert follows(replace(stopped, step=46), *[idle] * 21) == "requeue"


def test_told_before_a_step_was_saved_is_no_failure() -> None:
    told = verdict_of(told=True)
    assert (told.outcome, told.kind) == ("retry", "told") and follows(told, *[LOST_ONE] * 9) == "requeue"


def test_a_mistake_isnt_hidden_by_a_node_that_doesnt_answer() -> None:
    assert verdict_of(failure=replace(FAILURE, kind="mistake"), lost=("node2",)).outcome == "fatal"
