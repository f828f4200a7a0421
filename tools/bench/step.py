"""The price of a training step: ours against two hand-written loops.

    python tools/bench/step.py [RECIPE] [--stage 1 2 3] [--repeats N] [--steps-a-repeat M] [--json OUT] [--set K=V]

On one rank, in one process, for each ZeRO stage, the loops of contestants.py: ours, ours without EMA, DeepSpeed's
engine by hand (twice), torch by hand. First all run CHECKED steps with the same keyed noise, and their losses and
gradient norms must agree: they do the same work. While they are timed, ours goes on with keyed noise and the
hand-written loops draw theirs from one generator; the difference is printed apart.

The goal is no_ema / bare <= 1.02, by CPU time and paired repeats (interleave.py). On a busy machine set
OMP_NUM_THREADS=1: with as many threads as cores, OpenMP's threads wait for whichever was taken off its core.
"""

import argparse
import datetime
import json
import math
import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import deepspeed
import torch
from contestants import Contestant, HeldBatches, Noise, build_contestants, build_model
from interleave import CLOCKS, Timing, interleave, ratio

from framework.diffusion.flow import Flow
from framework.environment import Environment, rank_variables
from framework.parallel.mesh import Mesh
from framework.parallel.zero.deepspeed import quiet
from framework.programs import build
from framework.recipe import Recipe, bucket_tokens, load_recipe, resolve_auto

ROOT = Path(__file__).parents[2]
GOAL, CHECKED, TOLERANCE, WARMUP = 1.02, 8, 1e-4, 3
PAIRS = (
    ("no_ema", "bare"),
    ("again", "bare"),
    ("ours", "bare"),
    ("ours", "no_ema"),
    ("bare", "plain"),
    ("ours", "plain"),
)


def check(contestants: dict[str, Contestant]) -> float:
    """Run the first steps of all; the largest relative difference of a loss or gradient norm from plain torch's."""
    rows = {name: [contestant() for _ in range(CHECKED)] for name, contestant in contestants.items()}
    worst = 0.0
    for name, row in rows.items():
        for step, (got, wanted) in enumerate(zip(row, rows["plain"], strict=True)):
            for what, a, b in (("loss", float(got[0]), float(wanted[0])), ("gradient norm", got[1], wanted[1])):
                worst = max(worst, abs(a - b) / abs(b))
                assert abs(a - b) <= TOLERANCE * abs(b), f"step {step}, {what}: {name} has {a}, plain torch {b}"
    return worst


def time_noise(held: HeldBatches, flow: Flow, noise: Noise) -> dict[str, Timing]:
    """What a step's noise costs: keyed (ours) and from one generator (by hand)."""

    def keyed() -> None:
        for batch in held.by_step[0]:
            flow.noise(batch, step=0)

    def generator() -> None:
        for batch in held.by_step[0]:
            noise(batch, 0)

    return interleave({"keyed": keyed, "generator": generator}, num_repeats=16, num_steps=10, warmup=3)


@dataclass(frozen=True)
class Result:
    """One stage."""

    stage: int
    parameters: int
    tokens: int
    worst_difference: float
    timings: dict[str, Timing]
    noise: dict[str, Timing]


def measure(recipe: Recipe, mesh: Mesh, *, num_repeats: int, num_steps: int) -> Result:
    """Build, check and time the contestants of one stage."""
    held, noise = HeldBatches(recipe), Noise(recipe)
    contestants = build_contestants(recipe, mesh, held, noise)
    worst = check(contestants)
    noise.keyed = False
    steps = {name: cast(Callable[[], None], contestant) for name, contestant in contestants.items()}
    timings = interleave(steps, num_repeats=num_repeats, num_steps=num_steps, warmup=WARMUP)
    for contestant in contestants.values():
        contestant.close()
    tokens = sum(n * bucket_tokens(recipe, i).num_tokens for i, n in enumerate(held.work.counts))
    parameters = sum(p.numel() for p in build_model(recipe).parameters())
    return Result(
        recipe.zero.stage, parameters, tokens, worst, timings, time_noise(held, build.build_flow(recipe), noise)
    )


def lines(result: Result) -> Iterator[str]:
    """A stage as text."""
    yield (
        f"\nZeRO stage {result.stage}: {result.parameters} parameters, {result.tokens} tokens a step; losses and "
        f"gradient norms of {CHECKED} steps agree within {result.worst_difference:.1e}"
    )
    yield f"{'ms a step':16}" + "".join(f"{clock + ' ' + what:>14}" for clock in CLOCKS for what in ("median", "min"))
    for name, timing in result.timings.items():
        numbers = (1e3 * n for clock in CLOCKS for n in (timing.median(clock), timing.minimum(clock)))
        yield f"{name:16}" + "".join(f"{number:14.2f}" for number in numbers)
    yield f"{'ratio':16}{'clock':>6}{'medians':>10}{'mins':>10}{'paired':>10}   quartiles of the pairs"
    for above, below in PAIRS:
        for clock in CLOCKS:
            r = ratio(result.timings[above], result.timings[below], clock)
            yield (
                f"{above + ' / ' + below:16}{clock:>6}{r.medians:10.4f}{r.minima:10.4f}{r.paired:10.4f}"
                f"   {r.low:.4f} to {r.high:.4f}"
            )
    keyed, generator = (1e3 * result.noise[name].median("wall") for name in ("keyed", "generator"))
    yield f"noise and timesteps: keyed {keyed:.3f} ms a step, from one generator {generator:.3f} ms"
    goal, same = (ratio(result.timings[name], result.timings["bare"], "cpu") for name in ("no_ema", "again"))
    # A median's standard error is 1.25 sigma / sqrt(n), and the quartiles of a normal lie 1.35 sigma apart.
    error = 2 * 1.25 / 1.35 * (goal.high - goal.low) / math.sqrt(len(result.timings["bare"].cpu))
    margin = max(error, abs(same.paired - 1))
    verdict = (
        "met"
        if goal.paired + margin <= GOAL
        else "MISSED"
        if goal.paired - margin > GOAL
        else "not decided: too noisy, or too few repeats"
    )
    yield f"goal: no_ema / bare <= {GOAL} (cpu, paired): {goal.paired:.4f} +- {margin:.4f}, {verdict}"


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = " (framework/ changed)" if git("status", "--porcelain", "framework") else ""
    return {
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def join() -> Environment:
    """Be the only rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    os.environ.update(rank_variables(rank=0, world_size=1, port=port, failures=Path(tempfile.gettempdir())))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return Environment(0, 1, 0, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "recipes/overfit.yaml")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe keys")
    parser.add_argument("--stage", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=60, help="blocks of each contestant; at least 7 for a claim")
    parser.add_argument("--steps-a-repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    overrides = ["mesh.dp=1", "precision.parameters=float32", *given.set]
    recipes = [resolve_auto(load_recipe(given.recipe, [*overrides, f"zero.stage={s}"])) for s in given.stage]
    env = join()
    quiet()
    mesh = build.open_mesh(recipes[0], env)
    about = machine()
    print(f"{given.recipe}: " + ", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{given.repeats} repeats of {given.steps_a_repeat} steps, interleaved, one rank, float32")
    results = []
    for recipe in recipes:
        results.append(measure(recipe, mesh, num_repeats=given.repeats, num_steps=given.steps_a_repeat))
        print("\n".join(lines(results[-1])), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
