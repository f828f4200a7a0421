"""`cuboid bench`, and the ranks of `cuboid plan --calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from framework.environment import read_environment

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(hidden=True)
def calibrate(out: Annotated[Path, typer.Option(help="The description to write.")]) -> None:
    """One rank of a calibration."""
    env = read_environment()
    if env is None:
        raise ValueError("`cuboid calibrate` is started by `cuboid plan --calibrate`")
    from framework.programs.calibrate import calibrate as run_calibrate

    run_calibrate(env, out)
