"""The GPU benches on the CPU, with a tiny model: that they run, what they count, what they say without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from framework.models.config import ModelConfig
from framework.plan.flops import step_flops

BENCH = Path(__file__).parents[3] / "tools/bench"
TINY = ["--device", "cpu", "--model", "tiny", "--tokens", "tiny", "--dtype", "float32", "--steps", "2"]


def run(tool: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(BENCH.parents[1])
    command = [sys.executable, "-W", "ignore", str(BENCH / tool), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def twin(tmp_path: Path, *words: str) -> tuple[dict[str, Any], str]:
    done = run("gpu_twin.py", *TINY, *words, "--json", str(tmp_path / "twin.json"))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "twin.json").read_text())["results"]
    assert result["error"] == "", result
    return result, done.stdout


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_a_rank_of_a_ring_of_ulysses(tmp_path: Path, engine: str) -> None:
    """16 ranks: ring 2, Ulysses 8; 72 tokens, 5 on a rank with the padding, 8 heads of 8, 2 blocks, 4 bytes a number.

    Ulysses  8 s D (u-1)/u b      a block: four tensors, forward and backward
    ring     3 x (k and v of the 40 tokens and the head that this rank of the ring has), two of them b, one the gradient
    """
    result, text = twin(tmp_path, "--world", "16", "--cp", "16", "--engine", engine)
    measured = result["measured"]
    assert measured["sent"]["ulysses"] == 2 * 8 * 5 * 64 * 7 // 8 * 4
    assert measured["sent"]["ring"] == 2 * 3 * 2 * 40 * 8 * 4
    assert measured["num_parameters"] == 131_216
    zero = {name: sent for name, sent, _ in result["predicted"]}["zero"]
    assert zero == 131_216 * (4 + 4 + 4) * 15 / 16
    assert len(measured["seconds"]) == 2 and measured["reserved"] is None
    assert "dp=1 ring=2 ulysses=8" in text and "of the ceiling" in text and "predicted, apart" in text


def test_the_flops_are_a_ranks_share(tmp_path: Path) -> None:
    """All of the sample's over cp; the ceiling's time is that of its own calls."""
    result, _ = twin(tmp_path, "--world", "16", "--cp", "8", "--recompute", "all")
    model = ModelConfig(
        num_attention_heads=8,
        attention_head_dim=8,
        ffn_dim=96,
        num_layers=2,
        text_dim=24,
        freq_dim=16,
        in_channels=4,
        out_channels=4,
    )
    assert result["flops"] == step_flops(model, tokens=72, text=16).total / 8
    seconds = {rate["name"]: rate["seconds"] for rate in result["rates"]}
    block = 0.0
    for count, dims in ((6, "9 x 64 x 64"), (2, "16 x 64 x 64"), (1, "9 x 64 x 96"), (1, "9 x 96 x 64")):
        parts = [seconds[f"linear {dims}, {part}"] for part in ("forward", "input", "weight")]
        block += count * (sum(parts) + parts[0])
    for name in ("72 x 72 x 1 heads of 8", "9 x 16 x 8 heads of 8"):
        block += 2 * seconds[f"attention {name}, forward"] + seconds[f"attention {name}, backward"]
    assert result["ceiling_seconds"] == pytest.approx(2 * block)


def test_a_kernel_that_is_not_here() -> None:
    done = run("gpu_twin.py", *TINY, "--kernel", "cudnn")
    assert done.returncode == 2 and "attention.kernel=cudnn: it needs a GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_attention_bench() -> None:
    done = run("gpu_attention.py", "--device", "cpu", "--tokens", "tiny", "--heads", "2", "--head-dim", "16")
    assert done.returncode == 0, done.stderr
    assert "left out: attention.kernel=cudnn: it needs a GPU" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("aten")]
    assert len(lines) == 2 and "goal 98%" in lines[0] and "goal 95%" in lines[1]


@pytest.mark.parametrize("tool", ["gpu_twin.py", "gpu_attention.py"])
def test_without_a_gpu(tool: str) -> None:
    done = run(tool)
    assert done.returncode == 2 and "no GPU is visible: --device cpu" in done.stderr
