"""`cuboid checkpoint`: look at checkpoints, check them, and bring them in and out.

PLACE is a run directory, a store (directory or s3://bucket/prefix), or one checkpoint's folder in a store.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.checkpoint.find import list_checkpoints, open_checkpoint, open_place
from framework.checkpoint.manifest import DamagedCheckpoint, entry_of, read_manifest
from framework.checkpoint.retention import give_name, names_of

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at checkpoints, check them, bring them in and out."
)

Place = Annotated[str, typer.Argument(help="Run directory, store, or a checkpoint's folder.")]
Step = Annotated[int | None, typer.Option(help="The checkpoint of this step; the newest by default.")]


@app.command("list")
def list_(place: Place) -> None:
    """Every checkpoint: step, attempt, size, mesh, names."""
    storage = open_place(place)
    entries, names = list_checkpoints(storage)
    if not entries:
        raise ValueError(f"{place} has no checkpoint")
    given = names_of(names)
    for entry in entries:
        try:
            manifest = read_manifest(storage, entry, names)
        except DamagedCheckpoint as damage:
            log.line(f"{entry.folder}  damaged: {damage}")
            continue
        size, origin = sum(file.size for file in manifest.files.values()), manifest.origin
        mesh = " ".join(f"{axis}={degree}" for axis, degree in origin.mesh.items())
        words = " ".join(given.get(entry.folder, []))
        engine = f"{origin.engine} {origin.zero_stage}" if origin.engine else "no engine"
        log.line(f"{entry.folder}  {size / 1e9:.3g} GB  {mesh}  {engine}  {origin.created}  {words}".rstrip())


@app.command()
def show(place: Place, step: Step = None) -> None:
    """What a checkpoint says of itself."""
    from framework.checkpoint.read import CheckpointReader

    reader = CheckpointReader(*open_checkpoint(place, step=step))
    manifest = reader.found.manifest
    log.line(f"{reader.storage.url}/{reader.found.entry.folder}  ({manifest.format})")
    for name, value in (*vars(manifest.progress).items(), *vars(manifest.origin).items()):
        log.line(f"  {name}: {value}")
    for section, values in manifest.config.items():
        log.line(f"  {section}: {' '.join(f'{key}={value}' for key, value in values.items())}")
    count: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    for key, tensor in reader.tensors.items():
        kind = (key.partition(".")[0], str(tensor.dtype).removeprefix("torch."))
        count[kind] += 1
        elements[kind] += sum(box.num_elements for box in tensor.boxes)
    for kind in count:
        log.line(f"  {kind[0]}: {count[kind]} tensors, {elements[kind]:,} elements, {kind[1]}")
    log.line(f"  files: {len(manifest.files)}, {sum(f.size for f in manifest.files.values()):,} bytes")


@app.command()
def verify(
    place: Place,
    step: Step = None,
    all_: Annotated[bool, typer.Option("--all", help="Every checkpoint of the place.")] = False,
) -> None:
    """Read every byte again and compare the checksums. Status 1 when something is damaged."""
    from framework.checkpoint.read import CheckpointReader

    steps: list[int | None] = [step]
    if all_ and entry_of(place.rstrip("/").rpartition("/")[2]) is None:
        steps = [entry.step for entry in list_checkpoints(open_place(place))[0]]
        if not steps:
            raise ValueError(f"{place} has no checkpoint")
    damaged = False
    for each in steps:
        try:
            reader = CheckpointReader(*open_checkpoint(place, step=each))
            count = reader.check()
            log.line(
                f"{reader.found.entry.folder}: {len(reader.found.manifest.files)} files, {count:,} bytes, all whole"
            )
        except (DamagedCheckpoint, OSError) as damage:
            log.error(f"error: {damage}")
            damaged = True
    if damaged:
        raise typer.Exit(1)


@app.command()
def diff(a: Place, b: Place) -> None:
    """Compare two checkpoints bit by bit. Status 1 when they differ."""
    from framework.checkpoint.interchange import compare

    count, differences = compare(a, b)
    for difference in differences:
        log.line(f"{difference.key}: {difference.what}")
    log.line(f"{count} tensors in both, {len(differences)} differences")
    if differences:
        raise typer.Exit(1)


@app.command()
def keep(place: Place, step: Annotated[int, typer.Argument()], name: Annotated[str, typer.Argument()]) -> None:
    """Give a checkpoint a name, so that it stays."""
    storage, found = open_checkpoint(place, step=step)
    give_name(storage, found.entry, name)
    log.line(f"{storage.url}/{found.entry.folder} stays, as {name}")


@app.command()
def export(
    place: Place,
    *,
    out: Annotated[Path, typer.Option(help="Directory to make; with --format torch a file.")],
    format_: Annotated[str, typer.Option("--format", help="diffusers, torch or lora.")] = "diffusers",
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Add the adapters to their linears.")] = False,
    step: Step = None,
) -> None:
    """Weights for diffusers, PEFT or torch, with a model card."""
    for word, value, known in (
        ("--format", format_, ("diffusers", "torch", "lora")),
        ("--weights", weights, ("ema", "raw")),
        ("--dtype", dtype, ("bfloat16", "float32")),
    ):
        if value not in known:
            raise ValueError(f"{word} {value} must be one of {', '.join(known)}")
    from framework.checkpoint.interchange import ExportRequest
    from framework.checkpoint.interchange import export as run_export

    request = ExportRequest(format_, weights, dtype, merge_lora, step)  # type: ignore[arg-type]
    for text in run_export(place, out, request):
        log.line(text)


@app.command("import")
def import_(
    directory: Annotated[str, typer.Argument(help="Saved by diffusers: DIR, or DIR:transformer_2.")],
    store: Annotated[str, typer.Argument(help="Directory or s3://bucket/prefix to make a checkpoint in.")],
) -> None:
    """Weights saved by diffusers -> a checkpoint that `init_from` takes."""
    from framework.checkpoint.interchange import import_weights

    for text in import_weights(directory, store):
        log.line(text)
