"""`cuboid doctor`, and what a job's script starts on nodes."""

import time
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.environment import read_environment

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def doctor(
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="Also what this recipe needs: data, checkpoints, a start.")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="Cluster file: its scratch, and its bad nodes.")] = None,
    scratch: Annotated[str | None, typer.Option(help="Directory on this machine's own disk.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list, in one line.")] = False,
) -> None:
    """What this machine has of what a run needs, and the fix of what it hasn't. Exit status 1 with problems."""
    from framework.launch.cluster import load_cluster
    from framework.launch.doctor import doctor_here
    from framework.launch.doctor_report import bad_node_lines, has_problem, lines_of, to_json

    described = None if cluster is None else load_cluster(cluster)
    found = doctor_here(recipe, scratch or (described.scratch if described else "/tmp"))
    for line in [to_json(found)] if json else lines_of(found):
        log.line(line)
    if described is not None and not json:
        for line in ["", *bad_node_lines(described, time.time())]:
            log.line(line)
    if has_problem(found):
        raise typer.Exit(1)


@app.command(hidden=True)
def health(folder: Annotated[Path, typer.Argument(help="Where the request lies.")]) -> None:
    """One process's part of the check of a job's nodes."""
    env = read_environment()
    if env is None:
        raise ValueError("`cuboid health` is started by a job's script, on every node")
    from framework.launch.health_step import check_health

    check_health(folder, env)
