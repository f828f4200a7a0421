"""Ending a run from outside: its job, or the process that holds it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from framework.history import Event, History, now
from framework.launch.facts import Facts, is_elsewhere, open_job, waiting_jobs
from framework.launch.queue import OVER, Scheduler


def cancel(facts: Facts, scheduler: Scheduler) -> Iterator[str]:
    """Ask a run to end; the lines say what follows. The history is told first, so that a supervisor whose ranks end
    knows that nothing is to follow. Raises ValueError where there is nothing to end.
    """
    job, newest = open_job(facts.events), facts.newest
    if not facts.local and job is not None:
        known = facts.job or scheduler.job(job)
        if known is None:
            raise ValueError(
                f"{facts.path} is job {job}, and no scheduler answers here: run `cuboid cancel` where scancel works"
            )
        if known.state in OVER:
            raise ValueError(f"nothing to cancel: job {job} of {facts.path} is over ({known.state})")
        again = any(event.event == "cancelled" and event.job == job for event in facts.events)
        for other in waiting_jobs(facts.events):
            if other != job:  # of a later stage
                History(facts.path).add(Event("cancelled", now(), job=other))
                scheduler.cancel(other)
                yield f"job {other} of a later stage is cancelled"
        History(facts.path).add(Event("cancelled", now(), job=job))
        if known.state == "PENDING" or newest is None or not newest.alive:
            scheduler.cancel(job)
            yield f"job {job} is cancelled; no step was running, so nothing was to be saved"
        elif again:
            scheduler.cancel(job)
            yield f"job {job} was asked before, and is ended now: what isn't saved within KillWait is lost"
        else:
            scheduler.warn(job)
            yield f"job {job} is being cancelled: its ranks finish their step, save and end"
            yield "  they have all the time that they need; `cuboid cancel` again ends it at once"
        return
    if facts.holder is not None:
        launcher = launcher_of(facts.holder)
        os.kill(launcher or facts.holder, signal.SIGTERM)
        by = f"process {launcher}, which started it," if launcher else "it"
        yield f"process {facts.holder} of this machine holds {facts.path}; {by} was sent SIGTERM"
        yield "  its ranks finish their step, save and end; the same command resumes"
        return
    raise ValueError(f"nothing to cancel: {nothing(facts.path, facts)}")


def launcher_of(process: int) -> int | None:
    """The `cuboid` command that started a rank and passes signals on to all of them; None where something else did."""
    try:
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        words = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
    except OSError:
        return None
    is_ours = words[1:3] == ["-m", "framework.cli"] or (len(words) > 1 and Path(words[1]).name == "cuboid")
    return parent if is_ours else None


def nothing(path: Path, facts: Facts) -> str:
    """Why there is nothing to end here."""
    newest = facts.newest
    if newest is not None and newest.alive and is_elsewhere(path):
        return f"{path} is held by {(path / 'attempts/lock').read_text().strip()}, another machine: cancel it there"
    return f"no job and no process of this machine holds {path}"
