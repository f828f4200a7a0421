"""metrics.jsonl: one line a step, and TensorBoard and Weights & Biases where asked for.

A step's loss is a tensor whose sum over the ranks is still under way when the step ends; it is read when the next step
has been launched, so that nothing waits for it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from framework.recipe import Recipe, flatten
from framework.run import Run, RunFailure, run_identity, write_atomically
from framework.stages.merge import Stage

if TYPE_CHECKING:
    from torch.distributed import Work
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepRecord:
    """A finished step, counted from 1. loss_sum: summed over the ranks once `work` is done; the loss is loss_sum /
    count. data: the data step, from 0, where data were left out before it. lost: samples that couldn't be had in the
    attempt's steps before.
    """

    step: int
    loss_sum: Tensor
    work: "Work"
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
    lost: int = 0
    data: int | None = None

    @property
    def why(self) -> str:
        """Why a skipped update was."""
        return "spike" if math.isfinite(self.grad_norm) else "not finite"

    def read(self) -> dict[str, object]:
        """The line, waiting for the loss."""
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
        if self.lost:
            line["lost_samples"] = self.lost
        if self.skipped:
            line |= {"skipped": True, "why": self.why, "uids": list(self.uids)}
        if self.data is not None:
            line["data_step"] = self.data
        return line


class WandbRun:
    """One run of Weights & Biases for all attempts: its id is the run's own.

    Its step only rises, and an attempt goes back to its checkpoint; so curves are drawn over a value "step".
    """

    def __init__(self, project: str, path: Path, config: dict[str, object]) -> None:
        """path: of the run. config: shown with it. Raises RunFailure where the service refuses."""
        import wandb

        identity = run_identity(path)
        assert identity is not None, "an attempt has been claimed"
        try:
            self._run: Any = wandb.init(
                project=project, id=identity, name=path.name, dir=str(path), resume="allow", config=config
            )
        except wandb.Error as error:
            raise RunFailure(f"log.wandb={project}: {error}") from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Hand over to the process that uploads."""
        self._run.log(values | {"step": step})

    def close(self) -> None:
        """Wait until everything is there."""
        self._run.finish()


class MetricsWriter:
    """Appends lines on rank 0; elsewhere it only waits for what must be waited for. loss: the newest that is known."""

    def __init__(
        self,
        path: Path,
        *,
        start: int,
        writes: bool,
        tensorboard: bool,
        wandb: WandbRun | None = None,
        stage: str = "",
    ) -> None:
        """stage: that stands in every line, if there is one."""
        self._path, self._writes, self._stage = path, writes, {"stage": stage} if stage else {}
        self._board: SummaryWriter | None = None
        self._wandb = wandb
        self.loss: float | None = None
        if writes:
            forget_after(path / "metrics.jsonl", start)
            forget_after(path / "validation.jsonl", start)
            if tensorboard:
                from torch.utils import tensorboard as board

                self._board = board.SummaryWriter(str(path / "tensorboard"), purge_step=start)

    def write(self, record: StepRecord) -> dict[str, object]:
        """Read a step's numbers and append its line."""
        line = record.read()
        self.loss = float(str(line["loss"]))
        if self._writes:
            self._append("metrics.jsonl", line)
            self._scalars("train", line, record.step, ("loss", "grad_norm", "lr", "seconds"))
        return line

    def write_validation(self, line: dict[str, object]) -> None:
        """Append a validation's line."""
        if self._writes:
            self._append("validation.jsonl", line)
            self._scalars(f"validation/{line['weights']}", line, int(str(line["step"])), ("loss",))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()

    def _append(self, name: str, line: dict[str, object]) -> None:
        """Raises OSError with the file's name: a full disk is found here first."""
        path = self._path / name
        try:
            with path.open("a") as file:
                file.write(json.dumps(line | self._stage) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def _scalars(self, prefix: str, line: dict[str, object], step: int, names: tuple[str, ...]) -> None:
        values = {f"{prefix}/{name}": float(str(line[name])) for name in names}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.scalars(values, step)


def open_metrics(recipe: Recipe, run: Run, *, start: int, writes: bool, stage: Stage | None = None) -> MetricsWriter:
    """Where the numbers of an attempt go. start: its first step."""
    config, project = recipe.log, recipe.log.wandb
    wandb = WandbRun(project, run.path, flatten(recipe)) if writes and project else None
    return MetricsWriter(
        run.path,
        start=start,
        writes=writes,
        tensorboard=config.tensorboard,
        wandb=wandb,
        stage="" if stage is None else stage.name,
    )


def forget_after(path: Path, step: int) -> None:
    """Drop the lines beyond `step`: an attempt that was killed after its last checkpoint wrote steps that are run
    again.
    """
    if not path.exists():
        return
    text = path.read_text()
    kept = "".join(line + "\n" for line in text.splitlines() if is_whole(line) and json.loads(line)["step"] <= step)
    if kept != text:
        write_atomically(path, kept)


def is_whole(line: str) -> bool:
    """Whether a line was written to its end."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
