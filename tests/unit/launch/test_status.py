"""States of runs whose files were written by hand, and the page that shows them."""

import fcntl
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from histories import DIED, LAUNCHED, RESTARTED, RUNS, Board, write_run

from framework.heartbeat import Heartbeat
from framework.history import Event
from framework.launch.facts import find_runs, read_facts
from framework.launch.page import as_json, overview, page
from framework.launch.queue import GONE, JobState, Scheduler, parse_job
from framework.launch.status import Status, is_ended, status_of
from framework.launch.stragglers import Stragglers, slowest_node
from framework.run import Verdict

WAITS, STARTS, BEGINS = LAUNCHED
ENDS, _, AGAIN = RESTARTED
FRESH = replace(DIED, time=1466.0)

PAGE = """\
{run}  RUNNING  step 131 of 1,000 (13%)  29:55 left
  job           7 on lab, 0 requeues, 1 restart
  attempt       1, in step, last sign 0:01 ago
  nodes         node0 node2, 4 ranks
  speed         6,000 tokens/s, 2.07 s a step
  loss          0.2500
  checkpoint    step 100, 3:41 ago
  slow node     node2, 1.36 times the median of the nodes
  left out      node1 (rank 3 was killed)
  last end      attempt 0: rank 3 was killed on node1

  effective training time 42.8% of 10:21
    steps that count            4:26  42.8%  #############
    steps done again            1:01   9.8%  ###
    waiting in the queue        1:40  16.1%  #####
    health checks, launch       0:36   5.8%  ##
    imports                     0:20   3.2%  #
    process groups              0:10   1.6%
    model and engine            0:20   3.2%  #
    weights, checkpoint         0:15   2.4%  #
    first step's excess         0:29   4.8%  #
    waiting for saves           0:10   1.6%
    validation, samples         0:09   1.4%
    seeing that it died         0:34   5.5%  ##
    between attempts            0:10   1.6%"""


def look(path: Path, now: float, scheduler: Scheduler | None = None) -> Status:
    return status_of(read_facts(path, now, scheduler))


def finished(outcome: str) -> Event:
    return Event("finished", 1502.0, job="7", outcome=outcome, reason="why", step=130)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("events", "beat", "state"),
    [
        ([WAITS], None, "QUEUED"),
        ([WAITS, STARTS], None, "STARTING"),
        ([replace(STARTS, time=999.0), WAITS], None, "STARTING"),
        (LAUNCHED, None, "STARTING"),
        (LAUNCHED, replace(FRESH, phase="load"), "STARTING"),
        (LAUNCHED, FRESH, "RUNNING"),
        (LAUNCHED, replace(FRESH, phase="observe"), "RUNNING"),
        (LAUNCHED, replace(FRESH, phase="save"), "SAVING"),
        (LAUNCHED, replace(FRESH, phase="end"), "SAVING"),
        (LAUNCHED, replace(FRESH, time=1405.0), "SILENT"),
        (LAUNCHED, replace(FRESH, time=1405.0, step_seconds=30.0), "RUNNING"),
        ([*LAUNCHED, ENDS], FRESH, "RESTARTING"),
        ([*LAUNCHED, ENDS, Event("requeued", 1501.0, job="7")], FRESH, "REQUEUED"),
        ([*LAUNCHED, ENDS, finished("done")], FRESH, "DONE"),
        ([*LAUNCHED, ENDS, finished("fatal")], FRESH, "FATAL"),
        ([*LAUNCHED, ENDS, finished("retry")], FRESH, "STOPPED"),
        ([*LAUNCHED, ENDS, finished("cancelled")], FRESH, "CANCELLED"),
        ([WAITS, Event("cancelled", 1400.0, job="7")], None, "CANCELLED"),
        ([*LAUNCHED, Event("cancelled", 1460.0, job="7")], FRESH, "SAVING"),
        ([*LAUNCHED, Event("cancelled", 1460.0, job="7"), ENDS], FRESH, "CANCELLED"),
        ([*LAUNCHED, ENDS, finished("retry"), Event("submitted", 1510.0, job="8")], FRESH, "QUEUED"),
        ([*LAUNCHED, Event("submitted", 1135.0, job="8")], FRESH, "RUNNING"),  # a chain
        ([*LAUNCHED, ENDS, finished("retry"), replace(WAITS, time=1001.0, job="8")], FRESH, "QUEUED"),
    ],
)
def test_states_without_a_scheduler(tmp_path: Path, events: list[Event], beat: Heartbeat | None, state: str) -> None:
    path = write_run(tmp_path / "run", events, [beat] if beat else [])
    now = 1470.0 if all(event.time < 1470 for event in events) else 1520.0
    assert look(path, now).state == state
    assert is_ended(read_facts(path, now)) == (state in ("DONE", "FATAL", "STOPPED", "CANCELLED"))


@pytest.mark.parametrize(
    ("events", "known", "state", "detail"),
    [
        ([WAITS], JobState("7", "PENDING", "Resources"), "QUEUED", "Resources"),
        ([WAITS], JobState("7", "RUNNING"), "STARTING", ""),
        ([WAITS], JobState("7", "CANCELLED"), "CANCELLED", "while it waited"),
        ([WAITS], JobState("7", GONE), "LOST", "the scheduler doesn't know its job any more"),
        (LAUNCHED, JobState("7", "RUNNING"), "RUNNING", ""),
        (LAUNCHED, JobState("7", "PENDING", "BeginTime"), "REQUEUED", "BeginTime"),
        (LAUNCHED, JobState("7", "NODE_FAIL"), "LOST", "NODE_FAIL"),
        ([*LAUNCHED, ENDS, finished("done")], JobState("7", GONE), "DONE", "why"),
        ([*LAUNCHED, Event("cancelled", 1460.0, job="7")], JobState("7", GONE), "CANCELLED", ""),
    ],
)
def test_states_with_a_scheduler(tmp_path: Path, events: list[Event], known: JobState, state: str, detail: str) -> None:
    path = write_run(tmp_path / "run", events, [FRESH] if events[1:] else [])
    found = look(path, 1510.0 if ENDS in events else 1470.0, Board(known))
    assert (found.state, found.detail) == (state, detail)


def test_states_by_hand(tmp_path: Path) -> None:
    """Without a history: the lock, as the kernel knows it, else the verdict."""
    assert look(write_run(tmp_path / "empty", []), 9.0).state == "EMPTY"
    path = write_run(tmp_path / "run", [], [FRESH])
    found = look(path, 1470.0)
    assert (found.state, found.reason, found.eta) == ("LOST", "attempt 0: no verdict", None)
    lock = path / "attempts/lock"
    lock.write_text("process 12 on another")
    assert look(path, 1470.0).state == "RUNNING"
    assert look(path, 1600.0).state == "LOST"
    with lock.open("w") as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        assert look(path, 1470.0).state == "LOST"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert look(path, 1470.0).state == "RUNNING"
        assert look(path, 1600.0).state == "SILENT"
    ended = write_run(tmp_path / "ended", [], [FRESH], {0: (Verdict("stopped", 130, 15), 1467.0)})
    found = look(ended, 1470.0)
    assert (found.state, found.detail) == ("STOPPED", "stopped by SIGTERM; the same command resumes")
    assert (found.checkpoint, found.age, found.job) == (130, 3.0, None)
    assert look(write_run(tmp_path / "done", [], [FRESH], {0: (Verdict("done", 130), 1467.0)}), 1470.0).state == "DONE"


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (Verdict("done", 130, stage="short", follow=1), "attempt 0: stage short done"),
        (Verdict("done", 130, stage="long"), "attempt 0: all steps done"),
    ],
    ids=["a stage", "the last"],
)
def test_the_last_end_of_a_run_with_stages(tmp_path: Path, verdict: Verdict, reason: str) -> None:
    path = write_run(tmp_path / "run", [], [FRESH], {0: (verdict, 1467.0)})
    assert look(path, 1470.0).reason == reason


def test_a_job_that_ended_and_a_start_by_hand(tmp_path: Path) -> None:
    """What was started by hand is looked at, not the job before it."""
    later = replace(FRESH, attempt=1, since=5000.0, time=5001.0)
    path = write_run(
        tmp_path / "run", [*LAUNCHED, ENDS, finished("retry")], [FRESH, later], {1: (Verdict("done", 130), 5001.0)}
    )
    found = look(path, 5002.0, Board(JobState("7", GONE)))
    assert (found.state, found.job, found.nodes) == ("DONE", None, ())


def test_the_page(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [*LAUNCHED, *RESTARTED], [DIED, RUNS])
    found = look(path, 1621.0, Board(JobState("7", "RUNNING")))
    assert "\n".join(page(found)) == PAGE.format(run=path)
    told = json.loads(json.dumps(as_json(found)))
    assert (told["step"], told["slowest"]["node"], told["account"]["parts"]["lost"]) == (131, "node2", 61)
    assert told["account"]["ratio"] == pytest.approx(found.account.ratio)
    assert (told["restarts"], told["requeues"], told["checkpoint"], told["age"]) == (1, 0, 100, 221)


def test_the_overview(tmp_path: Path) -> None:
    write_run(tmp_path / "group/b", [*LAUNCHED, *RESTARTED], [DIED, RUNS])
    write_run(tmp_path / "a", [WAITS])
    (tmp_path / "other").mkdir()
    runs = find_runs(tmp_path)
    assert [path.name for path in runs] == ["a", "b"]
    jobs = [JobState("7", "RUNNING"), JobState("9", "PENDING", "Priority", name="notebook")]
    lines = list(overview([look(path, 1621.0) for path in runs], jobs))
    assert [line.split() for line in lines] == [
        ["run", "state", "step", "tokens/s", "left", "job", "effective"],
        [str(runs[0]), "QUEUED", "-", "-", "-", "7", "0.0%"],
        [str(runs[1]), "RUNNING", "131/1,000", "6,000", "29:55", "7", "42.8%"],
        ["jobs", "of", "yours", "that", "are", "no", "run's", "here:"],
        ["9", "PENDING", "notebook", "Priority"],
    ]
    assert list(overview([], [])) == ["no runs, and no jobs in the queue"]


def test_the_slowest_node() -> None:
    """Three nodes of two ranks: by their slowest ranks 1.2, 1.0 and 2.4 s; the median is 1.2."""
    found = slowest_node((1.2, 1.0, 1.0, 0.9, 1.0, 2.4), ("a", "b", "c"))
    assert found is not None and (found.node, found.factor) == ("c", 2.0)
    assert slowest_node((1.0, 2.0), ("a",)) is None
    assert slowest_node((1.0, 2.0, 3.0), ("a", "b")) is None
    assert slowest_node((), ("a", "b")) is None


def test_requeues_by_a_person_or_the_scheduler_count_once(tmp_path: Path) -> None:
    events = [*LAUNCHED, Event("requeued", 1501.0, job="7"), Event("started", 1502.0, job="7", restart=1)]
    again = Event("started", 1600.0, job="7", restart=2)  # a node was lost, and nobody wrote that it is requeued
    assert look(write_run(tmp_path / "a", events), 1610.0).requeues == 1
    assert look(write_run(tmp_path / "b", [*events, again]), 1610.0).requeues == 2


def test_a_line_of_scontrol() -> None:
    line = (
        "JobId=12 JobName=run a UserId=root(0) Priority=4294901757 Nice=0 Account=(null) JobState=PENDING "
        "Reason=Resources Dependency=(null) Requeue=1 Restarts=0 StartTime=2026-11-26T17:00:00 EndTime=Unknown "
        "ReqNodeList=(null) ExcNodeList=(null) NodeList=(null) NumNodes=2-2 Comment=JobState=RUNNING"
    )
    found = parse_job(line)
    assert (found.job, found.state, found.reason, found.nodes) == ("12", "PENDING", "Resources", "")
    assert found.start is not None
    running = parse_job(
        "JobId=12 JobName=a JobState=RUNNING Reason=None StartTime=Unknown ReqNodeList=node9 NodeList=node[0-1]"
    )
    assert (running.state, running.reason, running.nodes, running.start) == ("RUNNING", "", "node[0-1]", None)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run directory"):
        read_facts(tmp_path, 0.0)


def test_a_node_that_stays_slow() -> None:
    seen = Stragglers(("a", "b", "c"), limit=1.3, times=3)
    slow = [(1.0 + i / 1000, 2.0, 1.0) for i in range(4)]
    assert [seen.see(each) for each in (slow[0], slow[0], slow[1])] == [None] * 3  # the same measurement counts once
    found = seen.see(slow[2])
    assert found is not None and found.node == "b" and seen.see(slow[3]) is None  # said once
    seen = Stragglers(("a", "b", "c"), limit=1.3, times=2)
    assert [seen.see(each) for each in (slow[0], (1.0, 1.2, 1.0), slow[1])] == [None] * 3  # not in a row
    assert seen.see(slow[2]) is not None
