"""How a run is: from its history, its attempts' heartbeats and verdicts, and the scheduler where there is one.

QUEUED      submitted, waits              REQUEUED    waits again
STARTING    nodes are there; checks, imports, loads, the first step
RUNNING     steps                         SAVING      a checkpoint, or the last one of an attempt that ends
SILENT      it should run, and has said nothing for long (its supervisor ends it if that lasts)
RESTARTING  an attempt has ended, another follows in the same job
DONE        all steps                     STOPPED     by a signal, or given up after too many tries
FATAL       trying again would end the same way      CANCELLED   by a person
LOST        its processes or its job are gone, and nobody said why
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from framework.heartbeat import STARTING, Heartbeat
from framework.history import Event
from framework.launch.account import Account, Attempt, account
from framework.launch.facts import Facts, allowed_silence, newest_job, open_job, usual_step
from framework.launch.queue import GONE, OVER
from framework.launch.stragglers import SlowNode, slowest_node
from framework.run import Verdict

State = Literal[
    "QUEUED",
    "REQUEUED",
    "STARTING",
    "RUNNING",
    "SAVING",
    "SILENT",
    "RESTARTING",
    "DONE",
    "STOPPED",
    "FATAL",
    "CANCELLED",
    "LOST",
    "EMPTY",
]
ENDED: Final = ("DONE", "STOPPED", "FATAL", "CANCELLED", "LOST", "EMPTY")
SLOW: Final = 1.15  # a node is named when its ranks take so many times the median


@dataclass(frozen=True)
class Status:
    """A run at a glance. job, nodes, ranks: of the newest start, None for one by hand. silence: seconds since the last
    sign of an attempt that should run. eta: seconds to the last step at the mean pace of this attempt. checkpoint: step
    of the newest; age: its seconds. reason: of the last end. usual: seconds of a step, mean of this attempt.
    stage: of the newest attempt, in a run that has any; step and last are the run's.
    """

    run: str
    state: State
    detail: str
    job: str | None
    cluster: str | None
    nodes: tuple[str, ...]
    ranks: int | None
    attempt: int | None
    phase: str | None
    step: int
    last: int
    usual: float | None
    tokens_per_second: float | None
    loss: float | None
    silence: float | None
    eta: float | None
    checkpoint: int | None
    age: float | None
    reason: str | None
    restarts: int
    requeues: int
    account: Account
    slowest: SlowNode | None
    excluded: tuple[str, ...]
    stage: str | None = None


def state_of(facts: Facts) -> tuple[State, str]:
    """The state, and a few words on it."""
    if facts.local or not any(event.job for event in facts.events):
        return state_by_hand(facts)
    job, newest = open_job(facts.events), facts.newest
    if job is None:
        last = next(event for event in reversed(facts.events) if event.event in ("finished", "cancelled"))
        if newest is not None and newest.alive:
            return "SAVING", "cancelled"
        return ("CANCELLED" if last.event == "cancelled" else finished_state(last)), last.reason or ""
    # The line of a submission may come after that of a start: it is written when sbatch has answered.
    own = [event for event in facts.events if event.job == job and event.event != "excluded"]
    last = max(own, key=lambda event: (event.event != "submitted", event.time))
    if last.event in ("submitted", "requeued"):
        return waiting_state("QUEUED" if last.event == "submitted" else "REQUEUED", facts)
    if facts.job is not None and (facts.job.state in OVER or facts.job.state == "PENDING"):
        return waiting_state("REQUEUED", facts)  # by the scheduler itself, which tells nobody
    if last.event == "started":
        return "STARTING", "health checks"
    if last.event == "ended":
        return ("DONE" if last.outcome == "done" else "RESTARTING"), last.reason or ""
    beat = newest.beat if newest is not None and newest.number == last.attempt else None
    return phase_state(beat, facts.now, since=last.time)


def finished_state(event: Event) -> State:
    """Of a run after which nothing follows."""
    match event.outcome:
        case "done":
            return "DONE"
        case "fatal":
            return "FATAL"
        case "cancelled":
            return "CANCELLED"
    return "STOPPED"


def waiting_state(state: State, facts: Facts) -> tuple[State, str]:
    """Of a job that waits, as far as the scheduler knows it."""
    if facts.job is None:
        return state, ""
    if facts.job.state in OVER:
        if facts.job.state.startswith("CANCELLED"):
            return "CANCELLED", "while it waited"
        gone = facts.job.state == GONE
        return "LOST", "the scheduler doesn't know its job any more" if gone else facts.job.state
    if facts.job.state == "PENDING":
        return state, facts.job.reason
    return "STARTING", ""


def state_by_hand(facts: Facts) -> tuple[State, str]:
    """Of a run without a scheduler."""
    newest = facts.newest
    if newest is None:
        return "EMPTY", "nothing has been started"
    if newest.alive:
        return phase_state(newest.beat, facts.now, since=facts.now)
    if newest.verdict is None:
        return "LOST", "its process is gone without a verdict; the same command resumes"
    if newest.verdict.outcome == "done":
        if newest.verdict.follow:
            return "STOPPED", f"stage {newest.verdict.stage} is done; the same command goes on with the next"
        return "DONE", ""
    return "STOPPED", f"{end_reason(newest.verdict)}; the same command resumes"


def end_reason(verdict: Verdict) -> str:
    """What ended an attempt that saved."""
    if verdict.outcome == "done":
        return f"stage {verdict.stage} done" if verdict.follow else "all steps done"
    return f"stopped by {signal.Signals(verdict.signal).name}" if verdict.signal is not None else "stopped"


def phase_state(beat: Heartbeat | None, now: float, *, since: float) -> tuple[State, str]:
    """Of an attempt that lives. since: when its ranks were started, where there is no beat yet."""
    quiet = now - (since if beat is None else beat.time)
    if quiet > allowed_silence(beat):
        return "SILENT", f"in {beat.phase if beat is not None else 'start'}"
    if beat is None or beat.phase in STARTING:
        return "STARTING", "ranks" if beat is None else beat.phase
    if beat.phase in ("save", "end"):
        return "SAVING", ""
    return "RUNNING", "validation and samples" if beat.phase == "observe" else ""


def count_restarts(events: Sequence[Event]) -> tuple[int, int]:
    """Further starts of ranks within a job, and further starts of a job."""
    restarts = requeues = 0
    before = None
    for event in events:
        if event.event == "launched" and before in ("launched", "ended"):
            restarts += 1
        if event.event == "requeued" or (event.event == "started" and event.restart and before != "requeued"):
            requeues += 1
        if event.event in ("started", "launched", "ended", "requeued"):
            before = event.event
    return restarts, requeues


def excluded_nodes(events: Sequence[Event]) -> tuple[str, ...]:
    """With their reasons."""
    named = {event.node: event.reason for event in events if event.event == "excluded" and event.node}
    return tuple(f"{node} ({reason})" if reason else str(node) for node, reason in named.items())


def last_reason(facts: Facts) -> str | None:
    """Why the run, or its last attempt that is over, ended."""
    if not facts.local:
        for event in reversed(facts.events):
            if event.event in ("ended", "finished") and (event.reason or event.outcome):
                where = f" on {event.node}" if event.node else ""
                which = f"attempt {event.attempt}: " if event.attempt is not None else ""
                return f"{which}{event.reason or event.outcome}{where}"
    over = [attempt for attempt in facts.attempts if not attempt.alive]
    if not over:
        return None
    verdict = over[-1].verdict
    return f"attempt {over[-1].number}: {'no verdict' if verdict is None else end_reason(verdict)}"


def newest_checkpoint(attempts: Sequence[Attempt]) -> tuple[int, float | None] | None:
    """Step and time of the newest that an attempt has told of."""
    found = []
    for attempt in attempts:
        if attempt.beat is not None and attempt.beat.saved >= 0:
            found.append((attempt.beat.saved, attempt.beat.saved_at))
        if attempt.verdict is not None and attempt.closed is not None:
            found.append((attempt.verdict.step, attempt.closed))
    if found:
        return max(found, key=lambda pair: pair[1])
    resumed = [step for attempt in attempts if (step := attempt.resumed)]
    return (resumed[-1], None) if resumed else None


def status_of(facts: Facts) -> Status:
    """Everything about a run that its page says."""
    state, detail = state_of(facts)
    newest, launched = facts.newest, None if facts.local else facts.launched
    beats = [attempt.beat for attempt in facts.attempts if attempt.resumed is not None and attempt.beat is not None]
    beat = beats[-1] if beats else None
    current = newest.beat if newest is not None and newest.alive else None
    usual = None if beat is None else usual_step(beat) or beat.step_seconds or None
    saved = newest_checkpoint(facts.attempts)
    submitted = [event for event in facts.events if event.event == "submitted"]
    nodes = () if launched is None else launched.nodes or ()
    restarts, requeues = count_restarts(facts.events)
    runs = state in ("RUNNING", "SAVING", "SILENT")
    return Status(
        run=str(facts.path),
        state=state,
        detail=detail,
        job=None if facts.local else newest_job(facts.events),
        cluster=submitted[-1].cluster if submitted and not facts.local else None,
        nodes=nodes,
        ranks=None if launched is None else launched.ranks,
        attempt=None if newest is None else newest.number,
        phase=None if current is None else current.phase,
        step=0 if beat is None else beat.step,
        last=0 if beat is None else beat.last,
        usual=usual,
        tokens_per_second=(beat.tokens_per_second or None) if beat is not None else None,
        loss=None if beat is None else beat.loss,
        silence=None if current is None else facts.now - current.time,
        eta=(beat.last - beat.step) * usual if runs and beat is not None and usual is not None else None,
        checkpoint=None if saved is None else saved[0],
        age=None if saved is None or saved[1] is None else facts.now - saved[1],
        reason=last_reason(facts),
        restarts=restarts,
        requeues=requeues,
        account=account(facts.events, facts.attempts, facts.now),
        slowest=None if beat is None else slowest_node(beat.compute, nodes),
        excluded=excluded_nodes(facts.events),
        stage=(beat.stage or None) if beat is not None else None,
    )


def is_ended(facts: Facts, attempt: int | None = None) -> bool:
    """Whether nothing follows any more: in the run, or in one attempt of it."""
    if state_of(facts)[0] in ENDED:
        return True
    if attempt is None or facts.newest is None:
        return False
    return facts.newest.number > attempt or (facts.newest.number == attempt and not facts.newest.alive)
