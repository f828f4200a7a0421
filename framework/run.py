"""The run directory: its paths, the claim of an attempt, the stored recipe and the verdict.

    RUN/recipe.yaml  lineage.json  metrics.jsonl  validation.jsonl
        checkpoints/step-00000100-0002/   samples/   attempts/0002/{recipe.yaml,verdict.json,logs/}

Attempts are numbered by the fence in the checkpoints' store (checkpoint/fence.py): a process whose attempt is no
longer the newest can't commit anything.
"""

import dataclasses
import difflib
import fcntl
import fnmatch
import hashlib
import json
import os
import socket
import subprocess
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

from framework.config import ResumeConfig
from framework.environment import Environment
from framework.kernels.config import FLASH_DISTRIBUTIONS, installed_flash
from framework.layers import apply_overrides
from framework.recipe import Recipe, build_recipe, flatten, load_recipe, read_recipe_layers, resolve_auto, to_yaml
from framework.stages.recipes import adopt_resolved, recipe_at
from framework.storage.directory import Directory

# Keys that neither change the data order nor the loss nor the model: free on resume. train.steps only upward.
FREE = (
    "run",
    "mesh.*",
    "hardware.*",
    "zero.*",
    "attention.*",
    "execution.*",
    "data.micro_batch",
    "data.prefetch",
    "data.workers",
    "data.degrees",
    "data.cache.*",
    "data.bad_shards",
    "train.*",
    "guard.*",
    "checkpoint.*",
    "validation.*",
    "sampler.*",
    "watch.*",
    "samples.*",
    "log.*",
    "resume.*",
)
BOUND = ("attention.pattern.*", "checkpoint.store", "train.trainable")  # not free although the above match it

CHECKPOINTS = "checkpoints"
IDENTITY = "identity"
SNAPSHOT_PREFIX = "code-"  # of a copy of this package, launch/snapshot.py
COMMIT_FILE = "commit"


class RunFailure(RuntimeError):
    """A failure that one message explains: printed without a traceback, exit status 1."""


class BadNumbers(RunFailure):
    """Too many updates in a row were skipped, and going back didn't help."""


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended. step: optimizer steps done and saved. signal: what stopped it, if something did. stage:
    that it was in, "" in a run without. follow: how many stages are left, where that one is done.
    """

    outcome: Literal["done", "stopped"]
    step: int
    signal: int | None = None
    stage: str = ""
    follow: int = 0


@dataclass(frozen=True)
class Run:
    """Paths of a run, and the number of this attempt."""

    path: Path
    attempt: int

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def attempt_path(self) -> Path:
        return self.path / "attempts" / f"{self.attempt:04}"

    @property
    def failures(self) -> Path:
        """Where ranks under a supervisor say why they failed."""
        return self.attempt_path / "failures"

    def write_verdict(self, verdict: Verdict) -> None:
        """On disk when this returns, its name included."""
        names = ("outcome", "step", "signal", *(("stage", "follow") if verdict.stage else ()))
        fields = {name: getattr(verdict, name) for name in names}
        write_atomically(self.attempt_path / "verdict.json", json.dumps(fields) + "\n")
        folder = os.open(self.attempt_path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_verdict(run: Run) -> Verdict | None:
    """How an attempt says that it ended, None where it was lost or hasn't."""
    try:
        return Verdict(**json.loads((run.attempt_path / "verdict.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def latest_attempt(path: Path) -> int:
    """The newest attempt's number, -1 when there is none."""
    numbers = [int(p.name) for p in (path / "attempts").glob("*") if p.name.isdecimal()]
    return max(numbers, default=-1)


def launched_run(path: Path, env: Environment) -> Run | None:
    """The run and attempt that the launcher has claimed for its ranks; None where it leaves that to them. path: of the
    recipe's run. Raises ValueError where they differ.
    """
    if env.attempt is None:
        return None
    if env.run is None or env.run.resolve() != path.resolve():
        raise ValueError(
            f"the launcher has claimed attempt {env.attempt} of the run {env.run}, the recipe's is {path}: give both "
            "the same run=DIR"
        )
    return Run(path, env.attempt)


def lock_run(path: Path, *, refuse: bool = True) -> None:
    """Hold the run for this process's life. Raises ValueError when a living process of this machine holds it, unless
    `refuse` is False.

    A start on another machine isn't seen: there the fence keeps the older attempt from committing.
    """
    attempts = path / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    lock, here = (
        os.open(attempts / "lock", os.O_RDWR | os.O_CREAT, 0o644),
        f"process {os.getpid()} on {socket.gethostname()}",
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not refuse:
            return
        holder = os.pread(lock, 100, 0).decode().strip()
        if holder == here:  # in the stage before
            os.close(lock)
            return
        raise ValueError(f"the run {path} is in use by {holder}: wait for it or stop it first") from None
    except OSError:  # a file system without locks
        return
    os.ftruncate(lock, 0)
    os.pwrite(lock, here.encode(), 0)


def open_attempt(path: Path, number: int) -> bool:
    """Create the directory of an attempt; False where it is there already."""
    (path / "attempts").mkdir(parents=True, exist_ok=True)
    try:
        (path / "attempts" / f"{number:04}").mkdir()
    except FileExistsError:
        return False
    (path / "attempts" / f"{number:04}" / "logs").mkdir()
    return True


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file that is there whole or not at all. durable: even where the machine loses power."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def run_identity(path: Path) -> str | None:
    """A run's own id, by which a store of checkpoints knows whose they are; None where there is no run yet."""
    file = path / "attempts" / IDENTITY
    return file.read_text() if file.is_file() else None


def make_identity(path: Path) -> str:
    """A run's id, made at its first attempt."""
    Directory(str(path / "attempts")).put_if_absent(IDENTITY, uuid.uuid4().hex.encode())
    identity = run_identity(path)
    assert identity is not None
    return identity


def is_run(path: Path) -> bool:
    """Whether a directory is a run."""
    return (path / "recipe.yaml").is_file()


def recipe_of_run(path: Path) -> Recipe:
    """The recipe stored in a run."""
    if not is_run(path):
        raise ValueError(f"{path} is no run directory: it has no recipe.yaml")
    return load_recipe(path / "recipe.yaml", [])


@dataclass(frozen=True)
class Resolved:
    """The recipe an invocation means. notes: what a person should know of it (a differing recipe file, as a diff).
    stored: the run's recipe with stages, against which checkpoint/stage.py checks it once it is known which have begun.
    """

    recipe: Recipe
    overrides: tuple[str, ...]
    notes: tuple[str, ...]
    stored: Recipe | None = None


def resolve_invocation(recipe_path: Path, overrides: list[str]) -> Resolved:
    """The recipe of `cuboid train RECIPE key=value ...`.

    In a new run: the file under the overrides. In an existing one the stored recipe is the base and only the overrides
    given now count; a file that differs from what the run was started with is shown as a diff.

    Raises ValueError for a key that changes the data order, the loss or the model of an existing run.
    """
    fresh = load_recipe(recipe_path, overrides)
    if not fresh.run:
        raise ValueError("the recipe names no run directory: add run=DIR")
    path = Path(fresh.run)
    check_directory(path)
    if not is_run(path):
        return Resolved(fresh, tuple(overrides), ())
    stored = recipe_of_run(path)
    changed = build_recipe(apply_overrides(read_recipe_layers(path / "recipe.yaml"), overrides))
    if bool(stored.stages) != bool(changed.stages):
        raise ValueError(
            f"the run {path} began {'with' if stored.stages else 'without'} stages: start another (run=DIR)"
        )
    if stored.stages:
        changed = adopt_resolved(changed, stored)
    else:
        check_changes(stored, changed)
    started_with = json.loads((path / "lineage.json").read_text())["overrides"]
    notes = recipe_diff(stored, recipe_path, started_with)
    return Resolved(changed, tuple(overrides), notes, stored if stored.stages else None)


def check_directory(path: Path) -> None:
    """Raises ValueError where a run would be mixed with something else."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"run={path} is a file: name a directory")
    if path.is_dir() and not is_run(path):
        others = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.name not in ("attempts", CHECKPOINTS, "lineage.json", "jobs")
        )
        if others:
            raise ValueError(f"run={path} holds {others[0]!r} and is no run: name a new or empty directory")


def recipe_diff(stored: Recipe, recipe_path: Path, started_with: list[str]) -> tuple[str, ...]:
    """Lines that tell how a recipe file differs from the run's stored recipe; empty when it doesn't."""
    file = load_recipe(recipe_path, [*started_with, f"optimizer.decay_steps={stored.optimizer.decay_steps}"])
    # What auto stands for may differ on this machine; the run goes on with what it stood for then.
    kernel = stored.attention.kernel if file.attention.kernel == "auto" else file.attention.kernel
    attention = dataclasses.replace(file.attention, kernel=kernel)
    file = dataclasses.replace(file, run=stored.run, attention=attention)
    file = adopt_resolved(file, stored) if stored.stages else resolve_auto(file)
    old, new = to_yaml(stored).splitlines(), to_yaml(file).splitlines()
    diff = list(
        difflib.unified_diff(old, new, "the run's stored recipe (used)", f"{recipe_path} (ignored)", n=0, lineterm="")
    )
    return tuple(diff)


def without_degrees(recipe: Recipe) -> Recipe:
    """The recipe without its buckets' own degrees: like the mesh they change neither samples nor loss."""
    buckets = [dataclasses.replace(bucket, ring=None, ulysses=None) for bucket in recipe.data.buckets]
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, buckets=buckets))


def check_changes(stored: Recipe, changed: Recipe) -> None:
    """Refuse changes to an existing run that would not be the same run."""
    check_same(stored, changed)
    if changed.train.steps < stored.train.steps:
        raise ValueError(f"train.steps={changed.train.steps} is below the run's {stored.train.steps}: it may only grow")


def check_same(stored: Recipe, changed: Recipe, *, where: str = "") -> None:
    """Raises ValueError for a key that isn't free. where: the stage, for a person."""
    old, new = flatten(without_degrees(stored)), flatten(without_degrees(changed))
    for key in sorted(old.keys() | new.keys()):
        bound = any(fnmatch.fnmatch(key, pattern) for pattern in BOUND)
        allowed = (*(() if bound else FREE), *changed.resume.allow)
        if old.get(key) != new.get(key) and not any(fnmatch.fnmatch(key, pattern) for pattern in allowed):
            raise ValueError(
                f"{where}{key}={new.get(key)} differs from {old.get(key)} in the run {stored.run}: it changes the data "
                f"order, the loss or the model. Start another run (run=DIR), or say resume.allow=[{key}]"
            )


def store_recipe(run: Run, recipe: Recipe, overrides: tuple[str, ...], *, dp: int, stage: int | None = None) -> None:
    """Write the resolved recipe into the run and into the attempt, and the lineage.

    `resume.allow` is a permission for one start, so it isn't stored. dp: what this attempt resolved `auto` to, which
    the attempt's recipe says and the run's doesn't. stage: of the attempt, whose own recipe it gets.
    """
    recipe = dataclasses.replace(recipe, resume=ResumeConfig())
    own = recipe_at(recipe, stage)
    resolved = dataclasses.replace(own, mesh=dataclasses.replace(own.mesh, dp=dp))
    write_atomically(run.attempt_path / "recipe.yaml", to_yaml(resolved))
    write_atomically(run.path / "lineage.json", json.dumps(lineage(run.path, overrides), indent=1) + "\n")
    write_atomically(run.path / "recipe.yaml", to_yaml(recipe))


def lineage(path: Path, overrides: tuple[str, ...]) -> dict[str, object]:
    """Where a run comes from: versions, commit and time of its first start; the key=value words of every start."""
    file = path / "lineage.json"
    if file.exists():
        stored: dict[str, object] = json.loads(file.read_text())
        words = stored["overrides"]
        assert isinstance(words, list)
        return stored | {"overrides": [*words, *overrides]}
    return {
        "versions": versions(),
        "commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "overrides": list(overrides),
        "parents": [],
    }


def versions() -> dict[str, str]:
    """Of the packages that a run depends on."""
    flash = [FLASH_DISTRIBUTIONS[generation] for generation in installed_flash()]
    packages = ("cuboid", "torch", "deepspeed", "mosaicml-streaming", "submitit", "einops", "omegaconf", "numpy")
    return {name: metadata.version(name) for name in (*packages, *flash)}


def recipe_hash(recipe: Recipe) -> str:
    """A hash of a recipe with all its keys."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of this code's checkout, with + where it was changed; None outside one. Of a job's copy of the code:
    that of where it was taken.
    """
    folder = Path(__file__).resolve().parents[1]
    if folder.name.startswith(SNAPSHOT_PREFIX) and (folder / COMMIT_FILE).is_file():
        return (folder / COMMIT_FILE).read_text() or None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
