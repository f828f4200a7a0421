"""Checkpoints made in a moment, in one process: a few tensors with known values."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.fence import Fence, claim
from framework.checkpoint.manifest import Origin, Progress
from framework.checkpoint.save import Saver
from framework.checkpoint.writer import Subject
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import lone_mesh
from framework.storage.directory import Directory
from framework.storage.storage import Storage

SHAPES = {"a.weight": (40, 30), "a.bias": (30,), "b.weight": (3, 5, 7), "big.weight": (1100, 1000)}
STATES = ("model", "exp_avg", "exp_avg_sq", "ema")


@dataclass
class TinyState:
    """A state of training that is a function of the step: key -> values."""

    tensors: dict[str, Tensor] = field(
        default_factory=lambda: {f"{s}.{name}": torch.zeros(shape) for s in STATES for name, shape in SHAPES.items()}
    )

    def at(self, step: int) -> "TinyState":
        """Take the values of a step."""
        for number, tensor in enumerate(self.tensors.values()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        return self

    def fragments(self) -> list[Fragment]:
        """Whole tensors as fragments."""
        made = []
        for key, tensor in self.tensors.items():
            state, _, name = key.partition(".")
            made.append(Fragment(state, ParameterShard.whole(name, tuple(tensor.shape)), 0, tensor.view(-1)))
        return made


def open_saver(storage: Storage, state: TinyState, fence: Fence, config: CheckpointConfig) -> Saver:
    """A saver of one rank."""
    shards = [ParameterShard.whole(name, shape) for name, shape in SHAPES.items()]
    origin = Origin(attempt=fence.attempt, engine="made", versions={"cuboid": "0"})
    return Saver(
        storage, config, lone_mesh(), fence=fence, subject=Subject(origin, {}, shards), fragments=state.fragments()
    )


def save_steps(folder: Path, steps: list[int], config: CheckpointConfig | None = None) -> Directory:
    """A directory store with the checkpoints of one attempt."""
    storage, state = Directory(str(folder)), TinyState()
    fence = claim(storage, first=0)
    fence.begin(0)
    saver = open_saver(storage, state, fence, config or CheckpointConfig(keep=100))
    for step in steps:
        state.at(step)
        saver.save(Progress(step=step, samples=4 * step, updates=step))
        saver.wait()
    saver.close()
    return storage
