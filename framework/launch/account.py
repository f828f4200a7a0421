"""Where a run's time went: from its history and its attempts' heartbeats to seconds that add up.

The wall time begins with the first submission (or the first attempt, where nobody submitted) and is cut into

    queue        submitted or requeued, until the job has its nodes
    launch       from there, and within a job from the start of the ranks, until their processes begin: health checks
    import, init, build, load        the phases of an attempt (framework/heartbeat.py)
    first_step   what an attempt's first step took beyond a usual one
    steps        steps that count
    save         what training waited for checkpoints
    observe      validation and samples
    lost         steps done again by a later attempt, and the step in which an attempt died
    detect       from the last sign of an attempt that died to its end
    end          the last save and the way out
    between      an attempt has ended, and nothing new has begun
    other        what no phase claims

A time in which nobody wanted the run (it had finished, was cancelled or had given up, and was submitted again) is
`idle`, and no part of the wall time. Of the steps of an attempt those count that no later attempt did again: up to the
least step at which a later one resumed. Where none has yet, and the attempt is dead, up to its newest checkpoint.

    effective training time ratio = steps / wall          (the term of Meta's arXiv 2410.21680, section 4)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from framework.heartbeat import Heartbeat
from framework.history import Event
from framework.run import Verdict

PARTS: Final = (
    "steps",
    "lost",
    "queue",
    "launch",
    "import",
    "init",
    "build",
    "load",
    "first_step",
    "save",
    "observe",
    "detect",
    "end",
    "between",
    "other",
)
RESTART: Final = ("between", "queue", "launch", "import", "init", "build", "load", "first_step")
PLAIN: Final = ("import", "init", "build", "load", "save", "observe", "end")  # phases that are a part as they are


@dataclass(frozen=True)
class Attempt:
    """What an attempt has left. closed: when its verdict was written, Unix seconds. alive: nobody has seen its end.
    silent: alive, and it has given no sign for so long that it may hang.
    """

    number: int
    beat: Heartbeat | None = None
    verdict: Verdict | None = None
    closed: float | None = None
    alive: bool = False
    silent: bool = False

    @property
    def works(self) -> bool:
        """Whether it runs, as far as anybody can tell."""
        return self.alive and not self.silent

    @property
    def begin(self) -> float | None:
        """When its first process began."""
        return None if self.beat is None else self.beat.since - sum(self.beat.seconds.values())

    @property
    def resumed(self) -> int | None:
        """The step it went on from, None where it hasn't come so far."""
        return self.beat.resumed if self.beat is not None and self.beat.last > 0 else None


@dataclass(frozen=True)
class Restart:
    """An attempt that followed another. detect: from the last sign of the one before to its end; seconds: from there to
    the first step of this one, beyond a usual step; by part in `parts`. lost: seconds of steps of the one before.
    """

    attempt: int
    detect: float
    seconds: float
    lost: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Account:
    """Seconds by part, which sum to `wall`; idle is beside them. steps: number of optimizer steps that count."""

    wall: float
    parts: dict[str, float]
    idle: float
    num_steps: int
    restarts: tuple[Restart, ...]

    @property
    def ratio(self) -> float:
        """The effective training time ratio."""
        return self.parts["steps"] / self.wall if self.wall else 0.0


class Ledger:
    """A time that only goes forward, and the parts to which it was charged, by attempt: its own, and before it."""

    def __init__(self, begin: float) -> None:
        self.at, self.idle = begin, 0.0
        self.by_attempt: list[dict[str, float]] = [{}]

    def until(self, time: float, part: str) -> None:
        """Charge what is between here and `time`; nothing where that is past."""
        if time > self.at:
            if part == "idle":
                self.idle += time - self.at
            else:
                page = self.by_attempt[-1]
                page[part] = page.get(part, 0.0) + time - self.at
            self.at = time

    def spend(self, seconds: float, part: str, *, end: float) -> None:
        """Charge so many seconds, but not beyond `end`."""
        self.until(min(self.at + seconds, end), part)


def account(events: Sequence[Event], attempts: Sequence[Attempt], now: float) -> Account:
    """Where the time of a run went, up to `now`, or to the run's end if that is over. attempts: by number."""
    events = sorted(events, key=lambda event: event.time)
    begins = [time for attempt in attempts if (time := begin_of(attempt, events)) is not None]
    starts = [event.time for event in events[:1]] + begins
    if not starts:
        return Account(0.0, dict.fromkeys(PARTS, 0.0), 0.0, 0, ())
    ledger, usual, num_steps = Ledger(min(starts)), usual_seconds(attempts), 0
    ordered = [attempt for attempt in attempts if begin_of(attempt, events) is not None]
    for index, attempt in enumerate(ordered):
        begin = begin_of(attempt, events)
        assert begin is not None
        walk(ledger, events, begin)
        following = begin_of(ordered[index + 1], events) if index + 1 < len(ordered) else None
        end = min(end_of(attempt, events, now), now if following is None else following)
        counted = counted_steps(attempt, ordered[index + 1 :])
        charge(ledger, attempt, counted, usual=usual, end=end)
        num_steps += counted
        ledger.by_attempt.append({})
    if not (ordered and ordered[-1].alive):
        walk(ledger, events, last_time(events, ordered, ledger.at, now))
    parts = {part: sum(page.get(part, 0.0) for page in ledger.by_attempt) for part in PARTS}
    return Account(sum(parts.values()), parts, ledger.idle, num_steps, restarts_of(ordered, ledger.by_attempt))


def begin_of(attempt: Attempt, events: Sequence[Event]) -> float | None:
    """When it was launched, else when its first process began; None where nothing tells."""
    launched = [event.time for event in events if event.event == "launched" and event.attempt == attempt.number]
    return launched[0] if launched else attempt.begin


def end_of(attempt: Attempt, events: Sequence[Event], now: float) -> float:
    """When it was over: as its supervisor saw it, else its verdict, else its last sign; now where it isn't."""
    ended = [event.time for event in events if event.event == "ended" and event.attempt == attempt.number]
    if ended:
        return ended[-1]
    if attempt.alive:
        return now
    if attempt.closed is not None:
        return attempt.closed
    begin = begin_of(attempt, events)
    assert begin is not None
    return begin if attempt.beat is None else attempt.beat.time


def last_time(events: Sequence[Event], attempts: Sequence[Attempt], at: float, now: float) -> float:
    """Where the account ends: now while something is to follow, else the run's end."""
    newest = max((event.time for event in events), default=at)
    return now if outside(events, now) not in ("idle", None) else max(newest, at)


def outside(events: Sequence[Event], time: float) -> str | None:
    """What was going on at a time at which no attempt ran; None before any event."""
    part: str | None = None
    waiting: set[str | None] = set()
    dead: set[str | None] = set()  # which follow one that didn't end well, and never start
    for event in events:
        if event.time > time:
            break
        match event.event:
            case "submitted":
                (dead if event.after is not None and event.after in dead else waiting).add(event.job)
                part = "queue" if waiting and part in (None, "idle") else part
            case "requeued":
                part = "queue"
            case "started":
                part = "launch"
            case "launched" | "ended":
                part = "between"
            case "finished" | "cancelled":
                waiting.discard(event.job)
                if event.outcome != "done":
                    dead |= waiting | {event.job}
                    waiting.clear()
                part = "queue" if waiting else "idle"
    return part


def walk(ledger: Ledger, events: Sequence[Event], end: float) -> None:
    """Charge the time from here to `end`, in which no attempt ran."""
    for time in [event.time for event in events if ledger.at < event.time < end] + [end]:
        part = outside(events, ledger.at)
        ledger.until(time, "between" if part is None else part)


def usual_seconds(attempts: Sequence[Attempt]) -> dict[int, float | None]:
    """Attempt -> seconds of its usual step; that of the others where it has done none but its first."""
    own = {}
    for attempt in attempts:
        done = 0 if attempt.beat is None else attempt.beat.step - attempt.beat.resumed
        if attempt.beat is not None and done > 1:
            own[attempt.number] = attempt.beat.seconds.get("step", 0.0) / (done - 1)
    typical = median(own.values()) if own else None
    return {attempt.number: own.get(attempt.number, typical) for attempt in attempts}


def counted_steps(attempt: Attempt, later: Sequence[Attempt]) -> int:
    """Steps of an attempt that no later one did again. Where a later one went on, or the verdict, counts more than the
    last heartbeat, which may be a second old.
    """
    if attempt.beat is None:
        return 0
    last = attempt.beat.step
    points = [step for other in later if (step := other.resumed) is not None]
    if points:
        last = min(points)
    elif attempt.verdict is not None:
        last = attempt.verdict.step
    elif not attempt.works:
        last = min(last, max(attempt.beat.saved, attempt.beat.resumed))
    return max(0, last - attempt.beat.resumed)


def charge(ledger: Ledger, attempt: Attempt, counted: int, *, usual: dict[int, float | None], end: float) -> None:
    """Charge an attempt's own time, from its launch to `end`."""
    beat = attempt.beat
    if beat is None:
        ledger.until(end, "launch")
        return
    assert attempt.begin is not None
    ledger.until(min(attempt.begin, end), "launch")
    for phase in PLAIN:
        ledger.spend(beat.seconds.get(phase, 0.0), phase, end=end)
    done = beat.step - beat.resumed
    first, stepping = beat.seconds.get("first_step", 0.0), beat.seconds.get("step", 0.0)
    if done > 0:
        ordinary = min(first, usual[attempt.number] or 0.0)
        ledger.spend(first - ordinary, "first_step", end=end)
        stepping += ordinary
        kept = min(1.0, counted / done)
        ledger.spend(stepping * kept, "steps", end=end)
        ledger.spend(stepping * (1 - kept), "lost", end=end)
    else:
        ledger.spend(first, "first_step", end=end)
    # What it was doing when it last gave a sign, and since.
    over = not attempt.works and attempt.verdict is None
    current: str = {"step": "lost" if over else "steps"}.get(beat.phase, beat.phase)
    if over:
        ledger.spend(beat.time - beat.since, current, end=end)
        ledger.until(end, "detect")
    elif attempt.works:
        ledger.until(end, current)
    else:
        ledger.until(end, "end" if beat.phase == "end" else "other")


def restarts_of(attempts: Sequence[Attempt], pages: Sequence[dict[str, float]]) -> tuple[Restart, ...]:
    """The restarts that have reached a step."""
    found = []
    for index in range(1, len(attempts)):
        beat, page, before = attempts[index].beat, pages[index], pages[index - 1]
        if beat is not None and beat.step > beat.resumed:
            parts = {part: page.get(part, 0.0) for part in RESTART}
            lost = before.get("lost", 0.0)
            found.append(Restart(attempts[index].number, before.get("detect", 0.0), sum(parts.values()), lost, parts))
    return tuple(found)
