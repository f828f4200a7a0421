"""Kills at random moments, and two attempts at once, on a light run (tools/soak) and a directory."""

from pathlib import Path

import kills
import light
import pool
import pytest
import rivals
import shadow
import torch


@pytest.fixture
def soak(tmp_path: Path) -> kills.Soak:
    return kills.soak_directory(pool.context(), tmp_path / "store", ranks=2, seed=20)


def test_eight_kills(soak: kills.Soak) -> None:
    """tools/soak/checkpoint.py in short."""
    for number in range(8):
        print(f"{number:4} {soak.cycle()}")
    print(soak.finish())
    assert soak.tally.kills.total() == 8
    assert soak.floor > 7, "there were commits"


@pytest.mark.parametrize("place", ["write", "commit"])
def test_the_older_of_two_attempts_stops(soak: kills.Soak, place: light.Place) -> None:
    rivals.older_stops(soak, place)


def test_a_late_manifest_does_not_count(soak: kills.Soak) -> None:
    rivals.late_manifest(soak)


def test_a_late_commit_deletes_nothing_that_a_newer_attempt_needs(soak: kills.Soak) -> None:
    rivals.late_commit(soak)


def test_a_wrong_value_is_seen() -> None:
    """The soak itself can fail: an attempt that doesn't go on where it was is noticed."""
    run = shadow.Uninterrupted()
    found = {key: torch.from_numpy(value.copy()) for key, value in run.tensors(3).items()}
    found |= {f"model.{name}": light.frozen_value(name) for name in light.FROZEN}
    shadow.check_values(found, run, 3)
    with pytest.raises(shadow.Violation, match=r"step 4 differs from the uninterrupted run in \d+ elements"):
        shadow.check_values(found, run, 4)
