"""`cuboid doctor`, and what a job's script starts on nodes."""

from pathlib import Path
from typing import Annotated

import typer

from framework.environment import read_environment

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(hidden=True)
def health(folder: Annotated[Path, typer.Argument(help="Where the request lies.")]) -> None:
    """One process's part of the check of a job's nodes."""
    env = read_environment()
    if env is None:
        raise ValueError("`cuboid health` is started by a job's script, on every node")
    from framework.launch.health import check_health

    check_health(folder, env)
