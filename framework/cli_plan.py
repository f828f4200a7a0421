"""`cuboid plan`: what a recipe will need and take, before a job waits in a queue."""

import json as json_
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.data.budget import with_steps
from framework.environment import gpu_name
from framework.forecast.forecast import VERSION, Forecast, forecast
from framework.forecast.search import search
from framework.forecast.text import forecast_lines, layout_lines, layouts_json, to_json, total_lines
from framework.launch.calibrate import calibrate as measure
from framework.parallel.config import MeshShape, resolve_mesh
from framework.plan.computing import attention_rates
from framework.plan.hardware import FOLDER, Hardware, gpu_of, hardware_names, load_hardware
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
    ranks: Annotated[int | None, typer.Option(help="Processes of --calibrate, 4 unless said.")] = None,
) -> None:
    """Tokens, memory, traffic, step time, hours and cost of a recipe on some hardware; refuses what can't work."""
    if calibrate:
        if recipe is not None or out is None:
            raise ValueError("--calibrate measures the machine and no recipe: cuboid plan --calibrate --out FILE.yaml")
        given = {"--gpus": gpus is not None, "--gpu": gpu is not None, "--search": find, "--json": json}
        if without := [name for name, is_given in given.items() if is_given]:
            raise ValueError(
                f"{', '.join(without)} with --calibrate: it measures the machine that it runs on, and plans nothing; "
                f"leave {'it' if len(without) == 1 else 'them'} out"
            )
        measure(out, 4 if ranks is None else ranks)
        log.line(f"measured: {out}; use it by --gpu {out}, or hardware.name={out} in a recipe")
        return
    if recipe is None:
        raise ValueError("name a recipe: cuboid plan RECIPE, or cuboid plan --calibrate --out FILE.yaml")
    if out is not None:
        raise ValueError(f"--out {out} is what --calibrate writes: leave it out, or the recipe")
    if ranks is not None:
        raise ValueError(f"--ranks {ranks} is the number of processes of --calibrate: leave it out")
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus {gpus} must be at least 1")
    loaded = load_recipe(recipe, overrides or [])
    parts = [
        Part(stage.index, stage.name, with_steps(stage_recipe(loaded, stage.index), stage.exit))
        for stage in stages_of(loaded)
    ]
    lines, plain, refusal = (ranked if find else planned)(parts or [Part(None, "", loaded)], gpu or "", gpus)
    for text in [json_.dumps(plain)] if json else lines:
        log.line(text)
    if refusal:
        raise ValueError(refusal)


@dataclass(frozen=True)
class Part:
    """A stage of a recipe, or a recipe without any."""

    index: int | None
    name: str
    recipe: Recipe

    def hardware(self, named: str) -> Hardware:
        """The description to plan by: what was named, else the recipe's, else that of this machine's GPU."""
        name = named or self.recipe.hardware.name or gpu_of(gpu_name())
        if not name:
            raise ValueError(
                f"for which hardware? Say --gpu {'|'.join(hardware_names())}, or hardware.name in the recipe; "
                "cuboid plan --calibrate --out FILE.yaml measures this machine for --gpu FILE.yaml"
            )
        found = load_hardware(name)
        try:
            attention_rates(self.recipe, found)
        except ValueError as error:
            raise ValueError(f"{file_of(name)}: {error}") from None
        return found

    def shape(self, gpus: int | None) -> MeshShape:
        """The mesh on so many GPUs, or on those that the recipe is for."""
        heads, ranks = self.recipe.model.num_attention_heads, gpus or self.recipe.hardware.gpus or None
        return resolve_mesh(self.recipe.mesh, num_ranks=ranks, heads=heads)

    def notes(self, gpus: int | None) -> list[str]:
        """What was taken for granted about the number of GPUs."""
        if self.recipe.mesh.dp != "auto" or gpus or self.recipe.hardware.gpus:
            return []
        return [
            f"mesh.dp is auto and --gpus isn't given: planned for {self.shape(None).world_size:,} GPUs, the least the "
            "mesh can have"
        ]


def file_of(name: str) -> Path:
    """Where a description lies."""
    return FOLDER / f"{name}.yaml" if name in hardware_names() else Path(name)


@contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Let a ValueError say which stage it is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}" if name else str(error)) from None


def planned(parts: list[Part], gpu: str, gpus: int | None) -> tuple[list[str], object, str]:
    """The forecast of each stage: as lines, as plain data, and why one doesn't fit."""
    lines: list[str] = []
    found: list[Forecast] = []
    for part in parts:
        with of_stage(part.name):
            found.append(forecast(part.recipe, part.shape(gpus), part.hardware(gpu), stage=part.name))
        lines += [*part.notes(gpus), *forecast_lines(found[-1]), ""]
    refusals = [
        f"stage {each.stage}: {each.memory.refusal()}" if each.stage else each.memory.refusal()
        for each in found
        if not each.memory.fits
    ]
    return [*lines, *total_lines(found)], to_json(found), refusals[0] if refusals else ""


def ranked(parts: list[Part], gpu: str, gpus: int | None) -> tuple[list[str], object, str]:
    """The layouts of each stage that fit, likewise."""
    lines: list[str] = []
    plain: list[dict[str, object]] = []
    for part in parts:
        with of_stage(part.name):
            number = gpus or part.recipe.hardware.gpus or part.shape(None).world_size
            layouts = search(part.recipe, part.hardware(gpu), gpus=number)
        title = [f"stage {part.name}"] if part.name else []
        lines += [*title, *part.notes(gpus), *layout_lines(layouts, stage=part.index), ""]
        plain.append({"stage": part.name, "layouts": layouts_json(layouts, stage=part.index)})
    return lines, {"version": VERSION, "stages": plain}, ""
