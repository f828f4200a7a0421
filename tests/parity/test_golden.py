"""The quickstart's first losses, as committed. A change of the arithmetic, the data order or the keys shows here.

Written by `GOLDEN=write bash tools/test.sh tests/parity/test_golden.py`, and only on purpose.
"""

import json
import os
from pathlib import Path

import pytest
import ranks
from pool import run_ranks

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/golden/quickstart.json"
STEPS = 20
# Kernels round differently from one CPU to the next. Measured: torch's AVX2 and its plain kernels instead of AVX512, on
# 1, 2 and 3 ranks, differ by at most 4.5e-7 in a loss and 2.1e-6 in a norm; ten times that is allowed.
TOLERANCE = 2e-5


def test_quickstart_losses(rabbit_latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        f"run={run}",
        f"data.streams=[{{path: {rabbit_latents}}}]",
        "validation.every=0",
        "samples.every=0",
        f"train.steps={STEPS}",
        # The learning rate's horizon is the recipe's own, not these 20 steps.
        "optimizer.decay_steps=240",
    ]
    run_ranks(ranks.train, 2, ROOT / "recipes/quickstart.yaml", words)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    got = {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(got, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(golden["loss"]) == STEPS
    for name, values in golden.items():
        assert got[name] == pytest.approx(values, rel=TOLERANCE), name
