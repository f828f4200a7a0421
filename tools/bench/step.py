"""The price of a training step: ours against two hand-written loops.

    python tools/bench/step.py [RECIPE] [KEY=VALUE ...] [--stage 1 2 3] [--repeats N] [--steps-a-repeat M] [--json OUT]

On one rank, in one process, for each ZeRO stage:

    ours      programs.train.optimizer_step as `cuboid train` runs it, EMA included; its batches come from a list
    no_ema    the same without the EMA's update, which the hand-written loops don't have either
    bare      DeepSpeed's engine driven by hand, with the same configuration
    plain     torch alone: backward, clip_grad_norm_, fused AdamW

All have the same model, initial weights, batches, micro-batches, loss, clipping, learning rates and AdamW. First they
run CHECKED steps with the same keyed noise, and their losses and gradient norms must agree: they do the same work. While
they are timed, ours goes on with keyed noise and the hand-written loops draw theirs from one generator; the difference
is printed apart. What a hand-written loop would compute once (positions) it computes once.

The goal is no_ema / bare <= 1.02. How it is timed: interleave.py. Shapes: see framework/batch.py.
"""

import argparse
import datetime
import json
import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast
from unittest.mock import patch

import deepspeed
import torch
import torch.nn.functional as F
from interleave import CLOCKS, Timing, interleave, ratio
from torch import Tensor, nn

from framework.batch import Batch, Condition
from framework.data.loader import Loader
from framework.data.schedule import MicroBatch, Schedule, Slot, Work, deal
from framework.diffusion.flow import NUM_TRAIN_TIMESTEPS, Flow
from framework.diffusion.timesteps import num_tokens, shift, shift_value
from framework.ema import Ema
from framework.environment import Environment, rank_variables
from framework.kernels.attention import build_attention
from framework.keys import key
from framework.models.dit import DiT
from framework.models.initialise import init_tensor
from framework.models.patchify import frame_index, patchify_input, patchify_output, token_positions
from framework.optim import adamw, learning_rate
from framework.parallel.mesh import Mesh
from framework.parallel.zero.deepspeed import deepspeed_config, quiet
from framework.programs import build
from framework.programs.train import Parts, optimizer_step
from framework.recipe import Recipe, bucket_tokens, load_recipe, resolve_auto
from framework.shapes import latent_shape
from framework.tokenizer.config import tokenizer_strides

ROOT = Path(__file__).parents[2]
GOAL, CHECKED, TOLERANCE, WARMUP, DISTINCT = 1.02, 8, 1e-4, 3, 4
PAIRS = (("no_ema", "bare"), ("ours", "bare"), ("ours", "no_ema"), ("bare", "plain"), ("ours", "plain"))

Step = Callable[[int], tuple[Tensor, float]]  # number of the step -> the step's mean loss, gradient norm
Draw = Callable[[Batch, int], tuple[Tensor, Tensor, Tensor]]  # batch, step -> x_sigma, target, timesteps


@dataclass
class Contestant:
    """A step, what frees its engine, the F.linear that it runs with, and how many steps it has done."""

    step: Step
    close: Callable[[], None]
    linear: Callable[..., Tensor]
    done: int = 0

    def __call__(self) -> tuple[Tensor, float]:
        # Building a stage-3 engine replaces torch's F.linear for the whole process, other models included.
        with patch.object(F, "linear", self.linear):
            result = self.step(self.done)
        self.done += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result


class HeldBatches:
    """The micro-batches of DISTINCT steps in memory, used in turn: in the place of the loader."""

    waited = 0.0

    def __init__(self, recipe: Recipe) -> None:
        generator, buckets = torch.Generator().manual_seed(0), recipe.data.buckets
        encoder, strides = build.build_encoders(recipe).text, tokenizer_strides(recipe.tokenizer)
        slots = [Slot(i, i % len(buckets), 0, i, f"clip{i}", f"clip{i}#0.0") for i in range(recipe.data.global_batch)]
        groups = [[slot for slot in slots if slot.bucket == b] for b in range(len(buckets))]
        micros = [
            micro
            for b, members in enumerate(groups)
            for micro in deal(b, members, dp=1, dp_index=0, size=recipe.data.micro_batch)
        ]
        self.work = Work(0, tuple(micros), tuple(len(members) for members in groups))
        self.latents = [latent_shape(bucket.clip, strides) for bucket in buckets]

        def batch(micro: MicroBatch) -> Batch:
            chosen, latent = [slot for slot in micro.slots if slot is not None], self.latents[micro.bucket]
            shape = (len(chosen), recipe.model.in_channels, latent.frames, latent.height, latent.width)
            text, mask = encoder.encode([f"A rabbit looks at clip {slot.uid}." for slot in chosen])
            device = build.this_device()
            return Batch(
                latents=torch.randn(shape, generator=generator).to(device),
                weights=torch.ones(len(chosen), device=device),
                condition=Condition(text.to(device), None if mask is None else mask.to(device)),
                uids=tuple(slot.uid for slot in chosen),
                draws=tuple(slot.draw for slot in chosen),
                positions=tuple(slot.position for slot in chosen),
                clip=buckets[micro.bucket].clip,
                latent=latent,
            )

        self.batches = [[batch(micro) for micro in micros] for _ in range(DISTINCT)]

    def step(self, work: Work) -> Iterator[Batch]:
        return iter(self.batches[work.step % DISTINCT])


class NoEma:
    """No average."""

    def update(self, *, step: int) -> None:
        pass


def build_ours(recipe: Recipe, mesh: Mesh, held: HeldBatches, *, with_ema: bool) -> Contestant:
    """The product's own step."""
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    engine.refresh(step=0)
    parts = Parts(
        recipe=recipe,
        mesh=mesh,
        engine=engine,
        ema=Ema(engine.fragments(), recipe.ema) if with_ema else cast(Ema, NoEma()),
        flow=build.build_flow(recipe),
        schedule=cast(Schedule, None),
        loader=cast(Loader, held),
        latents=held.latents,
        num_tokens=[bucket_tokens(recipe, index).num_tokens for index in range(len(held.latents))],
    )

    def step(number: int) -> tuple[Tensor, float]:
        work = replace(held.work, step=number)
        loss_sum, stats, _ = optimizer_step(parts, work)
        return loss_sum / parts.global_count(work), stats.grad_norm

    return Contestant(step, engine.destroy, F.linear)


class ByHand:
    """What both hand-written loops share: model, examples with their positions, and where the noise comes from."""

    def __init__(self, recipe: Recipe, held: HeldBatches, draw: Draw) -> None:
        self.recipe, self.draw = recipe, draw
        self.patch_size = recipe.model.patch_size
        self.model = build_model(recipe)
        self.optimizer = adamw(list(self.model.named_parameters()), recipe.optimizer)
        by_token = recipe.loss.weight == "per_token"
        sizes = [[b.latents.numel() if by_token else len(b.uids) for b in batches] for batches in held.batches]
        self.examples = [
            [(batch, *self.places(batch), size / sum(row)) for batch, size in zip(batches, row, strict=True)]
            for batches, row in zip(held.batches, sizes, strict=True)
        ]

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positions = token_positions(len(batch.uids), batch.latent, self.patch_size, batch.latents.device)
        return positions, frame_index(positions)

    def losses(self, step: int, model: nn.Module) -> Iterator[Tensor]:
        """Each micro-batch's part of the step's mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, step=step)
        for batch, positions, frames, share in self.examples[step % DISTINCT]:
            latents, target, timesteps = self.draw(batch, step)
            patches, text = patchify_input(latents, self.patch_size), batch.condition
            prediction = model(patches, positions, frames, timesteps, text.text, text_mask_bl=text.text_mask)
            yield F.mse_loss(prediction, patchify_output(target, self.patch_size)) * share


def build_model(recipe: Recipe) -> nn.Module:
    """The transformer with the initial weights that our engine gives it."""
    model = DiT(recipe.model, build_attention(recipe.attention))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=name))
            parameter.copy_(init_tensor(name, tuple(parameter.shape), generator, recipe.model))
    return model.to(build.this_device())


def build_bare(hand: ByHand) -> Contestant:
    """The loop on DeepSpeed's engine."""
    recipe = hand.recipe
    config = deepspeed_config(recipe.zero, recipe.precision, recipe.optimizer)
    engine, _, _, _ = deepspeed.initialize(model=hand.model, optimizer=hand.optimizer, config=config)

    def step(number: int) -> tuple[Tensor, float]:
        total, last = torch.zeros((), device=build.this_device()), len(hand.examples[0]) - 1
        for index, loss in enumerate(hand.losses(number, engine)):
            engine.set_gradient_accumulation_boundary(index == last)
            engine.backward(loss)
            total += loss.detach()
        engine.step()
        return total, float(engine.get_global_grad_norm())

    return Contestant(step, engine.destroy, F.linear)


def build_plain(hand: ByHand) -> Contestant:
    """The loop on torch."""
    parameters, clip = list(hand.model.parameters()), hand.recipe.optimizer.clip

    def step(number: int) -> tuple[Tensor, float]:
        total = torch.zeros((), device=build.this_device())
        for loss in hand.losses(number, hand.model):
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(parameters, clip if clip else float("inf"))
        hand.optimizer.step()
        hand.optimizer.zero_grad()
        return total, float(norm)

    return Contestant(step, lambda: None, F.linear)


class Noise:
    """The draw of the hand-written loops: the product's keyed one while they are checked, then one generator."""

    def __init__(self, recipe: Recipe) -> None:
        self.keyed = True
        self._flow, self._recipe = build.build_flow(recipe), recipe
        self._generator = torch.Generator(build.this_device()).manual_seed(0)

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.keyed:
            noised = self._flow.noise(batch, step=step)
            return noised.latents, noised.target, noised.timesteps
        latents, patch_size = batch.latents, self._recipe.model.patch_size
        eps = torch.randn(latents.shape, generator=self._generator, device=latents.device)
        u = torch.rand(len(latents), generator=self._generator, device=latents.device)
        k = shift_value(self._recipe.flow.shift, num_tokens(batch.latent, patch_size))
        sigma = k * u / (1 + (k - 1) * u)
        timesteps = (NUM_TRAIN_TIMESTEPS * sigma)[:, None].expand(-1, latents.shape[2] // patch_size[0])
        return torch.lerp(latents, eps, sigma.view(-1, 1, 1, 1, 1)), eps - latents, timesteps


def build_contestants(recipe: Recipe, mesh: Mesh, held: HeldBatches, noise: Noise) -> dict[str, Contestant]:
    """All four, each built with torch's own F.linear in place."""
    builders: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: build_ours(recipe, mesh, held, with_ema=True),
        "no_ema": lambda: build_ours(recipe, mesh, held, with_ema=False),
        "bare": lambda: build_bare(ByHand(recipe, held, noise)),
        "plain": lambda: build_plain(ByHand(recipe, held, noise)),
    }
    built = {}
    for name, builder in builders.items():
        with patch.object(F, "linear", F.linear):
            built[name] = builder()
    return built


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
        for batch in held.batches[0]:
            flow.noise(batch, step=0)

    def generator() -> None:
        for batch in held.batches[0]:
            noise(batch, 0)

    return interleave({"keyed": keyed, "generator": generator}, num_repeats=20, num_steps=20, warmup=3)


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
    goal = ratio(result.timings["no_ema"], result.timings["bare"], "cpu").paired
    yield f"goal: no_ema / bare <= {GOAL} (cpu, paired): {goal:.4f}, {'met' if goal <= GOAL else 'MISSED'}"


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "commit": subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown",
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
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--stage", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=24, help="blocks of each contestant; at least 7 for a claim")
    parser.add_argument("--steps-a-repeat", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    overrides = ["mesh.dp=1", "precision.parameters=float32", *given.overrides]
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
