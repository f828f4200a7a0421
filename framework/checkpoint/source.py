"""Weights to begin with, by a person's word for them: a run, a checkpoint, or a directory saved by diffusers."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from framework.checkpoint.find import open_checkpoint
from framework.checkpoint.read import Checked, CheckpointReader
from framework.models.config import ModelConfig
from framework.models.saved import is_diffusers
from framework.models.source import TensorSource
from framework.models.weights import DiffusersSource
from framework.parallel.fragments import Fragment

Weights = Literal["ema", "raw"]
# Two models that differ in these may have the same shapes.
UNSEEN_IN_SHAPES = ("num_attention_heads", "attention_head_dim", "eps")
SHOWN = 6  # patterns of names that a report spells out


class CheckpointSource:
    """`TensorSource` of a checkpoint. weights: ema takes the average of what has one, raw the weights themselves.

    average: whether there is one among them. config: of the model, None where the checkpoint doesn't say. notes: what
    a person should know.
    """

    def __init__(self, reader: CheckpointReader, weights: Weights) -> None:
        self.reader = reader
        self.name = f"{reader.storage.url}/{reader.found.entry.folder}"
        names = [key.removeprefix("model.") for key in reader.tensors if key.startswith("model.")]
        averaged = weights == "ema"
        self._keys = {n: f"ema.{n}" if averaged and f"ema.{n}" in reader.tensors else f"model.{n}" for n in names}
        self.average = any(key.startswith("ema.") for key in self._keys.values())
        trained = any(key.startswith("exp_avg.") for key in reader.tensors)
        missed = averaged and trained and not self.average
        self.notes = (f"{self.name} holds no average of the weights: those themselves are taken",) if missed else ()
        stored = reader.found.manifest.config.get("model")
        self.config = None if stored is None else ModelConfig(**stored)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self.reader.tensors[key].shape for name, key in self._keys.items()}

    def read(self, name: str, offset: tuple[int, ...], out: Tensor) -> None:
        self.reader.fill(self._keys[name], offset, out)

    def check(self) -> None:
        """Check every block of the files that hold them. Raises DamagedCheckpoint."""
        self.reader.check(self._states())

    def check_share(self, by_rank: list[Checked], *, index: int) -> None:
        """Check this rank's share of the blocks that none has checked. by_rank: those that were, of every rank."""
        self.reader.check_rest(by_rank, touched=self.reader.files_of(self._states()), index=index)

    def _states(self) -> set[str]:
        return {key.partition(".")[0] for key in self._keys.values()}


def open_source(place: str, weights: Weights) -> CheckpointSource | DiffusersSource:
    """The weights at a place. Raises ValueError."""
    if is_diffusers(place):
        return DiffusersSource(place)
    return CheckpointSource(CheckpointReader(*open_checkpoint(place)), weights)


def check_config(source: CheckpointSource | DiffusersSource, ours: ModelConfig) -> None:
    """Raises ValueError where weights are of a model that computes something else with the same shapes."""
    theirs = source.config
    differing = [key for key in UNSEEN_IN_SHAPES if theirs is not None and getattr(theirs, key) != getattr(ours, key)]
    if differing:
        here = ", ".join(f"{key}={getattr(ours, key)}" for key in differing)
        fix = " ".join(f"model.{key}={getattr(theirs, key)}" for key in differing)
        raise ValueError(f"the weights of {source.name} are of another model than this one with {here}: set {fix}")


@dataclass(frozen=True)
class Report:
    """What a model took from a source, by names: matched; missing: it has and the source hasn't; unused: the other way
    round.
    """

    source: str
    matched: Mapping[str, int]
    missing: Mapping[str, int]
    unused: Mapping[str, int]

    def lines(self) -> list[str]:
        """For a person."""
        found = [f"weights from {self.source}: {described(self.matched)}"]
        if self.missing:
            found.append(f"  not there, initialised: {described(self.missing)}: {grouped(self.missing)}")
        if self.unused:
            found.append(f"  there, not used: {described(self.unused)}: {grouped(self.unused)}")
        return found


def described(names: Mapping[str, int]) -> str:
    return f"{len(names)} tensors, {sum(names.values()):,} elements"


def grouped(names: Iterable[str]) -> str:
    """Names with their numbers made *, and how many there are of each."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    shown = [f"{pattern} ({count})" if count > 1 else pattern for pattern, count in list(counts.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


@torch.no_grad()
def fill(fragments: list[Fragment], source: TensorSource, names: Mapping[str, tuple[int, ...]]) -> Report:
    """Fill the weights of this rank from a source; what it lacks stays as it is. names: every parameter of the model
    with its global shape. Raises ValueError for a shape that differs, and where nothing matches.
    """
    stored = source.shapes()
    for name, shape in names.items():
        if name in stored and stored[name] != shape:
            raise ValueError(f"{name} has the shape {stored[name]} in {source.name}, {shape} in the model")
    matched = {name: prod(shape) for name, shape in names.items() if name in stored}
    if not matched:
        raise ValueError(
            f"{source.name} has none of the model's {len(names)} tensors; it has {grouped(stored) or 'none at all'}"
        )
    for fragment in fragments:
        if fragment.state == "model" and fragment.shard.name in matched:
            written = 0
            for offset, view in fragment.global_boxes():
                part = torch.empty(view.shape, dtype=torch.float32)
                source.read(fragment.shard.name, offset, part)
                view.copy_(part)
                written += view.numel()
            assert written == fragment.flat.numel(), "boxes cover a fragment exactly once"
    return Report(
        source.name,
        matched,
        {name: prod(shape) for name, shape in names.items() if name not in stored},
        {name: prod(shape) for name, shape in stored.items() if name not in names},
    )
