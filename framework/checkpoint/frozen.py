"""Weights that aren't trained: written once for a run, under the hash of what they are, and named by every checkpoint.

A run that resumes names what the checkpoint before it named, whatever mesh wrote that.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from framework.checkpoint.manifest import StoredFile
from framework.checkpoint.records import StoredTensor
from framework.checkpoint.retention import FROZEN
from framework.checkpoint.write import FileLayout, Range, as_bytes, lay_out, write_file
from framework.parallel.fragments import Fragment
from framework.storage.storage import Storage


@dataclass(frozen=True)
class Frozen:
    """What a checkpoint holds of frozen weights: their tensors in `.metadata`, their files in the manifest."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)

    def of(self, keys: set[str]) -> "Frozen":
        """Those of some tensors alone."""
        tensors = {key: tensor for key, tensor in self.tensors.items() if key in keys}
        used = {box.file for tensor in tensors.values() for box in tensor.boxes}
        return Frozen(tensors, {name: file for name, file in self.files.items() if name in used})


def write_frozen(storage: Storage, fragments: Sequence[Fragment]) -> tuple[list[FileLayout], dict[str, StoredFile]]:
    """Write what this rank owns of the frozen weights, one file a dtype. Returns what they hold. Raises OSError."""
    by_dtype: defaultdict[torch.dtype, list[Fragment]] = defaultdict(list)
    for fragment in fragments:
        by_dtype[fragment.flat.dtype].append(fragment)
    layouts, files = [], {}
    for dtype, held in by_dtype.items():
        staged = torch.cat([fragment.flat.detach().cpu() for fragment in held])
        ranges = [Range(f.shard, f.start, f.flat.numel()) for f in held]
        digest = xxhash.xxh3_128(repr(ranges))
        digest.update(as_bytes(staged))
        name = f"{FROZEN}{digest.hexdigest()}.distcp"
        layout = lay_out(f"../{name}", held[0].state, ranges, dtype)
        layouts.append(layout)
        files[layout.name] = write_file(storage, name, layout, staged)
    return layouts, files
