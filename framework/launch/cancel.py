"""Ending a run from outside: its job, or the process that holds it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from framework.history import Event, History, now
from framework.launch.facts import Facts, is_elsewhere, open_job
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
        History(facts.path).add(Event("cancelled", now(), job=job))
        scheduler.cancel(job)
        if known.state == "PENDING" or newest is None or not newest.alive:
            yield f"job {job} is cancelled; no step was running, so nothing was to be saved"
        else:
            yield f"job {job} is being cancelled: its ranks finish their step, save and end"
            yield "  what takes longer than the scheduler's KillWait is cut off; then the checkpoint before it counts"
        return
    if facts.holder is not None:
        os.kill(facts.holder, signal.SIGTERM)
        yield f"process {facts.holder} of this machine holds {facts.path}; it was sent SIGTERM"
        yield "  its ranks finish their step, save and end; the same command resumes"
        return
    raise ValueError(f"nothing to cancel: {nothing(facts.path, facts)}")


def nothing(path: Path, facts: Facts) -> str:
    """Why there is nothing to end here."""
    newest = facts.newest
    if newest is not None and newest.alive and is_elsewhere(path):
        return f"{path} is held by {(path / 'attempts/lock').read_text().strip()}, another machine: cancel it there"
    return f"no job and no process of this machine holds {path}"
