"""What is known of a run: its history, what its attempts have left, who holds it, what the scheduler says.

A run that was started by hand, without a scheduler, has no history: there the lock on RUN/attempts tells whether it
lives, to those on its machine; to others its heartbeat does.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from framework.heartbeat import STARTING, Heartbeat, read_heartbeat
from framework.history import Event, History
from framework.launch.account import Attempt
from framework.launch.queue import OVER, JobState, Scheduler
from framework.run import Run, is_run, read_verdict

QUIET: Final = 60.0  # seconds without a sign, and SILENT_STEPS usual steps, before a run is called silent
SILENT_STEPS: Final = 10
STARTUP: Final = 1800.0  # the same where there is no measure: before the first step, in samples and the last save


@dataclass(frozen=True)
class Facts:
    """What is known of a run. holder: the process on this machine that holds it. local: its newest attempt was started
    by hand. nodes, ranks: of the newest attempt.
    """

    path: Path
    events: tuple[Event, ...]
    attempts: tuple[Attempt, ...]
    holder: int | None
    now: float
    job: JobState | None = None

    @property
    def newest(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def local(self) -> bool:
        return started_by_hand(self.events, self.newest)

    @property
    def launched(self) -> Event | None:
        """The newest start of ranks by a supervisor."""
        return next((event for event in reversed(self.events) if event.event == "launched"), None)


def is_place(path: Path) -> bool:
    """Whether something of a run is there; a run that was only submitted has no more than its history."""
    return is_run(path) or (path / "attempts").is_dir() or History(path).path.is_file()


def read_facts(path: Path, now: float, scheduler: Scheduler | None = None) -> Facts:
    """All that a run's directory tells, and the scheduler of its newest job. Raises ValueError for no run."""
    if not is_place(path):
        raise ValueError(f"{path} is no run directory: it has no recipe.yaml, no attempts and no jobs")
    events = tuple(sorted(History(path).events(), key=lambda event: event.time))
    holder, job = lock_holder(path), newest_job(events)
    known = scheduler.job(job) if scheduler is not None and job is not None else None
    attempts = read_attempts(path)
    if attempts:
        by_hand = started_by_hand(events, attempts[-1])
        alive = lives_by_hand(path, attempts[-1], holder, now) if by_hand else lives(events, attempts[-1], now)
        alive = alive and (by_hand or known is None or known.state not in OVER)
        silent = alive and attempts[-1].beat is not None and not is_fresh(attempts[-1].beat, now)
        attempts[-1] = replace(attempts[-1], alive=alive, silent=silent)
    return Facts(path, events, tuple(attempts), holder, now, known)


def read_attempts(path: Path) -> list[Attempt]:
    """What all attempts have left, oldest first."""
    found = []
    for number in sorted(int(p.name) for p in (path / "attempts").glob("*") if p.name.isdecimal()):
        run = Run(path, number)
        verdict = read_verdict(run)
        closed = None if verdict is None else (run.attempt_path / "verdict.json").stat().st_mtime
        found.append(Attempt(number, read_heartbeat(run), verdict, closed))
    return found


def lives(events: Sequence[Event], newest: Attempt, now: float) -> bool:
    """Whether a supervisor's newest attempt runs, as far as its history tells. (An older one never does: another start
    has claimed the run since.)
    """
    own = [event.event for event in events if event.event not in ("excluded", "submitted")]
    if newest.verdict is not None or any(e.event == "ended" and e.attempt == newest.number for e in events):
        return False
    if own and own[-1] == "cancelled":  # it may be saving
        return is_fresh(newest.beat, now)
    return bool(own) and own[-1] == "launched"


def lives_by_hand(path: Path, newest: Attempt, holder: int | None, now: float) -> bool:
    """The same of an attempt that was started by hand."""
    return holder is not None or (newest.verdict is None and is_elsewhere(path) and is_fresh(newest.beat, now))


def started_by_hand(events: Sequence[Event], newest: Attempt | None) -> bool:
    """Whether the newest attempt is no supervisor's, and nothing was submitted since."""
    if newest is None:
        return False
    if any(event.event == "launched" and event.attempt == newest.number for event in events):
        return False
    return not events or (newest.begin is not None and newest.begin > events[-1].time)


def open_job(events: Sequence[Event]) -> str | None:
    """The job that is to run or runs: the last that began, else the first that waits; None when all are over."""
    waiting = waiting_jobs(events)
    begun: list[str] = []
    for event in events:
        if event.job is None:
            continue
        if event.event in ("finished", "cancelled"):
            begun = [job for job in begun if job != event.job]
        elif event.event in ("started", "launched"):
            begun.append(event.job)
    return begun[-1] if begun else waiting[0] if waiting else None


def waiting_jobs(events: Sequence[Event]) -> list[str]:
    """The jobs that haven't ended: the last one that was submitted, which is refused while an earlier one could still
    run, or those of the last run's stages, of which none follows one that didn't end well.
    """
    waiting: list[str] = []
    ended = {event.job: event for event in events if event.event in ("finished", "cancelled")}
    bad = {job for job, event in ended.items() if event.outcome != "done"}
    for event in events:
        if event.event == "submitted" and event.job is not None:
            if event.after in bad:
                bad.add(event.job)
            waiting = [*waiting, event.job] if event.after is not None else [event.job]
    return [job for job in waiting if job not in ended and job not in bad]


def newest_job(events: Sequence[Event]) -> str | None:
    """The open job, else the last one of all."""
    return open_job(events) or next((event.job for event in reversed(events) if event.job is not None), None)


def lock_holder(path: Path) -> int | None:
    """The process of this machine that holds the run, as the kernel knows it. (Trying the lock would take it, and a
    start in that moment would be refused.)
    """
    lock = path / "attempts" / "lock"
    try:
        words, inode = lock.read_text().split(), lock.stat().st_ino
        table = Path("/proc/locks").read_text()
    except OSError:
        return None
    if len(words) != 4 or words[3] != socket.gethostname():
        return None
    for line in table.splitlines():  # 1: FLOCK  ADVISORY  WRITE 708 08:01:1316 0 EOF
        fields = line.split()
        if fields[1] == "FLOCK" and fields[4] == words[1] and fields[5].rpartition(":")[2] == str(inode):
            return int(words[1])
    return None


def is_elsewhere(path: Path) -> bool:
    """Whether the run was last held on another machine, whose processes can't be seen."""
    lock = path / "attempts" / "lock"
    words = lock.read_text().split() if lock.is_file() else []
    return len(words) == 4 and words[3] != socket.gethostname()


def allowed_silence(beat: Heartbeat | None) -> float:
    """Seconds without a sign that are nothing unusual."""
    if beat is None or beat.phase in STARTING or beat.phase in ("observe", "end"):
        return STARTUP
    return max(QUIET, SILENT_STEPS * max(beat.step_seconds, usual_step(beat) or 0.0))


def is_fresh(beat: Heartbeat | None, now: float) -> bool:
    """Whether a sign is recent."""
    return beat is not None and now - beat.time <= allowed_silence(beat)


def usual_step(beat: Heartbeat) -> float | None:
    """Seconds of a step: the mean over this attempt without its first; None before two are done."""
    done = beat.step - beat.resumed
    return beat.seconds.get("step", 0.0) / (done - 1) if done > 1 else None


def find_runs(folder: Path, *, depth: int = 3) -> list[Path]:
    """All runs below a folder, by name; what is inside of a run is none."""
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if is_place(path):
            found.append(path)
        elif depth > 1:
            found += find_runs(path, depth=depth - 1)
    return found
