"""What a store must hold, found out without the code under test: the state after any step in numpy, and which
checkpoint a resume has to find, read from the files by the rules in the docstrings of framework/checkpoint.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import light
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FOLDER: Final = re.compile(r"step-(\d{8})-(\d{4})/(.+)")
START: Final = re.compile(r"fence/(\d{4})-start\.json")
# The progress of a run without bad updates and without stages, beside its counts.
NOTHING_ELSE: Final = MappingProxyType(
    {"bad_steps": 0, "skipped": [], "norms": [], "evaluations": []}
    | dict.fromkeys(("stage", "stage_step", "stage_samples", "stage_data"), 0)
)
Entry = tuple[int, int]  # step, attempt


class Violation(AssertionError):
    """The store isn't what it must be."""


class Objects(Protocol):
    """A store's objects, by other means than framework/storage."""

    def sizes(self) -> dict[str, int]:
        """Name -> bytes."""
        ...

    def read(self, name: str) -> bytes: ...


@dataclass(frozen=True)
class Files:
    """The objects of a directory store."""

    path: Path

    def sizes(self) -> dict[str, int]:
        found = (path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in found}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Uninterrupted:
    """The run that nothing ever stopped: its state after any step, computed in order."""

    def __init__(self) -> None:
        self._element = np.arange(sum(prod(shape) for shape in light.TENSORS.values()), dtype=np.int64)
        self._restart()

    def tensors(self, step: int) -> dict[str, np.ndarray]:
        """Key -> whole tensor after `step` steps."""
        if step < self._step:
            self._restart()
        while self._step < step:
            self._advance()
        found, first = {}, 0
        for name, shape in light.TENSORS.items():
            for state, values in self._state.items():
                found[f"{state}.{name}"] = values[first : first + prod(shape)].reshape(shape)
            first += prod(shape)
        return found

    def _restart(self) -> None:
        start = (self._element * 31337 % light.PRIME).astype(np.float32) / np.float32(65536) - np.float32(0.5)
        self._step = 0
        self._state = {name: np.zeros_like(start) for name in light.STATES}
        self._state |= {"model": start, "ema": start.copy()}

    def _advance(self) -> None:
        real, step = np.float32, self._step
        gradient = ((self._element * 7919 + step * 104729) % light.PRIME).astype(real) / real(65536) - real(0.5)
        weight, mean, square, average = (self._state[name] for name in light.STATES)
        mean = mean * real(light.DECAY) + gradient * real(1 - light.DECAY)
        square = square * real(light.SECOND) + gradient * gradient * real(1 - light.SECOND)
        weight = weight - mean * real(light.RATE) / (square + real(light.EPSILON))
        average = average * real(light.AVERAGE) + weight * real(1 - light.AVERAGE)
        self._state = dict(zip(light.STATES, (weight, mean, square, average), strict=True))
        self._step += 1


@dataclass(frozen=True)
class Scan:
    """A store as the files say. counted: committed checkpoints that count, oldest step first. folders: of each folder
    its files. starts: attempt -> step where it began.
    """

    counted: list[Entry]
    folders: Mapping[Entry, list[str]]
    starts: Mapping[int, int]
    manifests: Mapping[Entry, dict[str, Any]]
    others: list[str]

    @property
    def newest(self) -> Entry | None:
        return self.counted[-1] if self.counted else None


def scan(objects: Objects) -> Scan:
    """Read a store. A checkpoint is a folder with a manifest; it doesn't count where a newer attempt began below its
    step. All files that a counting manifest names must be there in their sizes.
    """
    sizes = objects.sizes()
    folders: defaultdict[Entry, list[str]] = defaultdict(list)
    for name in sizes:
        if match := FOLDER.fullmatch(name):
            folders[int(match[1]), int(match[2])].append(match[3])
    starts = {int(m[1]): json.loads(objects.read(name))["step"] for name in sizes if (m := START.fullmatch(name))}
    manifests: dict[Entry, dict[str, Any]] = {}
    for (step, attempt), files in folders.items():
        late = any(start < step for other, start in starts.items() if other > attempt)
        if "manifest.json" not in files or late:
            continue
        folder = f"step-{step:08}-{attempt:04}"
        manifest = json.loads(objects.read(f"{folder}/manifest.json"))
        for file, stored in manifest["files"].items():
            path = file[3:] if file.startswith("../") else f"{folder}/{file}"
            if sizes.get(path) != stored["size"]:
                raise Violation(f"{folder} is committed, {path} has {sizes.get(path)} bytes, not {stored['size']}")
        progress = manifest["progress"]
        done = {"step": step, "samples": 4 * step, "tokens": 100 * step, "updates": step}
        if progress != done | NOTHING_ELSE:
            raise Violation(f"{folder} has the progress {progress}")
        manifests[step, attempt] = manifest
    others = [name for name in sizes if not FOLDER.fullmatch(name)]
    return Scan(sorted(manifests), dict(folders), starts, manifests, others)


def check_values(found: Mapping[str, torch.Tensor], run: Uninterrupted, step: int) -> None:
    """Raises Violation unless the tensors are those of the uninterrupted run, bit by bit."""
    wanted = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in run.tensors(step).items()}
    wanted |= {f"model.{name}": light.frozen_value(name) for name in light.FROZEN}
    if found.keys() != wanted.keys():
        raise Violation(f"step {step} has the tensors {sorted(found)}")
    for key, value in wanted.items():
        if found[key].dtype != value.dtype or not torch.equal(found[key], value.view(found[key].shape)):
            differing = int((found[key] != value.view(found[key].shape)).sum())
            raise Violation(f"{key} of step {step} differs from the uninterrupted run in {differing} elements")


def load_by_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint, read by torch's distributed checkpoint in this process."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.full(tuple(stored.size), torch.nan, dtype=stored.properties.dtype)
        for key, stored in metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state
