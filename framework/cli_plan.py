"""`cuboid plan`: what a recipe will need and take, before a job waits in a queue."""

import json as json_
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.data.budget import with_steps
from framework.environment import gpu_name
from framework.forecast.forecast import Forecast, forecast
from framework.forecast.search import search
from framework.forecast.text import forecast_lines, layout_lines, layouts_json, to_json, total_lines
from framework.launch.calibrate import calibrate as measure
from framework.parallel.config import resolve_mesh
from framework.plan.hardware import Hardware, hardware_names, load_hardware
from framework.recipe import Recipe, load_recipe
from framework.stages.recipes import stage_recipe, stages_of

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
    hardware = load_hardware(described(gpu or loaded.hardware.name))
    wanted = gpus if gpus is not None else loaded.hardware.gpus or None
    if wanted is not None and wanted < 1:
        raise ValueError(f"--gpus {wanted} must be at least 1")
    stages = [(stage.name, with_steps(stage_recipe(loaded, stage.index), stage.exit)) for stage in stages_of(loaded)]
    parts = stages or [("", loaded)]
    if find:
        lines, plain = ranked(parts, hardware, wanted)
    else:
        lines, plain = planned(parts, hardware, wanted)
    for text in [json_.dumps(plain)] if json else lines:
        log.line(text)


def described(name: str) -> str:
    """The description to plan by: what was named, else that of this machine's GPU. Raises ValueError without either."""
    if name:
        return name
    found = next((each for each in hardware_names() if each in gpu_name().lower()), None)
    if found is None:
        raise ValueError(
            f"for which hardware? Say --gpu {'|'.join(hardware_names())}, or hardware.name in the recipe; "
            "cuboid plan --calibrate --out FILE.yaml measures this machine for --gpu FILE.yaml"
        )
    return found


@contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Let a ValueError say which stage it is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}" if name else str(error)) from None


def planned(parts: list[tuple[str, Recipe]], hardware: Hardware, gpus: int | None) -> tuple[list[str], object]:
    """The forecast of each stage, as lines and as plain data. Raises ValueError where one doesn't fit, having said it
    all.
    """
    lines: list[str] = []
    found: list[Forecast] = []
    for name, recipe in parts:
        with of_stage(name):
            found.append(forecast(recipe, resolve_mesh(recipe.mesh, num_ranks=gpus), hardware, stage=name))
        lines += [*forecast_lines(found[-1]), ""]
    refused = [each for each in found if not each.memory.fits]
    if refused:
        for text in lines:
            log.line(text)
        with of_stage(refused[0].stage):
            raise ValueError(refused[0].memory.refusal())
    return [*lines, *total_lines(found)], to_json(found)


def ranked(parts: list[tuple[str, Recipe]], hardware: Hardware, gpus: int | None) -> tuple[list[str], object]:
    """The layouts of each stage that fit."""
    lines, plain = [], []
    for name, recipe in parts:
        with of_stage(name):
            number = gpus or resolve_mesh(recipe.mesh, num_ranks=None).world_size
            layouts = search(recipe, hardware, gpus=number)
        lines += [f"stage {name}" if name else "", *layout_lines(layouts), ""]
        plain.append({"stage": name, "layouts": layouts_json(layouts)})
    return lines, plain
