"""`cuboid plan`: what a recipe will need and take, before a job waits in a queue."""

import json as json_
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.forecast.forecast import forecast
from framework.forecast.search import search
from framework.forecast.text import forecast_lines, layout_lines, layouts_json, to_json
from framework.launch.calibrate import calibrate as measure
from framework.parallel.config import resolve_mesh
from framework.plan.hardware import load_hardware
from framework.recipe import load_recipe

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file; none with --calibrate.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")] = None,
    *,
    gpus: Annotated[
        int | None, typer.Option(help="How many; else hardware.gpus of the recipe, else its mesh's.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="h100, h200, b200, a100 or a file; else hardware.name.")] = None,
    find: Annotated[bool, typer.Option("--search", help="Rank every layout that fits.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object (framework/forecast/forecast.py).")
    ] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine and write --out.")] = False,
    out: Annotated[Path | None, typer.Option(help="The file that --calibrate writes, for --gpu.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes of --calibrate.")] = 4,
) -> None:
    """Tokens, memory, traffic, step time, hours and cost of a recipe on some hardware; refuses what can't work."""
    if calibrate:
        if recipe is not None or out is None:
            raise ValueError("--calibrate measures the machine and no recipe: cuboid plan --calibrate --out FILE.yaml")
        measure(out, ranks)
        log.line(f"measured: {out}; use it by --gpu {out}, or hardware.name={out} in a recipe")
        return
    if recipe is None:
        raise ValueError("name a recipe: cuboid plan RECIPE, or cuboid plan --calibrate --out FILE.yaml")
    loaded = load_recipe(recipe, overrides or [])
    hardware = load_hardware(gpu or loaded.hardware.name or "h100")
    wanted = gpus if gpus is not None else loaded.hardware.gpus or None
    if wanted is not None and wanted < 1:
        raise ValueError(f"--gpus {wanted} must be at least 1")
    if find:
        layouts = search(loaded, hardware, gpus=wanted or resolve_mesh(loaded.mesh, num_ranks=None).world_size)
        for text in [json_.dumps(layouts_json(layouts))] if json else layout_lines(layouts):
            log.line(text)
        return
    shape = resolve_mesh(loaded.mesh, num_ranks=wanted)
    found = forecast(loaded, shape, hardware)
    for text in [json_.dumps(to_json(found))] if json else forecast_lines(found):
        log.line(text)
    if not found.memory.fits:
        raise ValueError(found.memory.refusal())
