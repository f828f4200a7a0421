"""Fragments through torch's distributed checkpoint (DCP): every rank writes and reads the boxes it holds.

A checkpoint holds fp32 tensors under global names ("model.*", "exp_avg.*", "exp_avg_sq.*", "ema.*") with their global
shapes, so any mesh, ZeRO stage or engine can read it, and so can plain `torch.distributed.checkpoint.load` in one
process. Nothing is gathered and no byte is written twice.

The state dict handed to DCP holds one flat tensor a key; the planner turns it into boxes by the fragment's coordinates
alone, so that DCP may stage the tensors (copy them) between planning and writing.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from framework.parallel.fragments import Fragment

BoxKey = tuple[str, torch.Size]


def boxes_by_key(fragments: list[Fragment]) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """(key, offset in the global tensor, live view) of every box."""
    for fragment in fragments:
        for offset, view in fragment.global_boxes():
            yield fragment.key, torch.Size(offset), view


class FragmentSavePlanner(DefaultSavePlanner):
    """Writes the boxes of the fragments that this rank owns."""

    def __init__(self, fragments: list[Fragment]) -> None:
        super().__init__()
        self._fragments = {fragment.key: fragment for fragment in fragments if fragment.shard.owner}
        self._views: dict[BoxKey, Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Take the flat tensors that DCP hands in, which may be staged copies."""
        staged = [dataclasses.replace(f, flat=state_dict[key]) for key, f in self._fragments.items()]
        self._views = {(key, offset): view for key, offset, view in boxes_by_key(staged)}
        rest = {key: value for key, value in state_dict.items() if key not in self._fragments}
        super().set_up_planner(rest, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [
            WriteItem(
                index=MetadataIndex(key, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, view.size()),
                    properties=TensorProperties(dtype=view.dtype),
                    size=torch.Size(self._fragments[key].shard.global_shape),
                ),
            )
            for (key, offset), view in self._views.items()
        ]
        self.plan = dataclasses.replace(plan, items=plan.items + items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        assert index.offset is not None
        return self._views[index.fqn, index.offset]


class FragmentLoadPlanner(DefaultLoadPlanner):
    """Reads every box of the fragments in place. Raises ValueError when the checkpoint doesn't cover one exactly."""

    def __init__(self, fragments: list[Fragment]) -> None:
        super().__init__()
        self._fragments = {fragment.key: fragment for fragment in fragments}
        self._views: dict[BoxKey, Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        rest = {key: value for key, value in state_dict.items() if key not in self._fragments}
        super().set_up_planner(rest, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        assert self.metadata is not None
        items = list(plan.items)
        for key, fragment in self._fragments.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"the checkpoint has no tensor {key}")
            if tuple(stored.size) != fragment.shard.global_shape:
                there, here = tuple(stored.size), fragment.shard.global_shape
                raise ValueError(f"{key} has the shape {there} in the checkpoint, {here} in the model")
            boxes = [(torch.Size(offset), view) for offset, view in fragment.global_boxes()]
            self._views |= {(key, offset): view for offset, view in boxes}
            chunks = [ChunkStorageMetadata(offset, view.size()) for offset, view in boxes]
            reads = create_read_items_for_chunk_list(key, stored, chunks)
            # DCP reads what overlaps and leaves the rest as it was: count the elements.
            covered = sum(item.lengths.numel() for item in reads)
            if covered != fragment.flat.numel():
                raise ValueError(
                    f"the checkpoint covers {covered} of the {fragment.flat.numel()} elements needed of {key}"
                )
            items += reads
        return dataclasses.replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._views[index.fqn, index.offset]


def save_fragments(path: Path, fragments: list[Fragment], group: dist.ProcessGroup | None) -> None:
    """Write the fragments of all ranks of a CPU process group into `path`. A collective."""
    state = {fragment.key: fragment.flat for fragment in fragments if fragment.shard.owner}
    writer = FileSystemWriter(path, single_file_per_rank=True, thread_count=1)
    save(state, storage_writer=writer, planner=FragmentSavePlanner(fragments), process_group=group)


def load_fragments(path: Path, fragments: list[Fragment], group: dist.ProcessGroup | None) -> None:
    """Fill the fragments in place from `path`. A collective, or in one process without a group where none was made.

    Raises ValueError on a missing or partly covered tensor.
    """
    with warnings.catch_warnings():
        # DCP warns of a load in one process without a process group, which is what sampling is.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(
            {fragment.key: fragment.flat for fragment in fragments},
            storage_reader=FileSystemReader(path),
            planner=FragmentLoadPlanner(fragments),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
