"""`cuboid bench`, and the ranks of `cuboid plan --calibrate`."""

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.environment import read_environment, visible_gpus
from framework.launch.check import check_machine, check_start
from framework.launch.local import run_local
from framework.launch.stages import pick_stage
from framework.plan.hardware import load_hardware
from framework.recipe import load_recipe

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def bench(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")] = None,
    *,
    steps: Annotated[int, typer.Option(help="Steps to time at most.")] = 100,
    minutes: Annotated[float, typer.Option(help="Minutes to take at most, a step begun aside.")] = 10.0,
    stage: Annotated[str | None, typer.Option(help="Of a recipe with stages: its name; else the first.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Description to predict by: h100, or a calibration.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time a recipe's training loop here or on a job's ranks, write nothing, and compare with the prediction."""
    if steps < 1:
        raise ValueError(f"--steps {steps} must be at least 1")
    if not minutes > 0:
        raise ValueError(f"--minutes {minutes} must be above 0")
    loaded, picked, notes = pick_stage(load_recipe(recipe, overrides or []), stage)
    described = load_hardware(hardware) if hardware else None
    env, num_gpus = read_environment(), visible_gpus()
    for note in notes if (env is None or env.is_first) and not json else []:
        log.line(note)
    shape = check_start(loaded, num_ranks=None if env is None else env.world_size, num_gpus=num_gpus)
    if env is None:
        check_machine(shape, num_gpus=num_gpus)
        words = ["--steps", str(steps), "--minutes", str(minutes), *(["--json"] if json else [])]
        words += ["--hardware", hardware] if hardware else []
        words += ["--stage", picked] if picked else []
        raise typer.Exit(run_local(["bench", str(recipe), *(overrides or []), *words], world_size=shape.world_size))
    from framework.programs.bench import bench as run_bench
    from framework.programs.bench import bench_lines

    found = run_bench(loaded, env, name=recipe.name, stage=picked, steps=steps, minutes=minutes, hardware=described)
    if env.is_first:
        for text in [json_.dumps(asdict(found))] if json else bench_lines(found):
            log.line(text)


@app.command(hidden=True)
def calibrate(out: Annotated[Path, typer.Option(help="The description to write.")]) -> None:
    """One rank of a calibration."""
    env = read_environment()
    if env is None:
        raise ValueError("`cuboid calibrate` is started by `cuboid plan --calibrate`")
    from framework.programs.calibrate import calibrate as run_calibrate

    run_calibrate(env, out)
