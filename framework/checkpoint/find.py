"""Which checkpoint a start goes on from: the newest that counts; torch isn't needed to know."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from framework.checkpoint.fence import counts, read_starts
from framework.checkpoint.manifest import DamagedCheckpoint, Entry, Manifest, committed, entry_of, read_manifest
from framework.models.saved import CONFIG, find_directory, is_diffusers
from framework.recipe import Recipe
from framework.run import CHECKPOINTS, is_run, recipe_of_run
from framework.storage.storage import Storage, open_storage


@dataclass(frozen=True)
class Found:
    """A checkpoint of which everything is there in its size; the content is checked where it is read."""

    entry: Entry
    manifest: Manifest


def store_of(recipe: Recipe) -> Storage:
    """Where a recipe's run keeps its checkpoints."""
    return open_storage(recipe.checkpoint.store or str(Path(recipe.run) / CHECKPOINTS))


def list_checkpoints(storage: Storage) -> tuple[list[Entry], dict[str, int]]:
    """The committed checkpoints that count, oldest first, and the store's objects."""
    names = storage.list()
    starts = read_starts(storage, names)
    return [entry for entry in committed(names) if counts(entry, starts)], names


def candidates(storage: Storage, *, fall_back: bool) -> Iterator[Found | DamagedCheckpoint]:
    """Checkpoints to go on from, newest first. A damaged one is an item of its own with fall_back, else the end: raises
    DamagedCheckpoint with the way on.
    """
    entries, names = list_checkpoints(storage)
    for index, entry in reversed(list(enumerate(entries))):
        try:
            yield Found(entry, read_manifest(storage, entry, names))
        except DamagedCheckpoint as damage:
            if not fall_back:
                raise DamagedCheckpoint(f"{damage}; {way_on(entries[:index])}") from None
            yield damage


def way_on(older: list[Entry]) -> str:
    """What a person can do about a damaged checkpoint."""
    if not older:
        return "there is no older checkpoint: start another run (run=DIR), or copy the file back"
    return f"resume.fall_back=true goes on from the one before it, of step {older[-1].step}, or copy the file back"


def newest(storage: Storage, *, fall_back: bool = False) -> Found | None:
    """The newest checkpoint that counts, None where there is none. Raises DamagedCheckpoint (see `candidates`)."""
    return next((found for found in candidates(storage, fall_back=fall_back) if isinstance(found, Found)), None)


def open_place(place: str) -> Storage:
    """The store at a run directory, or at a place by its own name."""
    if "://" not in place and is_run(Path(place)):
        return store_of(recipe_of_run(Path(place)))
    return open_storage(place)


def check_source(place: str) -> None:
    """Raises ValueError where `init_from` names nothing to begin with; what is inside is checked when it is read."""
    if is_diffusers(place):
        directory, _ = find_directory(place)
        if not (directory / CONFIG).is_file():
            raise ValueError(f"init_from={place}: {directory} is no directory saved by diffusers: it lacks {CONFIG}")
    elif "://" not in place and not Path(place).is_dir():
        raise ValueError(f"init_from={place}: there is no directory {place}")
    else:
        open_checkpoint(place)


def open_checkpoint(place: str, *, step: int | None = None) -> tuple[Storage, Found]:
    """A checkpoint by a person's word for it: a run directory, a store, or one checkpoint's folder in a store.

    step: not the newest, but the one of this step. Raises ValueError where there is none.
    """
    place = place.rstrip("/")
    parent, _, last = place.rpartition("/")
    if (entry := entry_of(last)) is not None:
        storage = open_storage(parent or ".")
        names = storage.list(f"{entry.folder}/")
        if not committed(names):
            raise ValueError(f"{place} is no checkpoint: it has no manifest, so it was never finished")
        return storage, Found(entry, read_manifest(storage, entry, names | storage.list("frozen/")))
    storage = open_place(place)
    entries, names = list_checkpoints(storage)
    chosen = [entry for entry in entries if step is None or entry.step == step]
    if not chosen:
        there = ", ".join(str(entry.step) for entry in entries)
        hint = f"; it has those of the steps {there}" if there else ": train it further, or lower checkpoint.every"
        raise ValueError(f"{place} has no checkpoint{'' if step is None else f' of step {step}'} yet{hint}")
    return storage, Found(chosen[-1], read_manifest(storage, chosen[-1], names))
