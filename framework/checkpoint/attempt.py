"""The claim of an attempt: by the launcher before it starts ranks, else by rank 0. Imports no torch."""

from pathlib import Path

from framework.checkpoint.fence import Fence, claim, own
from framework.run import latest_attempt, lock_run, make_identity, open_attempt
from framework.storage.storage import Storage


def claim_attempt(path: Path, storage: Storage) -> int:
    """Claim the next attempt at a run and its store, both of which may have seen others, and make its directory; its
    number. Raises ValueError where the store is another run's, OSError where nothing can be written.
    """
    own_store(path, storage)
    while True:
        fence = claim(storage, first=latest_attempt(path) + 1)
        if open_attempt(path, fence.attempt):
            return fence.attempt


def take_attempt(path: Path, storage: Storage, claimed: int | None) -> Fence:
    """Rank 0's: hold the run while this process lives, and its attempt: that which the launcher has claimed, or the
    next one. Raises ValueError when another process of this machine holds the run.
    """
    lock_run(path, refuse=claimed is None)  # what is left of an older attempt the fence keeps from committing
    if claimed is None:
        return Fence(storage, claim_attempt(path, storage))
    own_store(path, storage)
    fence = Fence(storage, claimed)
    fence.check()
    open_attempt(path, claimed)  # there already, unless the directory isn't the launcher's
    return fence


def own_store(path: Path, storage: Storage) -> None:
    """Make a store of checkpoints this run's."""
    storage.check()
    own(storage, make_identity(path), str(path.resolve()))
