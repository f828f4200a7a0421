"""Node-local copies: files are written to a directory of the node first, and copied from there to the store.

    LOCAL/<hash of the store's place>/step-00000100-0000/model-00003.distcp

The copy of the newest committed checkpoint stays, so that a start on the same nodes reads it instead of the store. It
is checked like everything that is read; a node without it, or with a damaged one, reads the store.
"""

from pathlib import Path

import xxhash

from framework.checkpoint.manifest import StoredFile, entry_of
from framework.checkpoint.write import copy_file
from framework.storage.directory import Directory
from framework.storage.storage import Storage


def local_directory(local: str, storage: Storage) -> Directory:
    """Where a node keeps its copies of a store's files."""
    place = storage.url if "://" in storage.url else str(Path(storage.url).resolve())
    return Directory(str(Path(local) / xxhash.xxh3_64_hexdigest(place)))


class LocalCopies:
    """The copies of one node, as one of its ranks uses them. directory: where they are written first."""

    def __init__(self, local: str, storage: Storage) -> None:
        self.directory = local_directory(local, storage)
        self._storage = storage

    def flush(self, folder: str, files: dict[str, StoredFile]) -> None:
        """Copy this rank's files to the store. Raises OSError, also where one isn't what was written."""
        for name, stored in files.items():
            copy_file(self.directory, self._storage, f"{folder}/{name}", stored)

    def keep_only(self, folder: str) -> None:
        """Delete everything of other checkpoints, by whichever rank: what is committed was flushed."""
        names = self.directory.list()
        self.directory.delete(n for n in names if entry_of(n) is not None and not n.startswith(f"{folder}/"))
