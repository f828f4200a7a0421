"""The calibration of the published points: that it is one, and that what doesn't fit is said."""

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "tools/bench"


def test_one_point_calibrates_and_the_others_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import published

    hardware = published.load_hardware("h100")
    first, *others = published.POINTS
    machine = published.scaled(hardware, published.calibrated(first, hardware))
    assert published.predict(first, machine).rank_flops / 1e12 == pytest.approx(325.8, rel=1e-6)
    text = "\n".join(published.lines())
    for point in others:
        ratio = published.predict(point, machine).rank_flops / 1e12 / point.measured
        assert f"{ratio:8.3f}  {'consistent' if abs(ratio - 1) <= 0.1 else 'NOT consistent'} with" in text
    # 37,440 tokens in all three, as published.
    assert {published.bucket_tokens(published.recipe_of(p), 0).num_tokens for p in published.POINTS} == {37_440}
