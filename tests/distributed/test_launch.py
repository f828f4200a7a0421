"""The launcher: one command starts the ranks, stops them, resumes them, and says why once when one fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_recipe

from framework.launch.local import free_port

COMMAND = [sys.executable, "-m", "framework.cli", "train"]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def start(recipe: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(recipe), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN | {"OMP_NUM_THREADS": "1"},
    )


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while step not in steps(run):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stop_resume_finish(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=2", "train.steps=2000", "checkpoint.every=1000"])
    run = tmp_path / "run"
    process = start(recipe)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "saved; the same command resumes" in out
    assert err == ""
    reached = steps(run)
    verdict = json.loads((run / "attempts/0000/verdict.json").read_text())
    assert verdict == {"outcome": "stopped", "step": reached[-1], "signal": signal.SIGTERM}
    told = json.loads((run / "data.json").read_text())
    assert (told["ranks"], told["steps"], told["simulated_steps"], told["streams"][0]["samples"]) == (2, 2000, 200, 8)

    total = reached[-1] + 2
    stored = run / "recipe.yaml"
    stored.write_text(stored.read_text().replace("steps: 2000\n", f"steps: {total}\n"))
    process = start(recipe)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert f"resumes after step {reached[-1]}" in out
    assert steps(run) == list(range(1, total + 1)), "no step is lost or written twice"

    begin = time.monotonic()
    process = start(recipe)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "is finished" in out
    assert not (run / "attempts/0002").exists()
    assert time.monotonic() - begin < 9, "a finished run starts no rank"


@pytest.mark.parametrize("mesh", ["mesh.dp=2", "mesh.ring=2", "mesh.tp=2"])
def test_a_killed_rank_ends_the_others(tiny_shards: Path, tmp_path: Path, mesh: str) -> None:
    recipe = write_recipe(tmp_path, tiny_shards, [mesh, "train.steps=20000", "checkpoint.every=10000"])
    process = start(recipe)
    wait_for_step(tmp_path / "run", 2, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    victim = int(children.split()[-1])
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert re.fullmatch(r"error: rank [01] was killed by SIGKILL; the same command resumes\n", err)
    assert time.monotonic() - begin < 3 * 30, "the others end within 30 s"


def test_ranks_with_other_recipes_are_named(tiny_shards: Path, tmp_path: Path) -> None:
    """Each rank of a job script has its own command line; what differs is told by all before any group is made."""
    recipe = write_recipe(tmp_path, tiny_shards, ["train.steps=3", "mesh.dp=auto"])
    words = [[], ["optimizer.lr=3e-3", "seed=7"], ["mesh.tp=2", "mesh.dp=2"], []]
    words[3], place = words[2], {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [*COMMAND, str(recipe), *extra],
            stderr=subprocess.PIPE,
            text=True,
            env=CLEAN | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank, extra in enumerate(words)
    ]
    for process in started:
        _, err = process.communicate(timeout=90)
        assert process.returncode == 2 and len(err.splitlines()) == 1
        assert "rank 1 in optimizer.lr, seed; rank 2 in mesh.dp, mesh.tp; rank 3 in mesh.dp, mesh.tp" in err
    assert not (tmp_path / "run").exists()


def test_a_run_in_use_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_shards, ["train.steps=20000", "checkpoint.every=10000"])
    first = start(recipe)
    wait_for_step(tmp_path / "run", 2, first)
    _, err = start(recipe).communicate(timeout=90)
    assert re.search(r"the run .* is in use by process \d+ on ", err) and len(err.splitlines()) == 1
    assert not (tmp_path / "run/attempts/0001").exists()
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGINT and "saved; the same command resumes" in out


def test_stacks_and_a_stop_while_saving(tiny_shards: Path, tmp_path: Path) -> None:
    """Every step is saved, so a save is under way when the signal comes; both are passed on to the ranks."""
    recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=2", "train.steps=20000", "checkpoint.every=1"])
    run = tmp_path / "run"
    process = start(recipe)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGUSR1)
    wait_for_step(run, max(steps(run)) + 2, process)
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGUSR2, "")
    assert "saved; the same command resumes" in out
    verdict = json.loads((run / "attempts/0000/verdict.json").read_text())
    assert (verdict["outcome"], verdict["signal"]) == ("stopped", signal.SIGUSR2)
    newest = max((run / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{verdict['step']:08}-0000" and (newest / "manifest.json").is_file()
    for rank in range(2):
        stacks = (run / f"attempts/0000/stacks/rank-{rank:05}.txt").read_text()
        assert "train.py" in stacks and stacks.count("Thread 0x") > 2, "of all threads"


def test_a_full_disk_leaves_the_last_checkpoint(tiny_shards: Path, tmp_path: Path) -> None:
    """A file system of 1.5 MB takes one checkpoint of 0.3 MB and no second one beside the ballast."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=2", "train.steps=120", "checkpoint.every=60"])
        process = start(recipe, f"run={disk / 'run'}")
        wait_for_step(disk / "run", 62, process)
        (disk / "ballast").write_bytes(b"x" * free_bytes(disk))
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1, (out, err)
        assert len(err.strip().splitlines()) == 1
        assert "No space left on device" in err  # of the metrics or of the checkpoint, whichever came first
        assert [p.name for p in (disk / "run/checkpoints").glob("step-*")] == ["step-00000060-0000"]
        (disk / "ballast").unlink()
        process = start(recipe, f"run={disk / 'run'}")
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        assert "resumes after step 60" in out
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def free_bytes(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def test_torchrun_starts_it_too(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=auto", "train.steps=2"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    result = subprocess.run(
        [*torchrun, "framework.cli", "train", str(recipe)], capture_output=True, text=True, env=CLEAN, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "dp=2" in result.stdout
    assert steps(tmp_path / "run") == [1, 2]
