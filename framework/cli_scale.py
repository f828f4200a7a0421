"""`cuboid scale`: a recipe for longer clips, from one that trains."""

import os
from pathlib import Path
from typing import Annotated, get_args

import typer

from framework import log
from framework.forecast.search import fastest_placement
from framework.layers import apply_overrides
from framework.plan.hardware import load_hardware
from framework.plan.scale import RopeTime, ScaleRequest, apply_to, bridge_stages, changes_for, figures_of, last_stage
from framework.plan.scale_file import change_lines, recipe_text, table_lines
from framework.plan.scale_mesh import choose_mesh
from framework.recipe import build_recipe, read_recipe_layers

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

BATCHES = ("tokens", "samples")


@app.command()
def scale(
    recipe: Annotated[Path, typer.Argument(help="Recipe file of the shorter clips, or RUN/recipe.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")] = None,
    *,
    seconds: Annotated[float, typer.Option(help="Duration of the longest clips.")],
    gpus: Annotated[int | None, typer.Option(help="GPUs to use; those of the recipe's mesh.")] = None,
    gpu: Annotated[str | None, typer.Option(help="h100, or a file: the mesh is the fastest there.")] = None,
    resolution: Annotated[str | None, typer.Option(metavar="HxW", help="Another size in pixels: 720x1280.")] = None,
    batch: Annotated[str, typer.Option(help="What a step keeps: tokens or samples.")] = "tokens",
    rope: Annotated[str | None, typer.Option(help="none, interpolation, ntk or riflex; chosen by the factor.")] = None,
    out: Annotated[Path | None, typer.Option(help="Recipe to write, each change with its reason.")] = None,
) -> None:
    """What a longer clip changes in a recipe: shapes, mesh, batch, noise, rotary positions, learning rate."""
    if batch not in BATCHES:
        raise ValueError(f"--batch {batch} must be tokens or samples")
    if rope is not None and rope not in get_args(RopeTime):
        raise ValueError(f"--rope {rope} must be one of {', '.join(get_args(RopeTime))}")
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus {gpus} must be at least 1")
    if out is not None:
        check_out(out)
    size = None if resolution is None else parse_size(resolution)
    tree = last_stage(apply_overrides(read_recipe_layers(recipe), overrides or []))
    old = build_recipe(tree)
    request = ScaleRequest(seconds, gpus, size, batch, rope)  # type: ignore[arg-type]
    named = gpu or old.hardware.name
    hardware = load_hardware(named) if named else None
    choose = fastest_placement(hardware) if hardware and hardware.device.kind == "gpu" else choose_mesh
    changes = changes_for(old, request, choose=choose)
    stages, new = bridge_stages(old, changes), build_recipe(apply_to(tree, changes))
    words = [*table_lines(figures_of(old), figures_of(new)), ""]
    for text in [*words, *change_lines(changes)]:
        log.line(text)
    streams = ", ".join(stream.path for stream in new.data.streams)
    log.line(f"data.streams ({streams}): latents fit at exactly a bucket's shape and rate: encode them anew")
    if out is not None:
        text = recipe_text(tree, changes, stages, [f"{recipe} for clips of {seconds:g} s.", "", *words[:-1]])
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
        except OSError as error:  # a full disk, a place that only looks writable
            raise ValueError(f"--out {out} can't be written ({error.strerror}): name another file") from None
        log.line(f"{out} is written")


def check_out(out: Path) -> None:
    """Raises ValueError for a file that is there, or that can't be made."""
    try:
        there = out.exists()
        above = next(parent for parent in out.absolute().parents if parent.exists())
    except OSError as error:  # a name too long, or a directory that may not be looked into
        raise ValueError(f"--out {out} can't be written ({error.strerror}): name another file") from None
    if there:
        raise ValueError(f"--out {out} is there already: name a new file, or remove it")
    if not above.is_dir():
        raise ValueError(f"--out {out} can't be written: {above} is a file, not a directory: name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out} can't be written: {above} is closed to this user: name another place")


def parse_size(resolution: str) -> tuple[int, int]:
    """HEIGHTxWIDTH. Raises ValueError for anything else."""
    parts = resolution.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--resolution {resolution} must be HEIGHTxWIDTH, as in 720x1280")
    return int(parts[0]), int(parts[1])
