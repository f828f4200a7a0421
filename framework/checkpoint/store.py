"""The checkpoints of a run in a directory: save, find, load, keep the newest.

A save is synchronous: all ranks write, rank 0 commits and deletes what retention no longer keeps, all go on together.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from framework import log
from framework.checkpoint.commit import MANIFEST, Found, Progress, commit, mesh_of, valid_checkpoints
from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.dcp import load_fragments, save_fragments
from framework.parallel.collectives import broadcast_object
from framework.parallel.fragments import Fragment
from framework.parallel.mesh import Mesh
from framework.run import Run, RunFailure


class Checkpoints:
    """The checkpoints of a run, for all its ranks."""

    def __init__(self, run: Run, config: CheckpointConfig, mesh: Mesh, *, zero_stage: int) -> None:
        self._run, self._config, self._mesh, self._stage = run, config, mesh, zero_stage

    def load(self, found: Found, fragments: list[Fragment]) -> Progress:
        """Fill the fragments from a checkpoint."""
        load_fragments(found.path, fragments, self._mesh.control.process_group)
        return found.manifest.progress

    def save(self, fragments: list[Fragment], progress: Progress) -> Path:
        """Write and commit a checkpoint. Raises RunFailure with the cause; earlier checkpoints stay valid."""
        path = self._run.checkpoints / f"step-{progress.step:08}"
        failure = self._on_first(lambda: self._prepare(path))
        if failure is None:
            try:
                save_fragments(path, fragments, self._mesh.control.process_group)
            except (OSError, CheckpointException) as error:
                failure = cause(error)
            # Every rank learns of a failure on any of them through DCP; the first one's message is the one that counts.
            failure = broadcast_object([failure], self._mesh.control)[0]
        if failure is None:
            failure = self._on_first(lambda: self._commit(path, progress))
        if failure is not None:
            self._on_first(lambda: shutil.rmtree(path, ignore_errors=True))
            free = shutil.disk_usage(self._run.path).free >> 20
            raise RunFailure(
                f"the checkpoint {path} couldn't be written: {failure} ({free} MiB free there); "
                "earlier checkpoints are untouched"
            )
        self._on_first(self._retain)
        return path

    def _prepare(self, path: Path) -> None:
        if not self._run.holds_fence():
            raise OSError(f"another attempt has taken over {self._run.path}; this one stops")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)

    def _commit(self, path: Path, progress: Progress) -> None:
        if not self._run.holds_fence():
            raise OSError(f"another attempt has taken over {self._run.path}; this one stops")
        commit(
            path, progress=progress, mesh=mesh_of(self._mesh.shape), zero_stage=self._stage, attempt=self._run.attempt
        )

    def _retain(self) -> None:
        """Delete what is no longer kept: the manifest first, so that no half is taken for a checkpoint."""
        for old in valid_checkpoints(self._run.checkpoints)[: -self._config.keep]:
            try:
                (old.path / MANIFEST).unlink()
                shutil.rmtree(old.path)
            except OSError as error:
                log.error(f"{old.path} should go but can't be deleted: {cause(error)}")

    def _on_first(self, action: Callable[[], None]) -> str | None:
        """Run on rank 0; its failure, if any, on every rank."""
        failure = None
        if self._mesh.rank == 0:
            try:
                action()
            except OSError as error:
                failure = cause(error)
        return broadcast_object([failure], self._mesh.control)[0]


def cause(error: BaseException) -> str:
    """The innermost message of a failed save."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause(inner)}"
    return f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.strerror else str(error)
