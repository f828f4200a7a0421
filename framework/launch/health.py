"""What nodes show before ranks start on them: `cuboid health FOLDER`, a step of its own on every node of a job.

FOLDER/request.json says what is asked; each node's first process writes FOLDER/NODE.json. Who asked reads these: a node
that says nothing is as bad as one that says a problem. Level basic is one process a node and imports no torch; full is
one a rank, and goes through these stages:

    local    disk, memory, the site's command; on every rank a product whose answer is known, free memory of its GPU;
             an all-reduce among the node's own ranks, over a store of its own. Then the report is written a first time.
    across   those nodes that have no problem, and have met by then, all-reduce together; each exchanges with the next
    done

What fails in `local` is the node's own fault. What fails `across` can't be told to be anybody's, and is a note; there
are three exceptions: a node that doesn't reach the first one while others do, one that ends without a word while others
go on, one whose exchanges are slow with either neighbour. Nothing is waited for without limit: when a stage's time is
over, a thread writes the report, says where it stopped, and ends the process.
"""

import json
import os
import statistics
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from framework.environment import Environment, local_world_size, master_address, node_name, switch_address
from framework.launch.config import HealthConfig
from framework.launch.meeting import Answer, Meeting, ask
from framework.launch.node_checks import Finding, check_node
from framework.run import write_atomically

Stage = Literal["local", "across", "done"]
REQUEST: Final = "request.json"
LATE = 30.0  # seconds by which nodes may begin one after another
# Parts of the request's time, from a process's start: its own checks, meeting the others, all-reduce across nodes.
LOCAL, MEET, ACROSS = 0.55, 0.75, 0.95


@dataclass(frozen=True)
class Request:
    """id: of this check; reports of another are not its. at: when it was asked for, Unix seconds. nodes: of the job, as
    CUBOID_NODE calls them. gpus: every rank must see one.
    """

    id: str
    at: float
    nodes: tuple[str, ...]
    scratch: str
    gpus: bool
    health: HealthConfig


@dataclass(frozen=True)
class NodeReport:
    """problems: a line each, with the value and the limit. numbers: name with unit -> value. notes: what isn't this
    node's fault. stage: how far it got. ended: whether it says so itself, as its last word.
    """

    node: str
    switch: str
    problems: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stage: Stage = "local"
    ended: bool = False


def step_seconds(health: HealthConfig) -> float:
    """After so long the step has ended by itself, or never will."""
    return health.timeout + LATE


def write_request(
    folder: Path, health: HealthConfig, scratch: str, now: float, nodes: Sequence[str], *, gpus: bool = False
) -> Request:
    """Ask for a check. The folder lies where all nodes see it, and may hold an earlier check's reports."""
    request = Request(uuid.uuid4().hex, now, tuple(nodes), scratch, gpus, health)
    folder.mkdir(parents=True, exist_ok=True)
    for node in nodes:
        (folder / f"{node}.json").unlink(missing_ok=True)
    write_atomically(folder / REQUEST, json.dumps(asdict(request)) + "\n")
    return request


def read_request(folder: Path) -> Request:
    """Raises ValueError where nothing was asked."""
    path = folder / REQUEST
    if not path.is_file():
        raise ValueError(f"{path} isn't there: `cuboid health` is started by a job's script")
    fields = json.loads(path.read_text())
    return Request(**fields | {"nodes": tuple(fields["nodes"]), "health": HealthConfig(**fields["health"])})


def read_reports(folder: Path, nodes: Sequence[str]) -> list[NodeReport]:
    """Every node's report, in the order of `nodes`, with what only all of them together tell."""
    request = read_request(folder)
    reports = [read_report(folder, request, node) for node in nodes]
    return compare_networks(compare_clocks(compare_stages(reports, request), request), request)


def read_report(folder: Path, request: Request, node: str) -> NodeReport:
    """A node's own; one with a problem where there is none."""
    try:
        fields = json.loads((folder / f"{node}.json").read_text())
        if fields.pop("request") == request.id:
            return NodeReport(**fields | {name: tuple(fields[name]) for name in ("problems", "notes")})
    except FileNotFoundError:
        pass
    return NodeReport(node, "", (f"no report within {request.health.timeout:g} s",))


def judge(reports: Sequence[NodeReport]) -> list[NodeReport]:
    """The bad ones."""
    return [report for report in reports if report.problems]


def with_problem(report: NodeReport, problem: str) -> NodeReport:
    return replace(report, problems=(*report.problems, problem))


def compare_stages(reports: list[NodeReport], request: Request) -> list[NodeReport]:
    """Who ended without a word while others went on, and who alone didn't meet the others."""
    ended = any(report.ended for report in reports)
    # Those who couldn't meet a first node that has troubles of its own are not to blame.
    host = next((report for report in reports if request.nodes and report.node == request.nodes[0]), None)
    met = host is not None and host.ended and not host.problems
    met &= any(report.stage != "local" for report in reports if report is not host)
    found = []
    for report in reports:
        if not report.problems and not report.ended and ended:
            what = "meeting the others" if report.stage == "local" else "the all-reduce across nodes"
            report = with_problem(report, f"its processes ended in {what} without a word, the others' did not")
        elif not report.problems and report.ended and report.stage == "local" and met and report is not host:
            report = with_problem(report, f"it didn't meet the first node, {request.nodes[0]}, and others did")
        found.append(report)
    return found


def compare_clocks(reports: list[NodeReport], request: Request) -> list[NodeReport]:
    """Clocks are told against the first node's, which may be the wrong one: the median of all is what counts."""
    ahead = [report.numbers["clock_s"] for report in reports if "clock_s" in report.numbers]
    if not ahead:
        return reports
    middle, limit = statistics.median_low(ahead) if len(ahead) > 2 else 0.0, request.health.clock

    def compared(report: NodeReport) -> NodeReport:
        off = report.numbers.get("clock_s", middle) - middle
        text = f"its clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the others', above clock={limit:g}"
        return with_problem(report, text) if abs(off) > limit else report

    return [compared(report) for report in reports]


def compare_networks(reports: list[NodeReport], request: Request) -> list[NodeReport]:
    """A node is slow when its exchanges with either neighbour are; when half are slow, the network or the limit is."""
    limit = request.health.network
    measured = [report for report in reports if "pair_gbs" in report.numbers]
    slow = [report.node for report in measured if report.numbers["pair_gbs"] < limit]
    blamed = slow if 2 * len(slow) < len(measured) else []

    def compared(report: NodeReport) -> NodeReport:
        if report.node in blamed:
            rate = report.numbers["pair_gbs"]
            return with_problem(report, f"{rate:.3g} GB/s with the faster neighbour, below network={limit:g}")
        rate = report.numbers.get("network_gbs", limit)
        text = f"all-reduce across nodes: {rate:.3g} GB/s, below network={limit:g}"
        return replace(report, notes=(*report.notes, text)) if rate < limit else report

    return [compared(report) for report in reports]


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

    def add(self, finding: Finding) -> None:
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
        while time.monotonic() < self._limit + 0.03 * self.request.health.timeout:
            time.sleep(0.05)
        text = f"{self._doing}: no end within {self._limit - self.place.begin:.0f} s"
        if self._blames:
            self.add(Finding((text,)))
        else:
            self.note(text)
        self.write(self._report.stage, ended=True)
        os._exit(0)


def check_health(folder: Path, env: Environment) -> None:
    """This process's part of a check. What it finds is in the report, a problem is no failure of the command."""
    request = read_request(folder)
    place = Place(node_name(), env.rank, env.local_rank, local_world_size(), master_address(), time.monotonic())
    draft = Draft(folder, request, place)
    if request.health.level == "full":
        from framework.launch.health_ranks import check_ranks

        check_ranks(folder, draft)
    elif place.leads:
        check_basic(draft)


def check_basic(draft: Draft) -> None:
    """Without torch, by a node's first process alone."""
    place, request = draft.place, draft.request
    meeting = open_meeting(draft, store=0)
    draft.begin("its own checks", LOCAL, blames=True)
    draft.add(check_node(request.health, Path(request.scratch)))
    draft.write("local")
    meet(draft)
    draft.write("done", ended=True)
    draft.begin("waiting for the others", 1.0, blames=False)
    while meeting is not None and place.rank == 0 and time.monotonic() < draft.until(MEET):
        if len(meeting.nodes) >= len(request.nodes) - 1:
            break
        time.sleep(0.05)
    draft.begin("", float("inf"), blames=False)


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
        draft.add(Finding(numbers={"clock_s": 0.0}))
        return None
    draft.begin("meeting the first node", MEET, blames=False)
    try:
        answer = ask(place.address, place.node, draft.until(MEET))
    except OSError as error:
        draft.note(str(error))
        return None
    draft.add(Finding(numbers={"clock_s": round(answer.clock, 4)}))
    return answer
