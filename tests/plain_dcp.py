"""A checkpoint as plain torch.distributed.checkpoint sees it, in one process, without anything of framework/."""

import hashlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def newest_folder(run: Path) -> Path:
    """The folder of a run's newest checkpoint with a manifest."""
    return max(path.parent for path in (run / "checkpoints").glob("step-*/manifest.json"))


def folder_of(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint of a step."""
    (path,) = (run / "checkpoints").glob(f"step-{step:08}-*/manifest.json")
    return path.parent


def plain_load(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor, whole."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        key: torch.full(m.size, torch.nan, dtype=m.properties.dtype)
        for key, m in metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    return state


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor."""
    tensors = plain_load(checkpoint)
    return {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}
