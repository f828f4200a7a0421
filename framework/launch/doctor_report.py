"""The doctor's findings as a table, as JSON, and those of many nodes as what differs between them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from framework.launch.config import ClusterConfig
from framework.launch.doctor import Finding
from framework.launch.nodes import nodes_path, read_nodes

# Runs `cuboid WORDS` once on each node of a cluster: node -> what it printed, None where it didn't answer.
RunOnNodes = Callable[[ClusterConfig, Sequence[str]], Mapping[str, str | None]]
SHOWN = 8  # nodes named in a line


def to_json(found: Sequence[Finding]) -> str:
    return json.dumps([asdict(finding) for finding in found])


def to_json_by_node(found: Mapping[str, Sequence[Finding]]) -> str:
    return json.dumps({node: [asdict(finding) for finding in each] for node, each in found.items()})


def from_json(text: str) -> list[Finding]:
    """Raises ValueError for anything else."""
    try:
        return [Finding(**fields) for fields in json.loads(text)]
    except TypeError:
        raise ValueError("these aren't a doctor's findings") from None


def has_problem(found: Sequence[Finding]) -> bool:
    return any(finding.status == "problem" for finding in found)


def lines_of(found: Sequence[Finding]) -> list[str]:
    """An aligned table; below each warning and problem its fix, at the end how many there are."""
    width = max((len(finding.name) for finding in found), default=0)
    lines = []
    for finding in found:
        first, *more = finding.value.splitlines() or [""]
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {first}".rstrip())
        lines += [f"{'':<8} {'':<{width}}  {text}" for text in more]
        if finding.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.fix}")
    return [*lines, "", summary(found)]


def summary(found: Sequence[Finding]) -> str:
    problems, warnings = (sum(finding.status == status for finding in found) for status in ("problem", "warning"))
    words = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    return " and ".join(words) or "all is well"


def named(nodes: Sequence[str]) -> str:
    """A few nodes by name, many by their number."""
    shown = ", ".join(nodes[:SHOWN])
    return shown if len(nodes) <= SHOWN else f"{shown} and {len(nodes) - SHOWN} more"


def merge_findings(found: Mapping[str, Sequence[Finding]]) -> list[str]:
    """Many nodes' findings: what differs between them, the rarest value first, and what is wrong."""
    nodes = list(found)
    lines = [f"{len(nodes)} nodes: {named(nodes)}"]
    for name in dict.fromkeys(finding.name for each in found.values() for finding in each if finding.compared):
        holders: dict[str, list[str]] = {}
        for node, each in found.items():
            values = [finding.value for finding in each if finding.name == name]
            holders.setdefault("; ".join(values) or "not there", []).append(node)
        if len(holders) > 1:
            lines.append(f"differs  {name}")
            ordered = sorted(holders.items(), key=lambda item: len(item[1]))
            lines += [f"{'':<8}   {value}: {named(holding)}" for value, holding in ordered]
    wrong: dict[Finding, list[str]] = {}
    for node, each in found.items():
        for finding in each:
            if finding.status != "ok":
                wrong.setdefault(finding, []).append(node)
    for status in ("problem", "warning"):
        for finding, holding in wrong.items():
            if finding.status == status:
                where = "all nodes" if len(holding) == len(nodes) else named(holding)
                lines.append(f"{status:<8} {finding.name}: {finding.value} ({where})")
                lines += [f"{'':<8}   -> {finding.fix}"] if finding.fix else []
    return lines if len(lines) > 1 else [*lines, "they are all the same, and all is well"]


def findings_of(answers: Mapping[str, str | None]) -> dict[str, list[Finding]]:
    """What nodes printed -> their findings; a node that printed something else has that as its problem."""
    found = {}
    for node, text in answers.items():
        last = ((text or "").strip().splitlines() or ["nothing"])[-1]
        try:
            found[node] = from_json(last)
        except ValueError:
            fix = "run `cuboid doctor` on it"
            found[node] = [Finding("doctor", f"it said: {last[:200]}", "problem", fix, compared=False)]
    return found


def bad_node_lines(cluster: ClusterConfig, now: float) -> list[str]:
    """The nodes that are remembered as bad."""
    path = nodes_path(cluster)
    nodes = read_nodes(path)
    if not nodes:
        return [f"no bad nodes are remembered in {path}"]
    lines = [f"bad nodes, remembered in {path}:"]
    width = max(len(bad.node) for bad in nodes)
    for bad in nodes:
        left = (bad.until - now) / 3600
        state = f"left out for {left:.0f} h more" if bad.is_excluded(now) else "tried again"
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(bad.since))
        times = "once" if bad.count == 1 else f"{bad.count} times"
        lines.append(f"  {bad.node:<{width}}  {times}, last {day}, {state}: {bad.reason}")
    lines[0] += " (one that is mended: --forget NODE)"
    return lines


def doctor_cluster(
    cluster: ClusterConfig, run_on_nodes: RunOnNodes, *, recipe: Path | None, now: float
) -> tuple[list[str], dict[str, list[Finding]]]:
    """Every node of a cluster: the lines to show, and the findings by node."""
    words = ["doctor", "--json", "--scratch", cluster.scratch]
    words += [] if recipe is None else ["--recipe", str(recipe)]
    found = findings_of(run_on_nodes(cluster, words))
    return [*merge_findings(found), "", *bad_node_lines(cluster, now)], found
