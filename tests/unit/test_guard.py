"""The arithmetic of bad updates: which data are left out, the limit of the norm, how often to go back, who differs."""

import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framework.checkpoint.fence import Fence, claim, read_skipped
from framework.checkpoint.manifest import Manifest, Origin, Progress, checksum_of, decode_manifest, encode_manifest
from framework.config import GuardConfig, OptimizerConfig, TrainConfig
from framework.data.schedule import Work
from framework.data.windows import Windows, data_step, data_steps, leave_out
from framework.metrics import StepRecord
from framework.parallel.zero.engine import StepStats
from framework.programs import train
from framework.programs.guard import Ended, check_rollbacks, differing, norm_limit, with_norm
from framework.programs.opening import went_on
from framework.recipe import Recipe
from framework.run import BadNumbers
from framework.storage.directory import Directory


def test_windows_by_hand() -> None:
    """Back from 7 to 4, later from 10 to 8: steps 4 to 7 take the data 7 to 10, then 11 and 12 are left out too."""
    windows = leave_out((), 4, 7)
    assert windows == ((4, 3),)
    assert [data_step(windows, step) for step in range(9)] == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    windows = leave_out(windows, 8, 10)
    assert windows == ((4, 3), (8, 2))
    assert list(data_steps(windows, range(3, 10))) == [3, 7, 8, 9, 10, 13, 14]
    assert leave_out(windows, 8, 9) == ((4, 3), (8, 2), (8, 1)), "each time counts"
    assert leave_out(windows, 4, 10) == ((4, 3), (4, 8)), "5 to 9 of its steps, and what they had left out"


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_what_a_walk_takes(seed: int) -> None:
    """A walk that takes data one by one and forgets what it did after the step that it goes back to."""
    draw = random.Random(seed)
    windows: Windows = ()
    taken: list[int] = []  # by training step
    for following in range(200):
        if taken and draw.random() < 0.2:
            back = draw.randrange(len(taken))
            windows = leave_out(windows, back, len(taken))
            del taken[back:]
        taken.append(following)
        assert [data_step(windows, step) for step in range(len(taken))] == taken
    assert sorted(set(taken)) == taken


def test_the_limit_is_a_median_of_the_last_good_norms() -> None:
    config = GuardConfig(spike=4.0, window=4)
    norms: tuple[float, ...] = ()
    limits = []
    for norm in (1.0, 9.0, 2.0, 3.0, 50.0, math.nan, 5.0):
        limits.append(norm_limit(config, norms))
        skipped = not norm <= limits[-1]
        norms = with_norm(config, norms, StepStats(norm, skipped))
    assert limits == [math.inf] * 4 + [10.0] * 3, "of 1 2 3 9 it is 2.5; what was skipped doesn't count"
    assert norms == (9.0, 2.0, 3.0, 5.0)
    assert norm_limit(GuardConfig(spike=2.0, window=3), norms) == 6.0, "of the last three"
    assert norm_limit(GuardConfig(spike=2.0, window=2), (0.0, 0.0)) == math.inf
    assert norm_limit(GuardConfig(), norms) == math.inf and with_norm(GuardConfig(), norms, StepStats(1.0, False)) == ()


@pytest.mark.parametrize("wrong", [{"spike": 0.5}, {"spike": -2.0}, {"spike": math.nan}, {"window": 0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"guard.{name}={value}"):
        GuardConfig(**wrong)  # type: ignore[arg-type]


def test_progress_goes_through_the_manifest() -> None:
    norms = (0.1, 1 / 3, 2.0**-40)
    progress = Progress(step=9, samples=36, bad_steps=1, skipped=((4, 3), (8, 1)), norms=norms)
    assert decode_manifest(encode_manifest(Manifest(progress, Origin(), {})), "m").progress == progress
    assert progress.data_step == 13


def test_a_manifest_of_an_older_release_is_read() -> None:
    fields = dataclasses.asdict(Manifest(Progress(step=9, updates=8), Origin(), {}))
    del fields["progress"]["skipped"], fields["progress"]["norms"]
    data = json.dumps(fields | {"checksum": checksum_of(fields)}).encode()
    assert decode_manifest(data, "m").progress == Progress(step=9, updates=8)


def test_the_newest_start_says_what_is_left_out(tmp_path: Path) -> None:
    storage = Directory(str(tmp_path))
    assert read_skipped(storage) is None
    first = claim(storage, first=0)
    first.begin(0)
    assert read_skipped(storage) == ()
    first.begin(4, ((4, 3),))
    assert read_skipped(storage) == ((4, 3),)
    assert Fence(storage, 0) == first and claim(storage, first=1).attempt == 1
    assert read_skipped(storage) == ((4, 3),), "one that has only claimed says nothing"
    storage.put("fence/0001-start.json", b'{"step": 4}')
    assert read_skipped(storage) is None, "an older release leaves nothing out"


def test_bad_updates_are_over_where_the_run_went_back_to() -> None:
    stored = Progress(step=8, updates=6, bad_steps=2)
    assert went_on(stored, ((4, 1),)) == Progress(step=8, updates=6, bad_steps=2, skipped=((4, 1),))
    assert went_on(stored, ((4, 1), (8, 3))).bad_steps == 0


def test_going_back_has_an_end() -> None:
    ended = Ended(Progress(step=11, bad_steps=3, skipped=((4, 3), (8, 3))), None, saved=8, bad=True)
    check_rollbacks(ended, GuardConfig(rollbacks=2), TrainConfig())
    told = r"up to step 11, 3 updates in a row.*the checkpoint of step 8 1 times \(guard.rollbacks=1\)"
    with pytest.raises(BadNumbers, match=told):
        check_rollbacks(ended, GuardConfig(rollbacks=1), TrainConfig())
    with pytest.raises(BadNumbers, match=r"gone back to the initial weights 0 times \(guard.rollbacks=0\)"):
        check_rollbacks(dataclasses.replace(ended, saved=0), GuardConfig(rollbacks=0), TrainConfig())


def test_who_differs_from_most() -> None:
    hashes = [{"a": a, "b": "x"} for a in "0010" + "01"]
    assert differing(hashes, (0, 1, 2, 3)) == ["a on rank 2"]
    assert differing(hashes, (4, 5)) == ["a on ranks 4, 5"], "of two, either may be wrong"
    assert differing(hashes, (0, 1, 3)) == []


@pytest.mark.parametrize(("norm", "why"), [(12.5, "spike"), (math.inf, "not finite"), (math.nan, "not finite")])
def test_a_skipped_step_says_why(norm: float, why: str) -> None:
    record = StepRecord(
        step=1,
        loss_sum=None,  # type: ignore[arg-type]
        work=None,  # type: ignore[arg-type]
        count=1.0,
        grad_norm=norm,
        lr=0.0,
        tokens=1,
        samples=1,
        seconds=1.0,
        data_wait=0.0,
        skipped=True,
        traffic={},
    )
    assert record.why == why


def test_rate_and_average_follow_the_step_and_not_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 of a stage that began at 20, with the data of step 27: the rate is at 4/8 of its warm-up."""
    told: dict[str, Any] = {}

    class Engine:
        def step(self, *, lr: float, limit: float) -> StepStats:
            told.update(lr=lr, limit=limit)
            return StepStats(1.0, False)

    class Average:
        def update(self, *, step: int) -> None:
            told.update(average=step)

    monkeypatch.setattr(train, "accumulate", lambda parts, work: [(torch.tensor(2.0), ("a",))])
    recipe = Recipe(optimizer=OptimizerConfig(lr=1.0, warmup=8))
    parts = SimpleNamespace(recipe=recipe, engine=Engine(), ema=Average(), began=20)
    loss, stats, uids = train.optimizer_step(parts, Work(27, (), (1,)), step=23, limit=5.0)  # type: ignore[arg-type]
    assert (float(loss), stats.skipped, uids) == (2.0, False, ())
    assert told == {"lr": 0.5, "limit": 5.0, "average": 23}
