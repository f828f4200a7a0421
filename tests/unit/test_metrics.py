"""metrics.jsonl: a line a step, read late, and no step twice after a crash."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import write_recipe

from framework.metrics import MetricsWriter, StepRecord, forget_after, open_metrics
from framework.recipe import load_recipe
from framework.run import Run, RunFailure, make_identity


class Work:
    """A reduction under way: the sum is there once it was waited for."""

    def __init__(self, loss: torch.Tensor, value: float) -> None:
        self._loss, self._value = loss, value

    def wait(self) -> None:
        self._loss.fill_(self._value)


def record(step: int, *, skipped: bool = False) -> StepRecord:
    loss = torch.zeros(())
    return StepRecord(
        step=step,
        loss_sum=loss,
        work=Work(loss, 6.0 * step),  # type: ignore[arg-type]
        count=4.0,
        grad_norm=0.5,
        lr=1e-3,
        tokens=8,
        samples=4,
        seconds=0.123456789,
        data_wait=0.0,
        skipped=skipped,
        traffic={"zero": 3},
        uids=("a", "b"),
    )


def write_lines(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_waits_for_its_loss() -> None:
    line = record(2).read()
    assert line == {
        "step": 2,
        "loss": 3.0,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 8,
        "samples": 4,
        "seconds": 0.123457,
        "data_wait": 0.0,
        "traffic": {"zero": 3},
    }
    assert record(2, skipped=True).read() == line | {"skipped": True, "why": "spike", "uids": ["a", "b"]}


def test_lines_are_there_as_they_are_written(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, start=0, writes=True, tensorboard=False)
    for step in (1, 2):
        returned = metrics.write(record(step))
        assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == returned
    metrics.write_validation({"step": 2, "weights": "raw", "loss": 0.5})
    metrics.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2] and steps(tmp_path / "validation.jsonl") == [2]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, start=0, writes=False, tensorboard=False)
    assert metrics.write(record(1))["loss"] == 1.5
    metrics.write_validation({"step": 1, "weights": "raw", "loss": 0.5})
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_steps_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    """Killed in step 6 with a checkpoint of step 3: 4 and 5 are run again."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        write_lines(tmp_path / name, "".join(f'{{"step": {i}}}\n' for i in range(1, 6)) + '{"step": 6, "lo')
    metrics = MetricsWriter(tmp_path, start=3, writes=True, tensorboard=False)
    metrics.write(record(4))
    metrics.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4] and steps(tmp_path / "validation.jsonl") == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "validation.jsonl"]


def test_a_file_without_such_lines_is_left_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m", '{"step": 1}\n{"step": 2}\n')
    before = path.stat().st_ino
    forget_after(path, 2)
    assert path.stat().st_ino == before and steps(path) == [1, 2]
    forget_after(tmp_path / "absent", 2)
    assert not (tmp_path / "absent").exists()


WHOLE = '{"step": 2, "traffic": {"zero": 3}}'


@pytest.mark.parametrize(
    "length",
    [
        *range(1, len(WHOLE) + 2),
    ],
)
def test_a_line_may_be_cut_anywhere(tmp_path: Path, length: int) -> None:
    """A full disk or a crash leaves any part of the last line; the next attempt goes on."""
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 1}\n' + (WHOLE + "\n")[:length])
    metrics = MetricsWriter(tmp_path, start=2, writes=True, tensorboard=False)
    metrics.write(record(3))
    metrics.close()
    assert steps(path) in ([1, 3], [1, 2, 3])


class FakeWandb(ModuleType):
    """What is asked of the package."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, object]] = []
        self.lines: list[dict[str, float]] = []
        self.refuses = False

    def init(self, **words: object) -> "FakeWandb":
        if self.refuses:
            raise FakeWandb.Error("no network")
        self.runs.append(words)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, float]) -> None:
        self.lines.append(values)

    def finish(self) -> None:
        self.lines.append({})


def test_all_attempts_are_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt begins before the first one's last step."""
    wandb, folder = FakeWandb(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (folder / "attempts").mkdir(parents=True)
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, ["log.wandb=videos"]), [])
    identity = make_identity(folder)
    for attempt, start in enumerate((0, 1)):
        metrics = open_metrics(recipe, Run(folder, attempt), start=start, writes=True)
        metrics.write(record(start + 1))
        metrics.write_validation({"step": start + 1, "weights": "ema", "loss": 0.5})
        metrics.close()
        open_metrics(recipe, Run(folder, attempt), start=start, writes=False).close()
    assert [(run["id"], run["project"], run["name"], run["resume"]) for run in wandb.runs] == [
        (identity, "videos", "run", "allow")
    ] * 2, "of rank 0 alone"
    assert wandb.lines[0] == {
        "train/loss": 1.5,
        "train/grad_norm": 0.5,
        "train/lr": 1e-3,
        "train/seconds": 0.123457,
        "step": 1,
    }
    assert wandb.lines[1:3] == [{"validation/ema/loss": 0.5, "step": 1}, {}]
    assert wandb.lines[3]["step"] == 2
    wandb.refuses = True
    with pytest.raises(RunFailure, match=r"log\.wandb=videos: no network"):
        open_metrics(recipe, Run(folder, 2), start=2, writes=True)
