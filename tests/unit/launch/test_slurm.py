"""What the scheduler's words mean."""

import pytest

from framework.launch import slurm

LINE = "JobId=7 JobName=a JobState={} Reason={} Dependency=(null) Restarts={} RunTime=00:01:00"


@pytest.mark.parametrize(
    ("state", "reason", "restarts", "fate"),
    [
        ("COMPLETING", "None", 3, "requeued"),
        ("PENDING", "BeginTime", 3, "requeued"),
        ("COMPLETING", "None", 2, "cancelled"),
        ("CANCELLED", "None", 2, "cancelled"),
        ("COMPLETING", "TimeLimit", 2, "limit"),
        ("TIMEOUT", "TimeLimit", 2, "limit"),
        ("RUNNING", "None", 2, "unknown"),
    ],
)
def test_why_a_job_is_ended(monkeypatch: pytest.MonkeyPatch, state: str, reason: str, restarts: int, fate: str) -> None:
    """Of the start number 2; as a Slurm 22.05 says it."""
    monkeypatch.setattr(slurm, "call", lambda words: LINE.format(state, reason, restarts))
    assert slurm.fate("7", 2) == fate


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: list[str]) -> str:
        raise OSError("no controller")

    monkeypatch.setattr(slurm, "call", fails)
    assert slurm.fate("7", 0) == "unknown" and slurm.gone_nodes(["a"]) == () and not slurm.is_silent("a")
    assert slurm.num_nodes("p") > 1000


def test_lost_nodes_and_those_that_are_busy_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(["a allocated\nb down*\nc mixed*\nd idle*\ne drained\n", "c mixed\nd idle*\n"])
    monkeypatch.setattr(slurm, "call", lambda words: next(looks))
    assert slurm.gone_nodes(["a", "b", "c", "d", "e"], look_again=0.01) == ("b", "d")
