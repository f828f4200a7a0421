"""What has happened to a run from outside: RUN/jobs/history.jsonl, one event a line, appended by whoever did it.

    submitted   a job was handed to the scheduler        job, cluster, nodes (wanted), after (the stage before's job)
    started     the job got its nodes                     job, restart, nodes
    launched    ranks were started for an attempt         job, attempt, nodes, ranks
    ended       the attempt is over                       job, attempt, outcome, reason, kind, step (saved), node
    excluded    a node isn't used any more                node, reason
    requeued    the job waits in the queue again          job, outcome, reason
    finished    nothing follows any more                  job, outcome, reason, step
    cancelled   a person asked for the end                job

Times are Unix seconds of the machine that wrote the line; what is derived from them (queue, restarts) is as good as the
clocks, which the health checks compare.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

JOBS = "jobs"
FILE = "history.jsonl"

EventName = Literal["submitted", "started", "launched", "ended", "excluded", "requeued", "finished", "cancelled"]
# How an attempt, or a job, ends. done: all steps. preempted: stopped by a signal, saved. retry: lost, can be tried
# again. fatal: trying again would end the same way. cancelled: a person ended it.
Outcome = Literal["done", "preempted", "retry", "fatal", "cancelled"]


@dataclass(frozen=True)
class Event:
    """One line. Fields that an event doesn't have are None."""

    event: EventName
    time: float
    job: str | None = None
    cluster: str | None = None
    restart: int | None = None
    attempt: int | None = None
    nodes: tuple[str, ...] | None = None
    ranks: int | None = None
    outcome: Outcome | None = None
    reason: str | None = None
    step: int | None = None
    node: str | None = None
    kind: str | None = None
    after: str | None = None


class History:
    """The events of a run, oldest first."""

    def __init__(self, run: Path) -> None:
        self.path = run / JOBS / FILE

    def add(self, event: Event) -> None:
        """Append an event; written whole by one call, so that writers on several machines don't mix lines."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({name: value for name, value in asdict(event).items() if value is not None}) + "\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a line that was cut off isn't gone on with
                line = "\n" + line
            if os.write(descriptor, line.encode()) != len(line.encode()):
                raise OSError(f"{self.path} can't take a whole line")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def events(self) -> list[Event]:
        """All of them; a line that was cut off is left out."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                fields = json.loads(line)
                nodes = fields.get("nodes")
                found.append(Event(**fields | {"nodes": None if nodes is None else tuple(nodes)}))
            except (ValueError, TypeError, AttributeError):
                continue
        return found


def now() -> float:
    """Unix seconds, to the millisecond."""
    return round(time.time(), 3)
