"""The proof that training, EMA, validation and sampling fit together: recipes/overfit.yaml gives its clip back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pool import run_ranks
from ranks import train

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(900)
def test_overfit(rabbit_latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [f"run={run}", f"data.streams=[{{path: {rabbit_latents}}}]", f"validation.shards=[{rabbit_latents}]"]
    run_ranks(train, 2, ROOT / "recipes/overfit.yaml", words, timeout=800)

    tool = [sys.executable, str(ROOT / "tools/compare.py"), str(run), "--seeds", "1", "2", "--json"]
    result = json.loads(subprocess.run(tool, capture_output=True, text=True, check=True).stdout)
    print(result)
    assert len(result["psnr"]) == 2
    for value in result["psnr"].values():
        assert value >= 20
        assert value >= result["best_still"] + 2

    validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    losses = {weights: [v["loss"] for v in validation if v["weights"] == weights] for weights in ("raw", "ema")}
    assert all(values[-1] < 0.25 * values[0] for values in losses.values()), losses
