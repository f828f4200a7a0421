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
import statistics
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from framework.launch.config import HealthConfig
from framework.run import write_atomically

Stage = Literal["local", "across", "done"]
REQUEST: Final = "request.json"
LATE = 30.0  # seconds by which nodes may begin one after another


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
