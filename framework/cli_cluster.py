"""`cuboid doctor`, and what a job's script starts on nodes."""

import time
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.environment import pass_over_notices, read_environment

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def doctor(
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="Also what this recipe needs: data, checkpoints, a start.")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="Cluster file: every free node of it, and its bad ones.")] = None,
    scratch: Annotated[str | None, typer.Option(help="Directory on this machine's own disk.")] = None,
    forget: Annotated[str | None, typer.Option(help="With --cluster: a bad node that is mended.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list, in one line.")] = False,
) -> None:
    """What this machine has of what a run needs, and the fix of what it hasn't. Exit status 1 with problems."""
    from framework.launch.cluster import load_cluster
    from framework.launch.doctor import doctor_here
    from framework.launch.doctor_report import doctor_cluster, has_problem, lines_of, to_json, to_json_by_node
    from framework.launch.nodes import forget as forget_node
    from framework.launch.nodes import nodes_path
    from framework.launch.visit import run_on_nodes

    if forget is not None:
        if cluster is None:
            raise ValueError("--forget needs --cluster: which cluster's node it is")
        path = nodes_path(load_cluster(cluster))
        if not forget_node(path, forget):
            raise ValueError(f"{forget} isn't among the bad nodes in {path}")
        log.line(f"{forget} is no bad node any more")
        return
    if cluster is None:
        found = doctor_here(recipe, scratch or "/tmp")
        lines = [to_json(found)] if json else lines_of(found)
        bad = has_problem(found)
    else:
        lines, by_node = doctor_cluster(load_cluster(cluster), run_on_nodes, recipe=recipe, now=time.time())
        lines = [to_json_by_node(by_node)] if json else lines
        bad = any(has_problem(found) for found in by_node.values())
    for line in lines:
        log.line(line)
    if bad:
        raise typer.Exit(1)


@app.command(hidden=True)
def health(folder: Annotated[Path, typer.Argument(help="Where the request lies.")]) -> None:
    """One process's part of the check of a job's nodes."""
    env = read_environment()
    if env is None:
        raise ValueError("`cuboid health` is started by a job's script, on every node")
    from framework.launch.health_step import check_health

    pass_over_notices()
    check_health(folder, env)
