"""Kills at random moments, of a server too, and two attempts at once, on a light run (tools/soak) and S3."""

from pathlib import Path

import kills
import pool
import pytest
import rivals
from buckets import soak_bucket
from object_store import ObjectStore


@pytest.fixture
def soak(object_store: ObjectStore, tmp_path: Path) -> kills.Soak:
    return soak_bucket(pool.context(), object_store, f"vid/{tmp_path.name}", ranks=2, seed=7, every=2, frozen_seconds=2)


def test_kills(soak: kills.Soak) -> None:
    """With the server killed or frozen in mid-save; for 20 s in tools/soak/checkpoint.py --store s3."""
    for number in range(4):
        print(f"{number:4} {soak.cycle()}")
    print(soak.finish())
    assert soak.tally.outages.total() > 0
    assert soak.tally.retries == 0


def test_the_older_of_two_attempts_stops(soak: kills.Soak) -> None:
    rivals.older_stops(soak, "commit")


def test_a_late_manifest_does_not_count(soak: kills.Soak) -> None:
    rivals.late_manifest(soak)


def test_a_late_commit_deletes_nothing_that_a_newer_attempt_needs(soak: kills.Soak) -> None:
    rivals.late_commit(soak)
