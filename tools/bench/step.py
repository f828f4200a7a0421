"""The price of a training step: ours against hand-written loops, on one rank and on a mesh.

    python tools/bench/step.py [RECIPE] [--stage 1 2 3] [--repeats N] [--steps-a-repeat M] [--json OUT] [--set K=V]
    python tools/bench/step.py [RECIPE] --mesh dp=2 tp=2 ulysses=2,tp=2 [...]

Without --mesh: on one rank, in one process, for each ZeRO stage, the loops of contestants.py: ours, ours without EMA,
DeepSpeed's engine by hand (twice), torch by hand. With it: for each mesh, whose ranks are started here, those of
peers.py: ours with either engine, a torchtitan-style loop, accelerate with diffusers' transformer (which needs
`pip install 'cuboid[bench]'`).

First all run CHECKED steps with the same keyed noise, and their losses and gradient norms must agree with torch by hand
in one process: they do the same work. While they are timed, ours goes on with keyed noise and the others draw theirs
from one generator; the difference is printed apart.

The goals: no_ema / bare <= 1.02 on one rank, by CPU time and paired repeats (interleave.py); ours faster than every
peer on each mesh. On a busy machine set OMP_NUM_THREADS=1: with as many threads as cores, OpenMP's threads wait for
whichever was taken off its core.
"""

import argparse
import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from contestants import Contestant, build_contestants, build_model
from held import HeldBatches, Noise
from interleave import Timing, interleave, ratio, ratio_lines, time_block, time_lines
from machine import ROOT, machine
from peers import build_alone, build_on_mesh
from ranks import Together, run_ranks

from framework.data.schedule import Place
from framework.diffusion.flow import Flow
from framework.environment import Environment, rank_variables, read_environment
from framework.parallel.collectives import gather_objects
from framework.parallel.config import MeshShape
from framework.parallel.mesh import Mesh
from framework.parallel.zero.deepspeed import quiet
from framework.programs import build
from framework.recipe import Recipe, bucket_tokens, load_recipe, resolve_auto

GOAL, CHECKED, TOLERANCE, WARMUP = 1.02, 8, 1e-4, 3
OURS = ("ours", "no_ema", "ours_fsdp2")
PAIRS = (
    ("no_ema", "bare"),
    ("again", "bare"),
    ("ours", "bare"),
    ("ours", "no_ema"),
    ("bare", "plain"),
    ("ours", "plain"),
)


def check(contestants: dict[str, Contestant], mesh: Mesh, alone: Contestant) -> float:
    """Run the first steps of all; the largest relative difference of a loss or gradient norm from one process."""
    wanted = [(float(loss), norm) for loss, norm in (alone() for _ in range(CHECKED))]
    worst = 0.0
    for name, contestant in contestants.items():
        for step, expected in enumerate(wanted):
            loss, norm = contestant()
            got = sum(gather_objects(float(loss), mesh.world)), norm
            for what, a, b in zip(("loss", "gradient norm"), got, expected, strict=True):
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
    """One stage on one mesh. left_out: contestants that can't run here, and why."""

    mesh: MeshShape
    stage: int
    parameters: int
    tokens: int
    worst_difference: float
    left_out: list[str]
    timings: dict[str, Timing]
    noise: dict[str, Timing]


def measure(recipe: Recipe, mesh: Mesh, *, num_repeats: int, num_steps: int) -> Result:
    """Build, check and time the contestants of one stage. A collective."""
    held, noise = (
        HeldBatches(recipe, [Place(0, 1)] * len(recipe.data.buckets), masked=mesh.world.size == 1),
        Noise(recipe),
    )
    left_out: list[str] = []
    if mesh.world.size == 1:
        contestants = build_contestants(recipe, mesh, held, noise)
    else:
        contestants, left_out = build_on_mesh(recipe, mesh, noise)
    worst = check(contestants, mesh, build_alone(recipe, held, noise))
    noise.keyed = False
    timings = interleave(
        {name: cast(Callable[[], None], contestant) for name, contestant in contestants.items()},
        num_repeats=num_repeats,
        num_steps=num_steps,
        warmup=WARMUP,
        timer=time_block if mesh.world.size == 1 else Together(mesh.world),
    )
    for contestant in contestants.values():
        contestant.close()
    return Result(
        mesh.shape,
        recipe.zero.stage,
        sum(p.numel() for p in build_model(recipe).parameters()),
        sum(n * bucket_tokens(recipe, i).num_tokens for i, n in enumerate(held.work.counts)),
        worst,
        left_out,
        timings,
        time_noise(held, build.build_flow(recipe), noise),
    )


def lines(result: Result) -> Iterator[str]:
    """A stage as text."""
    yield (
        f"\n{result.mesh}, ZeRO stage {result.stage}: {result.parameters} parameters, {result.tokens} tokens a step; "
        f"losses and gradient norms of {CHECKED} steps agree with one process within {result.worst_difference:.1e}"
    )
    yield from result.left_out
    yield from time_lines(result.timings, "ms a step")
    peers = [name for name in result.timings if name not in OURS]
    alone = result.mesh.world_size == 1
    yield from ratio_lines(
        result.timings,
        PAIRS if alone else [(peer, mine) for mine in OURS for peer in peers] + [("no_ema", "ours_fsdp2")],
    )
    keyed, generator = (1e3 * result.noise[name].median("wall") for name in ("keyed", "generator"))
    yield f"noise and timesteps: keyed {keyed:.3f} ms a step, from one generator {generator:.3f} ms"
    if alone:
        yield goal(result)


def goal(result: Result) -> str:
    """Whether the goal of one rank is met."""
    ours, same = (ratio(result.timings[name], result.timings["bare"], "cpu") for name in ("no_ema", "again"))
    # A median's standard error is 1.25 sigma / sqrt(n), and the quartiles of a normal lie 1.35 sigma apart.
    error = 2 * 1.25 / 1.35 * (ours.high - ours.low) / math.sqrt(len(result.timings["bare"].cpu))
    margin = max(error, abs(same.paired - 1))
    verdict = (
        "met"
        if ours.paired + margin <= GOAL
        else "MISSED"
        if ours.paired - margin > GOAL
        else "not decided: too noisy, or too few repeats"
    )
    return f"goal: no_ema / bare <= {GOAL} (cpu, paired): {ours.paired:.4f} +- {margin:.4f}, {verdict}"


def join() -> Environment:
    """Be the only rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    os.environ.update(rank_variables(rank=0, world_size=1, port=port, failures=Path(tempfile.gettempdir())))
    return Environment(0, 1, 0, None)


def run_rank(env: Environment, given: argparse.Namespace) -> None:
    """A rank: measure every stage, and as the first one print and write."""
    degrees = given.mesh[0].split(",") if given.mesh else []
    overrides = ["mesh.dp=1", *(f"mesh.{degree}" for degree in degrees), "precision.parameters=float32", *given.set]
    recipes = [resolve_auto(load_recipe(given.recipe, [*overrides, f"zero.stage={s}"])) for s in given.stage]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    quiet()
    mesh = build.open_mesh(recipes[0], env)
    about, results = machine("deepspeed", "diffusers"), []
    if env.is_first:
        print(f"\n{given.recipe}: " + ", ".join(f"{name} {value}" for name, value in about.items()))
        print(f"{given.repeats} repeats of {given.steps_a_repeat} steps, interleaved, {env.world_size} ranks, float32")
    for recipe in recipes:
        results.append(measure(recipe, mesh, num_repeats=given.repeats, num_steps=given.steps_a_repeat))
        if env.is_first:
            print("\n".join(lines(results[-1])), flush=True)
    if given.json and env.is_first:
        given.json.write_text(json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1))
    torch.distributed.destroy_process_group()


def start(given: argparse.Namespace) -> None:
    """Run each mesh on ranks of its own, and put together what they wrote."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        for degrees in given.mesh:
            num_ranks = math.prod(int(degree.partition("=")[2]) for degree in degrees.split(","))
            run_ranks([*sys.argv[1:], "--mesh", degrees, "--json", str(part)], num_ranks)
            parts.append(json.loads(part.read_text()))
    if given.json:
        results = [result for part in parts for result in part["results"]]
        given.json.write_text(json.dumps({"machine": parts[0]["machine"], "results": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "recipes/overfit.yaml")
    parser.add_argument("--mesh", nargs="+", metavar="DEGREES", help="as in dp=2 or ulysses=2,tp=2")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe keys")
    parser.add_argument("--stage", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=60, help="blocks of each contestant; at least 7 for a claim")
    parser.add_argument("--steps-a-repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    env = read_environment()
    if env is None and given.mesh:
        start(given)
    else:
        run_rank(env or join(), given)


if __name__ == "__main__":
    main()
