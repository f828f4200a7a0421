"""How an attempt ended, and what follows: pure functions of what was seen.

    done        all steps are done                                    the job ends, status 0
    preempted   a signal asked to stop: every rank saved one step     back into the queue
    retry       a process, a node or the network was lost, or hung    again on the nodes that are left; without progress
                                                                      after `restarts` back into the queue, after
                                                                      `requeues` the end
    fatal       the next attempt would end the same way               the job ends, status 1
    cancelled   somebody said so                                      the job ends

Fatal are the user's mistakes, an error before the first step that isn't the machines' fault, numbers that went bad
again and again, the same out-of-memory at the same step twice, and a newer attempt that has taken the run over.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import Final

from framework.failure import Failure
from framework.heartbeat import STARTING, Heartbeat
from framework.history import Event, Outcome
from framework.launch.stragglers import SlowNode
from framework.run import Verdict

# srun: error: node1: task 3: Killed            srun: error: node1: tasks 2-3: Exited with exit code 1
TASK: Final = re.compile(r"error: (\S+): tasks? ([\d,\-]+): (.+)")
# srun: error: Node failure on node2
NODE: Final = re.compile(r"[Nn]ode failure on (\S+)")


IDLE_PREEMPTIONS = 20  # ends in a row that nobody is to blame for, and that bring no step


@dataclass(frozen=True)
class Hang:
    """Nothing was heard for longer than a limit. silent: ranks that didn't write their stacks when they were asked to,
    with their nodes.
    """

    phase: str
    seconds: float
    limit: float
    silent: Mapping[int, str]


@dataclass(frozen=True)
class Evidence:
    """What is known of an attempt that is over. srun: what the step's client printed. lost: nodes that the scheduler
    holds for gone. slow: a node for whose sake this attempt was stopped. told: whether this job was told to end
    (SIGTERM), and cancelled, whether for good.
    """

    status: int
    srun: str
    verdict: Verdict | None = None
    failure: Failure | None = None
    beat: Heartbeat | None = None
    hang: Hang | None = None
    slow: SlowNode | None = None
    lost: tuple[str, ...] = ()
    told: bool = False
    cancelled: bool = False


@dataclass(frozen=True)
class Ended:
    """outcome and reason, as for a person. step: of the newest checkpoint that this attempt has committed, -1 without
    one. bad: nodes not to be used again. suspect: a node that may be at fault.
    """

    outcome: Outcome
    reason: str
    step: int = -1
    bad: tuple[str, ...] = ()
    suspect: str | None = None
    kind: str = ""


def judge(seen: Evidence) -> Ended:
    """How an attempt ended."""
    verdict, beat = seen.verdict, seen.beat
    saved = verdict.step if verdict is not None else -1 if beat is None else beat.saved
    saved = saved or -1  # a verdict at step 0 has saved nothing
    if verdict is not None and verdict.outcome == "done":
        what = f"stage {verdict.stage} is done, at step {verdict.step}" if verdict.follow else None
        return Ended("done", what or f"all {verdict.step} steps are done", saved)
    if seen.cancelled:
        how = "nothing was saved for it" if verdict is None else saved_words(verdict, beat)
        return Ended("cancelled", f"cancelled; {how}", saved)
    if seen.slow is not None and verdict is not None:
        reason = f"{slow_words(seen.slow)}: step {verdict.step} is saved, to go on without it"
        return Ended("retry", reason, saved, bad=(seen.slow.node,), kind="slow")
    if verdict is not None:
        name = Signals(verdict.signal).name if verdict.signal else "a signal"
        return Ended("preempted", f"{name}: {saved_words(verdict, beat)}", saved)
    if seen.hang is not None:
        return hung(seen.hang, saved)
    if seen.failure is not None and seen.failure.kind in ("mistake", "numbers"):
        return failed(seen.failure, beat, saved)
    if seen.lost:
        return Ended("retry", f"lost {', '.join(seen.lost)}", saved, bad=seen.lost, kind="node")
    if seen.failure is not None and seen.failure.kind != "lost_peer":
        return failed(seen.failure, beat, saved)
    killed = killed_tasks(seen.srun)
    if killed:
        node, what = killed[0]
        return Ended("retry", what, saved, suspect=node, kind="killed")
    if seen.told:
        return Ended("retry", "ended by SIGTERM before a step was saved", saved, kind="told")
    if seen.failure is not None:
        return failed(seen.failure, beat, saved)
    return Ended("retry", f"the step ended with status {seen.status}: {tail(seen.srun)}", saved, kind="unknown")


def saved_words(verdict: Verdict, beat: Heartbeat | None) -> str:
    """What a stop has saved."""
    if beat is not None and verdict.step <= beat.resumed:
        return "no step was done yet, so nothing was to be saved"
    return f"every rank has saved step {verdict.step}"


def slow_words(slow: SlowNode) -> str:
    """What is said of a slow node."""
    return f"{slow.node} takes {slow.factor:.2f} times as long as the others"


def hung(hang: Hang, saved: int) -> Ended:
    """Of an attempt that stood still."""
    where = "start" if hang.phase in STARTING else hang.phase
    reason = f"nothing heard for {hang.seconds:.0f} s in phase {hang.phase} (watch.{where}={hang.limit:g})"
    suspect = None
    if hang.silent:
        names = ", ".join(f"rank {rank} on {node}" for rank, node in sorted(hang.silent.items())[:4])
        reason += f"; {names} gave no sign of life"
        suspect = next(iter(hang.silent.values())) if len(set(hang.silent.values())) == 1 else None
    return Ended("retry", reason, saved, suspect=suspect, kind="hang")


def failed(failure: Failure, beat: Heartbeat | None, saved: int) -> Ended:
    """Of an attempt that told why it failed."""
    first_line = headline(failure.message)
    phase = failure.phase or ("" if beat is None else beat.phase)
    step = failure.step if failure.step is not None else -1 if beat is None else beat.step
    reason = f"rank {failure.rank}: {first_line}"
    match failure.kind:
        case "mistake" | "numbers":
            return Ended("fatal", first_line, saved, kind=failure.kind)
        case "memory":
            return Ended("retry", f"{reason} (out of memory in step {step + 1})", saved, kind=f"memory {step}")
        case "crash" if phase in STARTING:
            return Ended("fatal", f"{reason} (before the first step)", saved, kind="crash")
        case "storage" if failure.error == "TakenOver":
            return Ended("fatal", first_line, saved, kind="taken over")
    return Ended("retry", reason, saved, kind=failure.kind)


def headline(message: str) -> str:
    """The line of a message, or of a traceback, that says what it was."""
    lines = [line for line in message.strip().splitlines() if line.strip()]
    if not lines:
        return "no message"
    return (lines[-1] if lines[0].startswith("Traceback") else lines[0]).removeprefix("error: ")


def killed_tasks(srun: str) -> list[tuple[str, str]]:
    """(node, what) of tasks that were ended by a signal other than as a consequence, in srun's words."""
    found = []
    for line in srun.splitlines():
        if (match := TASK.search(line)) and match[3].strip() in (
            "Killed",
            "Segmentation fault",
            "Bus error",
            "Aborted",
        ):
            found.append((match[1], f"task {match[2]}: {match[3].strip()}"))
    return found


def lost_nodes(srun: str) -> tuple[str, ...]:
    """Nodes that srun says have failed."""
    return tuple(dict.fromkeys(name for line in srun.splitlines() for name in NODE.findall(line)))


def tail(text: str) -> str:
    """The last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no word of why"


@dataclass(frozen=True)
class Next:
    """What to do. what: finish, restart (in this allocation) or requeue."""

    what: str
    outcome: Outcome
    reason: str


def decide(ended: Ended, past: Sequence[Event], *, restarts: int, requeues: int) -> Next:
    """What follows, as far as it doesn't depend on the nodes that are left. past: the run's events before this end.

    Failures count from the newest one that brought a new checkpoint, or from the newest job that was submitted.
    """
    if ended.outcome in ("done", "fatal", "cancelled"):
        return Next("finish", ended.outcome, ended.reason)
    if ended.outcome == "preempted" or ended.kind == "told":
        idle = [event for event in since_progress(past, ended.step) if event.event == "ended"]
        if len(idle) >= IDLE_PREEMPTIONS:
            reason = f"gave up after {len(idle) + 1} starts without a new checkpoint; {ended.reason}"
            return Next("finish", "fatal", reason)
        return Next("requeue", "preempted", ended.reason)
    if ended.kind.startswith("memory") and last_kind(past) == ended.kind:
        return Next("finish", "fatal", f"{ended.reason}, twice at the same step")
    before = since_progress(past, ended.step)
    here = [event for event in before if event.event == "ended" and event.outcome == "retry"]
    started = max((i for i, event in enumerate(before) if event.event == "requeued"), default=-1)
    in_this_start = [event for event in before[started + 1 :] if event.event == "ended" and event.outcome == "retry"]
    if len(in_this_start) < restarts:
        return Next("restart", "retry", ended.reason)
    requeued = sum(event.event == "requeued" and event.outcome != "preempted" for event in before)
    if requeued >= requeues:
        number = len(here) + 1
        return Next("finish", "fatal", f"gave up after {number} failures without a new checkpoint; {ended.reason}")
    return Next("requeue", "retry", ended.reason)


def last_kind(past: Sequence[Event]) -> str | None:
    """What kind of end the attempt before had."""
    return next((event.kind for event in reversed(past) if event.event == "ended"), None)


def since_progress(past: Sequence[Event], step: int) -> list[Event]:
    """The events since a checkpoint further on than all before was last seen; none where this end has one."""
    best, first = -1, 0
    for index, event in enumerate(past):
        if event.event == "submitted":
            first = index + 1
        if event.event == "ended" and event.step is not None and event.step > best:
            best, first = event.step, index + 1
    return [] if step > best else list(past[first:])
