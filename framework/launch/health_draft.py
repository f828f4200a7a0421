"""A node's report while it grows, the limits of its stages, and how a node meets the first one. See health.py."""

import json
import os
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from framework.environment import switch_address
from framework.launch.health import NodeReport, Request, Stage
from framework.launch.meeting import Answer, Meeting, ask
from framework.launch.node_checks import Checked
from framework.run import write_atomically

GRACE = 1.0  # seconds, at least
# Parts of the request's time, from a process's start: its own checks, meeting the others, all-reduce across nodes.
LOCAL = 0.55
MEET = 0.75
ACROSS = 0.95


@dataclass(frozen=True)
class Place:
    """This process's: `rank` of all, `local_rank` of the node's `local_world`. begin: of time.monotonic."""

    node: str
    rank: int
    local_rank: int
    local_world: int
    address: tuple[str, int]
    begin: float

    @property
    def leads(self) -> bool:
        """Whether it writes its node's report."""
        return self.local_rank == 0


class Draft:
    """A node's report while it grows, and the thread that ends the process when a stage takes too long. Only the
    node's first process writes.
    """

    def __init__(self, folder: Path, request: Request, place: Place) -> None:
        self.request, self.place = request, place
        self._path = folder / f"{place.node}.json"
        self._lock = threading.RLock()
        self._report = NodeReport(place.node, switch_address())
        self._doing, self._limit, self._blames = "", place.begin + request.health.timeout, True
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def problems(self) -> tuple[str, ...]:
        return self._report.problems

    def until(self, part: float) -> float:
        """A part of the request's time, as time.monotonic will say."""
        return self.place.begin + part * self.request.health.timeout

    def begin(self, doing: str, part: float, *, blames: bool) -> None:
        """Something that may hang begins. blames: whether that would be this node's fault."""
        with self._lock:
            self._doing, self._limit, self._blames = doing, self.until(part), blames

    def add(self, finding: Checked) -> None:
        with self._lock:
            before = self._report
            numbers = before.numbers | finding.numbers
            self._report = replace(before, problems=(*before.problems, *finding.problems), numbers=numbers)

    def note(self, text: str) -> None:
        with self._lock:
            self._report = replace(self._report, notes=(*self._report.notes, text))

    def write(self, stage: Stage, *, ended: bool = False) -> None:
        with self._lock:
            numbers = self._report.numbers | {"seconds": round(time.monotonic() - self.place.begin, 1)}
            self._report = replace(self._report, stage=stage, ended=ended, numbers=numbers)
            if self.place.leads:
                fields = {"request": self.request.id, **asdict(self._report)}
                write_atomically(self._path, json.dumps(fields) + "\n")

    def _watch(self) -> None:
        # A little later than the stage's own limits, which know better what is missing.
        while time.monotonic() < self._limit + max(GRACE, 0.03 * self.request.health.timeout):
            time.sleep(0.05)
        text = f"{self._doing}: no end within {self._limit - self.place.begin:.0f} s"
        if self._blames:
            self.add(Checked((text,)))
        else:
            self.note(text)
        self.write(self._report.stage, ended=True)
        os._exit(0)


def open_meeting(draft: Draft, *, store: int) -> Meeting | None:
    """The first rank's. store: the port of the ranks' store, 0 = there is none."""
    if draft.place.rank != 0:
        return None
    port = draft.place.address[1]
    try:
        return Meeting(port, store=store)
    except OSError as error:
        draft.note(f"the first rank can't be met at port {port}: {error}")
        return None


def meet(draft: Draft) -> Answer | None:
    """A node's first process meets the first rank; compares the clocks. None where it isn't there."""
    place = draft.place
    if place.rank == 0:
        draft.add(Checked(numbers={"clock_s": 0.0}))
        return None
    draft.begin("meeting the first node", MEET, blames=False)
    try:
        answer = ask(place.address, place.node, draft.until(MEET))
    except OSError as error:
        draft.note(str(error))
        return None
    draft.add(Checked(numbers={"clock_s": round(answer.clock, 4)}))
    return answer
