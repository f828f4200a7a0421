"""Which checkpoints stay: the newest, every N-th, those with a name; and within a number of bytes.

STORE/named/step-00000100-0002/before-the-decay      an empty object: this checkpoint has this name
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.fence import counts, read_starts
from framework.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    Entry,
    committed,
    entry_of,
    read_manifest,
    resolve,
)
from framework.storage.storage import Storage

NAMED: Final = re.compile(r"named/(step-\d+-\d+)/([\w.-]+)")
FROZEN = "frozen/"


def names_of(names: dict[str, int]) -> dict[str, list[str]]:
    """Folder -> the names that its checkpoint was given."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := NAMED.fullmatch(name):
            found[match[1]].append(match[2])
    return dict(found)


def give_name(storage: Storage, entry: Entry, name: str) -> None:
    """Name a checkpoint, so that it stays. Raises ValueError for a name that can't be a file's."""
    marker = f"named/{entry.folder}/{name}"
    if not NAMED.fullmatch(marker):
        raise ValueError(f"the name {name!r} must consist of letters, digits, '_', '-' and '.'")
    storage.put(marker, b"")


def surplus(
    entries: Sequence[Entry], sizes: dict[Entry, int], named: set[Entry], config: CheckpointConfig
) -> list[Entry]:
    """What may go, oldest first. entries: oldest first. sizes: bytes of each. The newest is never among it."""
    if not entries:
        return []
    newest = entries[-1]
    stays = {*entries[-config.keep :], *(entry for entry in entries if entry in named)}
    if config.keep_every:
        stays |= {entry for entry in entries if entry.step % config.keep_every == 0}
    limit = config.max_gigabytes * 1e9
    if limit:
        total = sum(sizes[entry] for entry in stays)
        for entry in entries:
            if total > limit and entry in stays and entry not in named and entry != newest:
                stays.remove(entry)
                total -= sizes[entry]
    return [entry for entry in entries if entry not in stays]


def retain(storage: Storage, config: CheckpointConfig, *, attempt: int) -> None:
    """Delete what needn't stay: of each its manifest first, so that no half is taken for a checkpoint.

    Folders that were begun and never committed go too, older attempts' and its own, and what older ones committed too
    late (fence.py), unless it has a name. attempt: that has just committed, and writes nothing now.
    """
    names = storage.list()
    starts = read_starts(storage, names)
    by_folder: defaultdict[Entry, list[str]] = defaultdict(list)
    for name in names:
        if (entry := entry_of(name)) is not None:
            by_folder[entry].append(name)
    entries = [entry for entry in committed(names) if counts(entry, starts)]
    given = names_of(names)
    named = {entry for entry in entries if entry.folder in given}
    sizes = {entry: sum(names[name] for name in by_folder[entry]) for entry in entries}
    going = surplus(entries, sizes, named, config)
    others = (entry for entry in by_folder if entry not in entries and entry.folder not in given)
    left = [entry for entry in others if entry.attempt <= attempt]
    for entry in (*going, *left):
        storage.delete([f"{entry.folder}/{MANIFEST}"])
        storage.delete(by_folder[entry])
    if going:
        delete_unused_frozen(storage, [entry for entry in entries if entry not in going])


def delete_unused_frozen(storage: Storage, kept: list[Entry]) -> None:
    """Delete frozen weights that no manifest names; none where one of them can't be read."""
    names = storage.list()
    frozen = {name for name in names if name.startswith(FROZEN)}
    if not frozen:
        return
    try:
        manifests = [(entry, read_manifest(storage, entry, names)) for entry in kept]
    except DamagedCheckpoint:
        return
    storage.delete(frozen - {resolve(entry.folder, file) for entry, manifest in manifests for file in manifest.files})
