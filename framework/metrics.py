"""metrics.jsonl: one line a step, and TensorBoard where asked for.

A step's loss is a tensor whose sum over the ranks is still under way when the step ends; it is read when the next step
has been
launched, so that nothing waits for it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepRecord:
    """A finished step, counted from 1. loss_sum: summed over the ranks once `work` is done; the loss is loss_sum /
    count.
    """

    step: int
    loss_sum: Tensor
    work: dist.Work | None
    count: float
    grad_norm: float
    lr: float
    tokens: int
    samples: int
    seconds: float
    data_wait: float
    skipped: bool
    traffic: dict[str, int]
    uids: tuple[str, ...] = ()

    def read(self) -> dict[str, object]:
        """The line, waiting for the loss."""
        if self.work is not None:
            self.work.wait()
        line: dict[str, object] = {
            "step": self.step,
            "loss": float(self.loss_sum) / self.count,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "tokens": self.tokens,
            "samples": self.samples,
            "seconds": round(self.seconds, 6),
            "data_wait": round(self.data_wait, 6),
            "traffic": self.traffic,
        }
        if self.skipped:
            line |= {"skipped": True, "uids": list(self.uids)}
        return line


class MetricsWriter:
    """Appends lines on rank 0; elsewhere it only waits for what must be waited for."""

    def __init__(self, path: Path, *, start: int, writes: bool, tensorboard: bool) -> None:
        self._file = None
        self._board: SummaryWriter | None = None
        if writes:
            forget_after(path / "metrics.jsonl", start)
            forget_after(path / "validation.jsonl", start)
            self._file = (path / "metrics.jsonl").open("a")
            self._validation = path / "validation.jsonl"
            if tensorboard:
                from torch.utils import tensorboard as board

                self._board = board.SummaryWriter(str(path / "tensorboard"), purge_step=start)

    def write(self, record: StepRecord) -> dict[str, object]:
        """Read a step's numbers and append its line."""
        line = record.read()
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._scalars("train", line, record.step, ("loss", "grad_norm", "lr", "seconds"))
        return line

    def write_validation(self, line: dict[str, object]) -> None:
        """Append a validation's line."""
        if self._file is not None:
            with self._validation.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._scalars(f"validation/{line['weights']}", line, int(str(line["step"])), ("loss",))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _scalars(self, prefix: str, line: dict[str, object], step: int, names: tuple[str, ...]) -> None:
        if self._board is not None:
            for name in names:
                self._board.add_scalar(f"{prefix}/{name}", float(str(line[name])), step)


def forget_after(path: Path, step: int) -> None:
    """Drop the lines beyond `step`: an attempt that was killed after its last checkpoint wrote steps that are run
    again.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept = [line for line in lines if is_whole(line) and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        partial = path.with_name(path.name + f".{os.getpid()}.partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(path)


def is_whole(line: str) -> bool:
    """Whether a line was written to its end."""
    return line.startswith("{") and line.endswith("}")
