"""`cuboid data`: directories of shards."""

from typing import Annotated

import typer

from framework import log

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Directories of shards.")


@app.callback()
def data() -> None:
    """Directories of shards."""


@app.command()
def merge(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="Directories of shards, or of shares.")],
    out: Annotated[str, typer.Option(help="The directory to be made of them; theirs may lie below it.")],
) -> None:
    """Several directories of shards -> one, copying only what lies elsewhere; duplicates are left out and listed."""
    from framework.curate.merge import merge_directories, merge_lines

    for text in merge_lines(merge_directories(directories, out)):
        log.line(text)
