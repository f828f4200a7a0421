"""Who claims an attempt: the launcher, or rank 0 where there is none that does."""

import multiprocessing
from pathlib import Path

import pytest

from framework.checkpoint.attempt import claim_attempt, take_attempt
from framework.checkpoint.fence import TakenOver
from framework.environment import Environment
from framework.run import Run, launched_run
from framework.storage.directory import Directory


def in_a_process(path: Path, claimed: int | None) -> object:
    """What `take_attempt` gives in a process of its own, which holds the run while it lives."""
    with multiprocessing.get_context("fork").Pool(1) as workers:
        return workers.apply(take, (path, claimed))


def take(path: Path, claimed: int | None) -> int:
    return take_attempt(path, Directory(str(path / "store")), claimed).attempt


def test_attempts_are_numbered_by_both(tmp_path: Path) -> None:
    store = Directory(str(tmp_path / "store"))
    assert claim_attempt(tmp_path, store) == 0
    assert in_a_process(tmp_path, 0) == 0, "rank 0 claims nothing more"
    assert claim_attempt(tmp_path, store) == 1
    assert in_a_process(tmp_path, None) == 2
    assert sorted(store.list("fence/")) == [f"fence/{number:04}.json" for number in range(3)]
    assert all((tmp_path / f"attempts/{number:04}/logs").is_dir() for number in range(3))


def test_a_claim_that_is_no_longer_the_newest(tmp_path: Path) -> None:
    store = Directory(str(tmp_path / "store"))
    for _ in range(2):
        claim_attempt(tmp_path, store)
    with pytest.raises(TakenOver, match="attempt 1 has taken over"):
        in_a_process(tmp_path, 0)


def test_a_store_of_another_run(tmp_path: Path) -> None:
    store = Directory(str(tmp_path / "store"))
    claim_attempt(tmp_path / "a", store)
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        claim_attempt(tmp_path / "b", store)


def test_the_launcher_means_the_same_run(tmp_path: Path) -> None:
    env = Environment(0, 1, 0, None, run=tmp_path / "x/../a", attempt=3)
    assert launched_run(tmp_path / "a", env) == Run(tmp_path / "a", 3)
    assert launched_run(tmp_path / "a", Environment(0, 1, 0, None)) is None
    with pytest.raises(ValueError, match=r"claimed attempt 3 of the run .*/x/\.\./a, the recipe's is .*/b"):
        launched_run(tmp_path / "b", env)
