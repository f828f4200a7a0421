"""One checkpoint of all ranks: every rank writes its files, rank 0 commits.

    (exchange pieces, exchange.py)  write files  gather what was written  commit: .metadata, manifest  retention

Nothing counts before rank 0 has written the manifest, and it writes none when a newer attempt has claimed the store.
Which box lies where is planned once: later saves write files of the same layout into another folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from framework import log
from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.exchange import Exchange
from framework.checkpoint.fence import Fence, TakenOver
from framework.checkpoint.frozen import Frozen, write_frozen
from framework.checkpoint.local import LocalCopies
from framework.checkpoint.manifest import (
    MANIFEST,
    METADATA,
    Entry,
    Manifest,
    Origin,
    Progress,
    StoredFile,
    encode_manifest,
)
from framework.checkpoint.records import StoredTensor, check_cover, encode_metadata
from framework.checkpoint.retention import retain
from framework.checkpoint.staging import Staging
from framework.checkpoint.write import FileLayout, KeyedBox, Range, lay_out, put_checksummed, write_file
from framework.parallel.collectives import broadcast_object, gather_objects
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import Group, Mesh, background_group
from framework.storage.storage import Storage

MANY_BOXES = 100_000


@dataclass(frozen=True)
class Failure:
    """Why a save failed. final: another try is of no use."""

    message: str
    final: bool = False


@dataclass(frozen=True)
class Written:
    """What one rank wrote, or why it couldn't. layouts: only until they are known."""

    files: dict[str, StoredFile]
    frozen: dict[str, StoredFile]
    layouts: tuple[FileLayout, ...]
    failure: Failure | None


@dataclass(frozen=True)
class Subject:
    """What is saved. configs: of the model and its adapters. shards: of the whole model, in its order. frozen: those of
    this rank's fragments that aren't trained. known: what the checkpoint that the run resumed from says of frozen
    weights; None where there is none, and the first save writes them.
    """

    origin: Origin
    configs: dict[str, Any]
    shards: Sequence[ParameterShard]
    frozen: Sequence[Fragment] = ()
    known: Frozen | None = None


class CheckpointWriter:
    """Writes what is staged. Making one, and `write`, are collectives over the world."""

    def __init__(
        self,
        storage: Storage,
        config: CheckpointConfig,
        mesh: Mesh,
        *,
        fence: Fence,
        subject: Subject,
        staging: Staging,
    ) -> None:
        self._storage, self._config, self._fence = storage, config, fence
        self._subject, self._staging = subject, staging
        self._group = background_group(mesh, "world", "saving")
        self._exchange = build_exchange(staging, subject.shards, config, mesh)
        self._layouts = {
            state: lay_out(f"{state}-{mesh.rank:05}.distcp", state, self._ranges(state), buffer.dtype)
            for state, buffer in staging.buffers.items()
        }
        self._local = LocalCopies(config.local, storage) if config.local else None
        self._frozen: tuple[list[FileLayout], dict[str, StoredFile]] | None = None
        self._known = (subject.known or Frozen()).of({f"model.{s.name}" for s in subject.shards if not s.trainable})
        self._frozen_files = self._known.files
        self._metadata: bytes | None = None
        self.num_bytes = 0  # of the newest checkpoint, over all ranks

    def write(self, entry: Entry, progress: Progress) -> Failure | None:
        """Write and commit a checkpoint. What went wrong, if something did, is the same on every rank."""
        everywhere = gather_objects(self._write_files(entry.folder), self._group)
        failed = next(((rank, each.failure) for rank, each in enumerate(everywhere) if each.failure is not None), None)
        if failed is not None:
            return replace(failed[1], message=f"rank {failed[0]} couldn't write {entry.folder}: {failed[1].message}")
        if self._metadata is None:
            failure = self._on_first(lambda: self._plan(everywhere))
            if failure is not None:
                return failure
            self._metadata = self._metadata or b""  # rank 0's alone is needed
            self._frozen_files = self._frozen_files | merged(each.frozen for each in everywhere)
        files = merged(each.files for each in everywhere) | self._frozen_files
        self.num_bytes = sum(file.size for file in files.values())
        failure = self._on_first(lambda: self._commit(entry, progress, files))
        if failure is None and self._local is not None:
            try:
                self._local.keep_only(entry.folder)
            except OSError as error:  # the checkpoint is there all the same
                log.error(f"older copies in {self._local.directory.url} should go but can't be deleted: {cause(error)}")
        return failure

    def _ranges(self, state: str) -> list[Range]:
        return self._staging.ranges[state] if self._exchange is None else self._exchange.ranges

    def _write_files(self, folder: str) -> Written:
        """This rank's files. It takes part in every exchange, whatever fails, so that none waits for it."""
        files: dict[str, StoredFile] = {}
        failure: Failure | None = None
        try:
            if self._frozen is None:
                new = [fragment for fragment in self._subject.frozen if fragment.key not in self._known.tensors]
                self._frozen = write_frozen(self._storage, new)
        except Exception as error:
            failure = failure_of(error)
        for state, layout in self._layouts.items():
            buffer = self._staging.buffers[state]
            staged = buffer if self._exchange is None else self._exchange.run(buffer)
            try:
                if failure is None:
                    target = self._storage if self._local is None else self._local.directory
                    files[layout.name] = write_file(target, f"{folder}/{layout.name}", layout, staged)
            except Exception as error:
                failure = failure_of(error)
        try:
            if failure is None and self._local is not None:
                self._local.flush(folder, files)
        except Exception as error:
            failure = failure_of(error)
        layouts, frozen = self._frozen or ([], {})
        layouts = [*self._layouts.values(), *layouts] if self._metadata is None else []
        return Written(files, frozen, tuple(layouts), failure)

    def _plan(self, everywhere: list[Written]) -> None:
        """Make `.metadata`: all tensors of the model in all their states, each covered exactly once by its boxes."""
        boxes: dict[str, list[KeyedBox]] = {}
        dtypes = {}
        for layout in chain.from_iterable(each.layouts for each in everywhere):
            for keyed in layout.boxes:
                boxes.setdefault(keyed.key, []).append(keyed)
                dtypes[keyed.key] = layout.dtype
        tensors = dict(self._known.tensors)
        for key, keyed_boxes in boxes.items():
            tensors[key] = StoredTensor(keyed_boxes[0].shape, dtypes[key], tuple(keyed.box for keyed in keyed_boxes))
            check_cover(key, tensors[key])
        trained = [shard.name for shard in self._subject.shards if shard.trainable]
        frozen = [shard.name for shard in self._subject.shards if not shard.trainable]
        wanted = {f"{state}.{name}" for state in self._layouts for name in trained} | {f"model.{n}" for n in frozen}
        if wanted != tensors.keys():
            raise ValueError(
                f"what was written isn't the model: {min(wanted ^ tensors.keys())} is the first difference"
            )
        self._metadata = encode_metadata(tensors)

    def _commit(self, entry: Entry, progress: Progress, files: dict[str, StoredFile]) -> None:
        self._fence.check()
        assert self._metadata is not None
        files = files | {METADATA: put_checksummed(self._storage, f"{entry.folder}/{METADATA}", self._metadata)}
        manifest = Manifest(progress, self._subject.origin, files, self._subject.configs)
        self._fence.check()
        self._storage.put(f"{entry.folder}/{MANIFEST}", encode_manifest(manifest))
        try:
            # A newer attempt that claims from now on finds this checkpoint, and needs no older one.
            self._fence.check()
            retain(self._storage, self._config, attempt=self._fence.attempt)
        except TakenOver:
            raise
        except OSError as error:  # the checkpoint is there all the same
            log.error(f"older checkpoints in {self._storage.url} should go but can't be deleted: {cause(error)}")

    def _on_first(self, action: Callable[[], None]) -> Failure | None:
        """Run on rank 0; its failure, if any, on every rank."""
        failure: Failure | None = None
        if self._group.index == 0:
            try:
                action()
            except Exception as error:
                failure = failure_of(error)
        return broadcast_object((failure,), self._group)[0]


def build_exchange(
    staging: Staging, shards: Sequence[ParameterShard], config: CheckpointConfig, mesh: Mesh
) -> Exchange | None:
    """The exchange where the layout is to be even, None where every rank writes what it holds. A collective."""
    mine = sum(len(lay_out("", "", ranges, torch.float32).boxes) for ranges in staging.ranges.values())
    total = sum(gather_objects(mine, mesh.control))
    wanted = config.layout == "even" or (config.layout == "adaptive" and total > MANY_BOXES)
    if not wanted or mesh.zero.size == 1:
        return None
    group: Group = background_group(mesh, "zero", "saving")
    first = next(iter(staging.ranges.values()), [])
    assert all(ranges == first for ranges in staging.ranges.values()), "all states are cut alike"
    return Exchange(first, [shard for shard in shards if shard.owner and shard.trainable], group)


def merged(parts: Any) -> dict[str, StoredFile]:
    """Several ranks' files; every rank names its own."""
    return {name: file for part in parts for name, file in part.items()}


def failure_of(error: Exception) -> Failure:
    """What every rank is told of an error on one. Only what the system or the store refuses is worth another try."""
    if isinstance(error, OSError):
        return Failure(cause(error), final=isinstance(error, TakenOver))
    return Failure(f"{type(error).__name__}: {error}", final=True)


def cause(error: OSError) -> str:
    """What the system says, with the file where it names one."""
    if error.strerror and error.filename:
        return f"{error.strerror} ({error.filename})"
    return error.strerror or str(error)
