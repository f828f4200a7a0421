"""Real training on the lab, by the command as a person types it: tests/slurm/test_training.py runs these at once."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml
from slurm_lab import Lab
from tiny import write_latents, write_recipe

from framework.heartbeat import read_heartbeat
from framework.history import Event, History
from framework.run import Run, Verdict, read_verdict

ROOT = Path(__file__).parent.parent
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "aws-secret-4711",
    "WANDB_API_KEY": "wandb-secret-4712",
    "HF_TOKEN": "hf-secret-4713",
}
WORDS = ("zero.engine=fsdp2", "zero.stage=3", "mesh.dp=auto")


@dataclass(frozen=True)
class Desk:
    """Where a person sits: a lab, a folder, a recipe and a cluster's file."""

    lab: Lab
    folder: Path
    recipe: Path
    cluster: Path

    def cuboid(self, *words: str, status: int = 0) -> str:
        """What a command prints."""
        command = [sys.executable, "-m", "framework.cli", *words]
        environment = self.lab.environment | SECRETS | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=250)
        assert done.returncode == status, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, run: str, *words: str) -> Path:
        """Submit a run; its directory."""
        place = self.folder / run
        self.cuboid("submit", str(self.recipe), "--cluster", str(self.cluster), *WORDS, f"run={place}", *words)
        return place


def open_desk(lab: Lab, folder: Path, *, poisoned: tuple[int, ...] = ()) -> Desk:
    latents = write_latents(folder / "latents", poisoned=poisoned)
    cluster = folder / "lab.yaml"
    changes: dict[str, Any] = {
        "base": str(ROOT / "slurm" / "clusters" / "lab.yaml"),
        "nodes_file": str(folder / "nodes.json"),
        "scratch": str(folder),
        "sbatch": {"partition": "low", "exclusive": True},
        "environment": {"OMP_NUM_THREADS": "1"},
    }
    cluster.write_text(yaml.safe_dump(changes))
    return Desk(lab, folder, write_recipe(folder, latents), cluster)


def wait(run: Path, what: Callable[[], bool], seconds: float = 200) -> None:
    """Until something holds of a run."""
    deadline = time.monotonic() + seconds
    while not what():
        logs = "\n".join(path.read_text()[-1000:] for path in sorted(run.glob("**/*.log")))
        assert time.monotonic() < deadline, f"{events(run)}\n{logs}"
        time.sleep(0.1)


def events(run: Path, name: str | None = None) -> list[Event]:
    return [event for event in History(run).events() if name is None or event.event == name]


def wait_finished(run: Path) -> Event:
    wait(run, lambda: bool(events(run, "finished")))
    return events(run, "finished")[-1]


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def verdict(run: Path, attempt: int) -> Verdict:
    found = read_verdict(Run(run, attempt))
    assert found is not None
    return found


def preempted_run_equals_the_local_one(lab: Lab, folder: Path) -> None:
    desk = open_desk(lab, folder)
    words = ("train.steps=200", "checkpoint.every=50", "checkpoint.keep=100")
    run = desk.submit("lab", "--nodes", "2", *words)
    wait(run, lambda: len(metrics(run)) >= 20)
    hosts = events(run, "launched")[0].nodes
    assert hosts is not None
    told = time.time()
    high = ("-p", "high", "-w", ",".join(hosts), "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    lab.run("sbatch", "--parsable", *high)
    local = folder / "local"
    wait(run, lambda: bool(events(run, "requeued")))
    desk.cuboid("train", str(desk.recipe), *WORDS, f"run={local}", *words, "mesh.dp=4")
    assert wait_finished(run).outcome == "done"
    stopped = verdict(run, 0)
    assert 20 <= stopped.step < 200 and events(run, "ended")[0].time - told < 3 * 2 + 2
    assert losses(run) == losses(local) and len(losses(run)) == 200
    beat = read_heartbeat(Run(run, 1))
    assert beat is not None and beat.resumed == stopped.step
    status = json.loads(desk.cuboid("status", str(run), "--json"))
    assert status["state"] == "DONE"
    text = desk.cuboid("status", str(run))
    assert "1 requeue" in text and "DONE" in text
    assert_no_secrets(folder)


def assert_no_secrets(folder: Path) -> None:
    """Of the environment, in any file."""
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(secret.encode() in data for secret in SECRETS.values()), path


def chain_of_three_meshes(lab: Lab, folder: Path) -> None:
    desk = open_desk(lab, folder)
    first = desk.submit("first", "--nodes", "2", "train.steps=6")
    again = ("--after", str(first), f"init_from={first}")
    second = desk.submit("second", "--nodes", "2", "mesh.tp=2", "train.steps=6", *again)
    again = ("--after", str(second), f"init_from={second}")
    third = desk.submit("third", "--nodes", "1", "mesh.ring=2", "train.steps=6", *again)
    assert [wait_finished(run).outcome for run in (first, second, third)] == ["done"] * 3
    ends = [events(run, "finished")[0].time for run in (first, second)]
    starts = [events(run, "started")[0].time for run in (second, third)]
    assert all(end < start for end, start in zip(ends, starts, strict=True))
    assert [verdict(run, 0).step for run in (first, second, third)] == [6, 6, 6]
    # What one rank does that begins with the second run's weights, on this machine.
    local = folder / "local"
    desk.cuboid("train", str(desk.recipe), *WORDS, f"run={local}", "mesh.dp=1", "train.steps=6", f"init_from={second}")
    for ours, theirs in zip(losses(third), losses(local), strict=True):
        assert abs(ours - theirs) < 1e-5 * abs(theirs)
    fresh = losses(first)[0]
    assert abs(losses(third)[0] - fresh) > 1e-4 * fresh


def stages_are_a_chain(lab: Lab, folder: Path) -> None:
    desk = open_desk(lab, folder)
    tree = yaml.safe_load(desk.recipe.read_text()) | {"train": {}}
    tree["stages"] = [
        {"name": "wide", "exit": {"steps": 3}, "mesh": {"dp": 4}},
        {"name": "split", "exit": {"samples": 12}, "mesh": {"dp": 1, "tp": 2}},
    ]
    desk.recipe.write_text(yaml.safe_dump(tree))
    words, run = WORDS[:2], folder / "run"
    given = ("submit", str(desk.recipe), "--cluster", str(desk.cluster), *words, f"run={run}")
    desk.cuboid(*given)
    wait(run, lambda: len(events(run, "finished")) == 2)
    first, second = events(run, "submitted")
    assert second.after == first.job
    assert [(e.job, e.outcome) for e in events(run, "finished")] == [(first.job, "done"), (second.job, "done")]
    assert [(e.job, e.ranks) for e in events(run, "launched")] == [(first.job, 4), (second.job, 2)]
    assert "stage wide is done, at step 3" in str(events(run, "finished")[0].reason)
    assert [line["stage"] for line in metrics(run)] == ["wide"] * 3 + ["split"] * 3
    assert json.loads(desk.cuboid("status", str(run), "--json"))["state"] == "DONE"
    assert "its 2 stages are done, 6 steps" in desk.cuboid(*given, status=2)
    local = folder / "local"
    desk.cuboid("train", str(desk.recipe), *words, f"run={local}")
    assert losses(run) == losses(local)


def planted_nan(lab: Lab, folder: Path) -> None:
    desk = open_desk(lab, folder, poisoned=(3,))
    skips = desk.submit("skips", "--nodes", "1", "train.steps=8")
    rolls = desk.submit("rolls", "--nodes", "1", "train.steps=8", "train.max_bad_steps=1", "checkpoint.every=1")
    assert [wait_finished(run).outcome for run in (skips, rolls)] == ["done", "done"]
    bad = [line for line in metrics(skips) if line.get("skipped")]
    assert len(bad) == 4 and all("clip3@0" in line["uids"] for line in bad)
    assert [line["step"] for line in metrics(rolls)] == list(range(1, 9))
    assert not any(line.get("skipped") for line in metrics(rolls))
    passed_over = metrics(rolls)[-1]["data_step"] - 8
    assert passed_over > 0
    assert "back from step" in (rolls / "attempts" / "0000" / "logs" / "rank-00000.log").read_text()


SCENARIOS: Final = MappingProxyType(
    {
        each.__name__: each
        for each in (
            preempted_run_equals_the_local_one,
            chain_of_three_meshes,
            stages_are_a_chain,
            planted_nan,
        )
    }
)
