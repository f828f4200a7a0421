"""`cuboid status`, `logs`, `cancel`: what a run does, what it says, and its end from outside."""

import json
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.history import now
from framework.launch.cancel import cancel as cancel_run
from framework.launch.facts import find_runs, read_facts
from framework.launch.logs import LogRequest, check_request, follow_log, print_log
from framework.launch.page import as_json, overview, page
from framework.launch.queue import find_scheduler
from framework.launch.status import is_ended, status_of

app = typer.Typer(rich_markup_mode=None)

RunPath = Annotated[Path, typer.Argument(help="Run directory.")]


@app.command()
def status(
    run: Annotated[Path | None, typer.Argument(help="Run directory; without it, all runs and your jobs.")] = None,
    *,
    runs: Annotated[Path, typer.Option(help="Where runs are, without RUN.")] = Path("runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON: all numbers.")] = False,
) -> None:
    """How a run is: state, step, speed, checkpoints, restarts, slow nodes, and where its time went."""
    scheduler = find_scheduler()
    if run is not None:
        found = status_of(read_facts(run, now(), scheduler))
        for line in [json.dumps(as_json(found))] if json_ else page(found):
            log.line(line)
        return
    every = [status_of(read_facts(path, now(), scheduler)) for path in find_runs(runs)]
    jobs = scheduler.jobs()
    if json_:
        log.line(json.dumps({"runs": [as_json(each) for each in every], "jobs": [vars(job) for job in jobs]}))
        return
    for line in overview(every, jobs):
        log.line(line)


@app.command()
def logs(
    run: RunPath,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until the end.")] = False,
    rank: Annotated[int, typer.Option(help="Whose log.")] = 0,
    attempt: Annotated[int | None, typer.Option(help="Of this attempt; the newest by default.")] = None,
    supervisor: Annotated[bool, typer.Option("--supervisor", help="The job's own log: checks, starts, ends.")] = False,
) -> None:
    """Print a rank's log; with -f follow it, on into the next attempt."""
    if rank < 0:
        raise ValueError(f"--rank {rank} must be at least 0")
    if supervisor and attempt is not None:
        raise ValueError("--supervisor is the log of a job, --attempt is for a rank's: give one of them")
    scheduler, looked = find_scheduler(), 0.0
    over = is_ended(read_facts(run, now(), scheduler), attempt)  # and refuses what is no run

    def is_over() -> bool:
        nonlocal looked, over
        if time.monotonic() - looked > 2.0 and not over:
            looked, over = time.monotonic(), is_ended(read_facts(run, now(), scheduler), attempt)
        return over

    request = LogRequest(None if supervisor else rank, attempt)
    if over or not follow:
        check_request(run, request)
    # A reader that goes away (`| head`) ends this command as it does any other.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for line in follow_log(run, request, is_over=is_over) if follow else print_log(run, request):
        log.line(line)


@app.command()
def cancel(run: RunPath) -> None:
    """End a run: its ranks finish their step and save. A job of it leaves the queue."""
    scheduler = find_scheduler()
    for line in cancel_run(read_facts(run, now(), scheduler), scheduler):
        log.line(line)
