"""A run's status as a person reads it, and as a program does."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Final

from framework.launch.account import Account
from framework.launch.queue import JobState
from framework.launch.status import SLOW, Status
from framework.log import duration

BAR: Final = 30  # characters of the whole wall time
NAMES: Final = (
    ("steps", "steps that count"),
    ("lost", "steps done again"),
    ("queue", "waiting in the queue"),
    ("launch", "health checks, launch"),
    ("import", "imports"),
    ("init", "process groups"),
    ("build", "model and engine"),
    ("load", "weights, checkpoint"),
    ("first_step", "first step's excess"),
    ("save", "waiting for saves"),
    ("observe", "validation, samples"),
    ("detect", "seeing that it died"),
    ("end", "last save, way out"),
    ("between", "between attempts"),
    ("other", "other"),
)


def page(status: Status) -> Iterator[str]:
    """The lines of one run."""
    detail = f" ({status.detail})" if status.detail else ""
    done = f"  step {progress(status)}" if status.last else ""
    left = f"  {duration(status.eta)} left" if status.eta is not None else ""
    yield f"{status.run}  {status.state}{detail}{done}{left}"
    for name, text in rows(status):
        yield f"  {name:13} {text}"
    if status.account.wall > 0:
        yield ""
        yield from table(status.account)


def progress(status: Status) -> str:
    """1,200 of 5,000 (24 %)."""
    return f"{status.step:,} of {status.last:,} ({status.step / status.last:.0%})"


def rows(status: Status) -> Iterator[tuple[str, str]]:
    """Name and text of what is known."""
    if status.job is not None:
        where = f" on {status.cluster}" if status.cluster else ""
        count = f", {status.requeues} requeues" if status.requeues != 1 else ", 1 requeue"
        again = f", {status.restarts} restarts" if status.restarts != 1 else ", 1 restart"
        yield "job", f"{status.job}{where}{count}{again}"
    if status.attempt is not None:
        phase = f", in {status.phase}" if status.phase is not None else ""
        heard = f", last sign {duration(status.silence)} ago" if status.silence is not None else ""
        yield "attempt", f"{status.attempt}{phase}{heard}"
    if status.stage is not None:
        yield "stage", f"{status.stage}, to step {status.last:,} at the latest"
    if status.nodes:
        ranks = f", {status.ranks} ranks" if status.ranks is not None else ""
        yield "nodes", f"{' '.join(status.nodes)}{ranks}"
    if status.tokens_per_second is not None and status.silence is not None:  # of a run that runs
        each = f", {status.usual:.3g} s a step" if status.usual is not None else ""
        yield "speed", f"{status.tokens_per_second:,.0f} tokens/s{each}"
    if status.loss is not None:
        yield "loss", f"{status.loss:.4f}"
    if status.checkpoint is not None:
        age = f", {duration(status.age)} ago" if status.age is not None else ""
        yield "checkpoint", f"step {status.checkpoint:,}{age}"
    if status.slowest is not None and status.slowest.factor > SLOW:
        yield "slow node", f"{status.slowest.node}, {status.slowest.factor:.2f} times the median of the nodes"
    if status.excluded:
        yield "left out", ", ".join(status.excluded)
    if status.reason is not None:
        yield "last end", status.reason


def table(account: Account) -> Iterator[str]:
    """Where the time went, what there was of it."""
    names = dict(NAMES)
    yield f"  effective training time {account.ratio:.1%} of {duration(account.wall)}"
    for part, seconds in account.parts.items():
        share = seconds / account.wall
        if share >= 0.0005:
            bar = "#" * round(BAR * share)
            yield f"    {names[part]:22} {duration(seconds):>9} {share:6.1%}  {bar}".rstrip()


def as_json(status: Status) -> dict[str, object]:
    """All numbers; seconds, and tokens a second."""
    fields = asdict(status)
    return fields | {"account": fields["account"] | {"ratio": status.account.ratio}}


def overview(statuses: Sequence[Status], jobs: Sequence[JobState]) -> Iterator[str]:
    """One line a run, then the user's jobs that are no run's."""
    lines = [("run", "state", "step", "tokens/s", "left", "job", "effective")]
    for status in statuses:
        lines.append(
            (
                status.run,
                status.state,
                f"{status.step:,}/{status.last:,}" if status.last else "-",
                f"{status.tokens_per_second:,.0f}" if status.tokens_per_second and status.eta is not None else "-",
                duration(status.eta) if status.eta is not None else "-",
                status.job or "-",
                f"{status.account.ratio:.1%}" if status.account.wall > 0 else "-",
            )
        )
    if statuses:
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            yield "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
    known = {status.job for status in statuses}
    others = [job for job in jobs if job.job not in known]
    if others:
        yield "jobs of yours that are no run's here:"
        for job in others:
            yield f"  {job.job}  {job.state}  {job.name}  {job.nodes or job.reason}".rstrip()
    if not statuses and not others:
        yield "no runs, and no jobs in the queue"
