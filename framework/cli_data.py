"""`cuboid data`: directories of shards, and what a run will do with them."""

import json as json_
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.data.buckets import streams_of
from framework.data.report import report_of, to_json
from framework.data.report_text import report_lines
from framework.environment import visible_gpus
from framework.parallel.config import resolve_mesh
from framework.recipe import load_recipe
from framework.storage.storage import open_source

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Data before a run: look, and join.")


@app.callback()
def data() -> None:
    """Data before a run: look, and join."""


@app.command()
def report(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")] = None,
    *,
    ranks: Annotated[int | None, typer.Option(help="Ranks of the run; the mesh's, or this machine's GPUs.")] = None,
    steps: Annotated[int, typer.Option(help="Steps to simulate at most.")] = 1000,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a run will do with its data: what fits, what is dropped and cut off, shares, repeats, expected goodput.

    Reads the streams' indexes, local or in an object store, and no shard.
    """
    for name, value in (("--ranks", ranks), ("--steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    loaded = load_recipe(recipe, overrides or [])
    shape = resolve_mesh(loaded.mesh, num_ranks=ranks, num_gpus=visible_gpus(), heads=loaded.model.num_attention_heads)
    for stream in loaded.data.streams:
        if "://" in stream.path:  # with little patience: a server that is away is told at once
            open_source(stream.path).check_readable()
    streams = streams_of(loaded)
    found = report_of(loaded, streams, shape, steps=steps)
    for text in [json_.dumps(to_json(found))] if json else report_lines(found):
        log.line(text)


@app.command()
def merge(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="Directories of shards, or of shares.")],
    out: Annotated[str, typer.Option(help="The directory to be made of them; theirs may lie below it.")],
) -> None:
    """Several directories of shards -> one, copying only what lies elsewhere; duplicates are left out and listed."""
    from framework.curate.merge import merge_directories, merge_lines

    for text in merge_lines(merge_directories(directories, out)):
        log.line(text)
