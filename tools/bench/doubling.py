"""What scaled positions and the scaled shift are worth just after clips become longer.

    python tools/bench/doubling.py [--times 2] [--steps 600] [--seeds 4] [--video FILE] [--json FILE]

A small model is trained on clips of 16 latent frames, then given clips of `times` as many, in a hand-over as between
two stages of a run: weights and moments go on. What `cuboid scale` would change is taken from it; batch and learning
rate change in every arm, positions and shift in those that say so:

    as is    neither                    positions    model positions by `rope`
    shift    flow.shift by sqrt(N'/N)   both         both

The losses are those of a run's validation, on clips that weren't trained on. Validation takes its noise levels from the
recipe's own distribution, so an arm with another shift would be measured at other levels, where the loss is another
one. Therefore every arm is measured at the same levels with the same noise, twice: at the quantiles of the old shift's
distribution, and at those of the new one's. A verdict compares within one of them; `own levels` (each arm at those of
its recipe) stands apart and proves nothing. All arms see the same clips in the same order.

Right at the hand-over (0 steps) the shift can't matter yet, as it changes what is trained and not the model. There the
weights are measured with every law of positions, and with almost none in time (interpolation by 1e6, `no time`): this
says how much the model uses the positions of frames at all.

Data: tiles of 32x32 pixels of one film at three sizes, the half of them that moves most. Every fifth tile is held out
in all of its time, so held-out clips are other places of the same moments. Latents are the DCT tokenizer's, one for
each frame (as it codes a first frame), so that 16 frames are 16 positions and twice as many are far beyond them.

Measured on two CPU cores, x2, change of the loss at the hand-over by riflex, which `cuboid scale` chooses, at the old
levels: after 600 steps on the short clips -1.6, -1.7 and -0.3 % (3 seeds), after 1,200 steps -2.7 and -1.7 % (2 seeds);
by interpolation -2.0, -2.0, -0.5 % and -3.3, -2.3 %. Scaled positions stay below at every later mark, with either
shift. What the shift does by itself is within the spread of the seeds, up or down, so that 100 steps later both
together aren't below `as is` in every seed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import interpolate

from framework.data.buckets import streams_of
from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import LATENT_SCHEMA, Caption, LatentSample
from framework.diffusion.config import FlowConfig
from framework.ema import Ema
from framework.environment import Environment, be_first_rank
from framework.models.config import RopeConfig
from framework.parallel.mesh import Mesh, close_mesh
from framework.parallel.zero.engine import Engine
from framework.plan.scale import ScaleRequest, apply_to, changes_for
from framework.programs import build
from framework.programs.observe import build_validation
from framework.programs.parts import build_parts
from framework.programs.train import optimizer_step
from framework.recipe import Recipe, build_recipe, to_tree
from framework.tokenizer.config import DctConfig
from framework.tokenizer.dct import DctTokenizer, coefficient_order

FRAMES, TILE, FPS = 16, 32, 25.0
WIDTHS = (320, 640, 1280)  # of the film's pictures, in pixels
DCT = DctConfig(coefficients=32, scale=0.33, decay=0.5)
KEPT = [i for i, (_, kt, _, _) in enumerate(coefficient_order()[: DCT.coefficients]) if kt == 0]
VERSION = "dct-of-frames"
AFTER = (0, 10, 50, 100)
ARMS = ("as is", "positions", "shift", "both")
FIRST = Environment(rank=0, world_size=1, local_rank=0, failures=None)
State = dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """One validation. times: how much longer the clips became. arm, steps: the arm, and steps since the hand-over.
    old, new: the loss at the levels of the old and of the new shift.
    """

    seed: int
    times: int
    arm: str
    steps: int
    old: float
    new: float


def tiles_of(film: np.ndarray) -> np.ndarray:
    """`N T 32 32 3` uint8: every tile of the film at every size, the half of them that moves most, in reading order.
    film: `T H W 3` uint8.
    """
    found = []
    for width in WIDTHS:
        height = round(film.shape[1] * width / film.shape[2])
        rows, columns = height // TILE, width // TILE
        for row in range(rows):
            # One row of tiles at a time: the film as floats is a gigabyte.
            top, bottom = (round(edge * TILE * film.shape[1] / height) for edge in (row, row + 1))
            strip = torch.from_numpy(film[:, top:bottom]).permute(0, 3, 1, 2).float()
            small = interpolate(strip, size=(TILE, columns * TILE), mode="bilinear", antialias=True)
            pixels = small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
            found += [pixels[:, :, TILE * c : TILE * (c + 1)] for c in range(columns)]
    tiles = np.stack(found)
    moving = np.array([np.abs(np.diff(tile.astype(np.int16), axis=0)).mean() for tile in tiles])
    return tiles[moving >= np.median(moving)]


def write_shards(video: Path, folder: Path, durations: Sequence[int]) -> None:
    """Latents of clips of so many frames each, `folder/16/trained`, `folder/16/held-out` and so on."""
    with av.open(str(video)) as container:
        film = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    tokenizer = DctTokenizer(DCT)
    latents = []
    for tile in tiles_of(film):
        frames_bcthw = torch.from_numpy(tile).permute(0, 3, 1, 2).unsqueeze(2).float() / 127.5 - 1
        latents.append(tokenizer.encode(frames_bcthw)[:, KEPT, 0].transpose(0, 1).contiguous().numpy())
    for frames in durations:
        for name in ("trained", "held-out"):
            out = folder / str(frames) / name
            with ShardWriter(
                out, schema=LATENT_SCHEMA, tokenizer_version=VERSION, part_size=256, shard_bytes=1 << 24
            ) as writer:
                for number, whole in enumerate(latents):
                    if (number % 5 == 0) != (name == "held-out"):
                        continue
                    for start in range(0, whole.shape[1] - frames + 1, frames):
                        info = SampleInfo(f"tile{number}@{start}", frames, TILE, TILE, FPS)
                        sample = LatentSample(info, whole[:, start : start + frames], (Caption("a film"),))
                        writer.write(info.uid, "made", [sample])
                writer.finish()


def streams_in(folder: Path, frames: int) -> dict[str, dict[str, list[Any]]]:
    """Where the clips of a duration are, as keys of a recipe."""
    return {
        "data": {"streams": [{"path": str(folder / str(frames) / "trained")}]},
        "validation": {"shards": [str(folder / str(frames) / "held-out")]},
    }


def short_recipe(folder: Path, seed: int, steps: int) -> Recipe:
    """Of the clips of 16 frames."""
    channels = len(KEPT)
    tokenizer = {"time": 1, "height": 8, "width": 8, "causal": False, "channels": channels, "version": VERSION}
    where = streams_in(folder, FRAMES)
    return build_recipe(
        {
            "seed": seed,
            "hardware": {"name": "cpu"},
            "mesh": {"dp": 1},
            "zero": {"engine": "fsdp2", "stage": 2},
            "tokenizer": {"name": "latents", "latents": tokenizer},
            "text": {"name": "bytes", "bytes": {"max_length": 8}},
            "model": {
                "in_channels": channels,
                "out_channels": channels,
                "text_dim": 256,
                "num_layers": 3,
                "num_attention_heads": 2,
                "attention_head_dim": 48,
                "ffn_dim": 288,
            },
            "data": {
                **where["data"],
                "buckets": [{"frames": FRAMES, "height": TILE, "width": TILE, "fps": FPS}],
                "global_batch": 16,
                "micro_batch": 16,
            },
            "flow": {"timesteps": {"name": "uniform", "stratified": True}, "shift": {"fixed": {"value": 4.0}}},
            "optimizer": {"lr": 2e-3, "betas": [0.9, 0.99], "weight_decay": 0.0, "warmup": 30},
            "train": {"steps": steps},
            "validation": {"every": 1, "samples": 32, "sigmas": 6, **where["validation"]},
        }
    )


def longer_recipe(short: Recipe, folder: Path, times: int, arm: str) -> Recipe:
    """What `cuboid scale` makes of the short one, with or without its positions and its shift."""
    left_out = {"as is": ("rope", "flow."), "positions": ("flow.",), "shift": ("rope",), "both": ()}[arm]
    changes = [
        change
        for change in changes_for(short, ScaleRequest(seconds=times * FRAMES / FPS, num_gpus=1))
        if not change.key.startswith(("optimizer.warmup", *left_out))
    ]
    tree = apply_to(to_tree(short), changes)
    where = streams_in(folder, times * FRAMES)
    tree["data"] |= where["data"]
    tree["validation"] |= where["validation"]
    tree["optimizer"] |= {"warmup": 0}
    return build_recipe(tree)


class Trained:
    """A model in training under a recipe. state: what it begins with, None for the recipe's initial weights."""

    def __init__(self, recipe: Recipe, mesh: Mesh, state: State | None = None) -> None:
        self.recipe, self._mesh = build.settle(recipe, FIRST), mesh
        model, shards = build.build_model(self.recipe, mesh)
        self.engine: Engine = build.build_engine(self.recipe, model, shards, mesh)
        if state is None:
            build.initialise(self.engine.fragments(), self.recipe)
        for fragment in self.engine.fragments() if state else ():
            fragment.copy_from(state[fragment.shard.name, fragment.state].view(fragment.shard.global_shape))
        self.engine.refresh(updates=recipe.train.steps if state else 0)
        self._streams, self._encoders = streams_of(self.recipe), build.Encoders(self.recipe)

    def state(self) -> State:
        """A copy of the weights and moments."""
        return {(f.shard.name, f.state): f.flat.detach().clone() for f in self.engine.fragments()}

    def loss(self, flow: FlowConfig) -> float:
        """The validation loss at the levels of an objective."""
        measured = replace(self.recipe, flow=flow)
        validation = build_validation(measured, self._mesh, build.build_flow(measured), self._encoders, self._streams)
        return validation.run(self.engine).loss

    def steps(self, marks: Sequence[int]) -> Iterator[int]:
        """Train; comes back after so many steps."""
        recipe = replace(self.recipe, train=replace(self.recipe.train, steps=max(1, *marks)))
        parts = build_parts(
            recipe, self._mesh, self.engine, streams=self._streams, ema=Ema([], recipe.ema), encoders=self._encoders
        )
        done = 0
        for mark in marks:
            while done < mark:
                optimizer_step(parts, parts.loader.next_work(), step=done)
                done += 1
            yield mark
        parts.loader.close()


def laws(times: int) -> dict[str, RopeConfig]:
    """Every way to scale positions, and one that leaves next to none of time."""
    return {
        "none": RopeConfig(),
        "riflex": RopeConfig("riflex", times, FRAMES),
        "ntk": RopeConfig("ntk", times),
        "interpolation": RopeConfig("interpolation", times),
        "no time": RopeConfig("interpolation", 1e6),
    }


def measure(folder: Path, seed: int, trained: int, times: int) -> list[Measured]:
    """Train a model, and hand it over to every arm. trained: steps on the short clips."""
    torch.set_num_threads(1)
    be_first_rank()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    short = short_recipe(folder, seed, trained)
    mesh = build.open_mesh(build.settle(short, FIRST), FIRST)
    first = Trained(short, mesh)
    found = []
    for steps in first.steps((0, trained)):
        loss = first.loss(short.flow)
        found.append(Measured(seed, 1, "trained", steps, loss, loss))
    state = first.state()
    first.engine.destroy()
    timeless = Trained(replace(short, rope=laws(1)["no time"]), mesh, state)
    loss = timeless.loss(short.flow)
    found.append(Measured(seed, 1, "no time", trained, loss, loss))
    timeless.engine.destroy()
    old, new = (longer_recipe(short, folder, times, arm).flow for arm in ("as is", "both"))

    def note(model: Trained, arm: str, steps: int) -> None:
        found.append(Measured(seed, times, arm, steps, model.loss(old), model.loss(new)))

    for law, rope in laws(times).items():
        model = Trained(replace(longer_recipe(short, folder, times, "as is"), rope=rope), mesh, state)
        note(model, f"law {law}", 0)
        model.engine.destroy()
    for arm in ARMS:
        model = Trained(longer_recipe(short, folder, times, arm), mesh, state)
        for steps in model.steps(AFTER):
            note(model, arm, steps)
        model.engine.destroy()
    close_mesh(mesh)
    return found


def values(found: Sequence[Measured], times: int, arm: str, steps: int, levels: str) -> list[float]:
    """The losses of all seeds, in their order."""
    kept = [m for m in found if (m.times, m.arm, m.steps) == (times, arm, steps)]
    return [getattr(m, levels) for m in sorted(kept, key=lambda m: m.seed)]


def row(name: str, losses: Sequence[float]) -> str:
    return f"  {name:<22} {median(losses):8.4f}    " + " ".join(f"{loss:.4f}" for loss in losses)


def table(found: Sequence[Measured], times: int) -> list[str]:
    """The losses of one factor: medians, and every seed's."""
    lines = [f"{FRAMES} -> {times * FRAMES} frames: median, every seed"]
    for levels in ("old", "new"):
        lines.append(f" at the {levels} shift's levels, at the hand-over")
        lines += [row(law, values(found, times, f"law {law}", 0, levels)) for law in laws(times)]
        for steps in AFTER:
            lines.append(f" at the {levels} shift's levels, {steps} steps after it")
            lines += [row(arm, values(found, times, arm, steps, levels)) for arm in ARMS]
    lines.append(" own levels, which proves nothing: as is at the old ones, both at the new ones")
    for steps in AFTER:
        for arm, levels in (("as is", "old"), ("both", "new")):
            lines.append(row(f"{steps} steps, {arm}", values(found, times, arm, steps, levels)))
    return lines


def against(found: Sequence[Measured], times: int, steps: int, levels: str, arms: tuple[str, str]) -> tuple[str, bool]:
    """The first arm's losses against the second's, seed by seed, in words; whether all are below."""
    own, other = (values(found, times, arm, steps, levels) for arm in arms)
    below = sum(one < two for one, two in zip(own, other, strict=True))
    change = median(one / two - 1 for one, two in zip(own, other, strict=True))
    return f"{change:+.2%} (below in {below} of {len(own)})", below == len(own)


def verdicts(found: Sequence[Measured], times: int) -> list[str]:
    """Each arm against `as is`, positions under the new shift as well, and whether the whole is below."""
    pairs = (("positions", "as is"), ("shift", "as is"), ("both", "as is"), ("both", "shift"))
    lines = [f"median change of the loss, x{times}: " + ", ".join(f"{one} / {two}" for one, two in pairs)]
    for steps in AFTER:
        for levels in ("old", "new"):
            words = (against(found, times, steps, levels, pair)[0] for pair in pairs)
            lines.append(f"  {steps:>3} steps, {levels} levels: " + ", ".join(words))
    for steps in AFTER:
        holds = all(against(found, times, steps, levels, ("both", "as is"))[1] for levels in ("old", "new"))
        said = "in every seed and at both levels" if holds else "NOT in every seed at both levels"
        lines.append(f"verdict, {steps} steps after the hand-over: scaled positions and shift are below as is {said}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asset = Path(__file__).parents[2] / "tests" / "assets" / "bigbuckbunny.mp4"
    parser.add_argument("--video", type=Path, default=asset)
    parser.add_argument("--times", type=int, default=2, help="frames after / before")
    parser.add_argument("--steps", type=int, default=600, help="of training on the short clips")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given, begin = parser.parse_args(), time.perf_counter()
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(given.video, folder, (FRAMES, given.times * FRAMES))
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(measure, folder, seed, given.steps, given.times) for seed in range(given.seeds)]
            for job in as_completed(jobs):
                found += job.result()
                print(f"seed {job.result()[0].seed} is done, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
                if given.json:
                    given.json.write_text(json.dumps([asdict(m) for m in found], indent=1))
    for steps in (0, given.steps):
        print(row(f"{FRAMES} frames, {steps} steps", values(found, 1, "trained", steps, "old")))
    print(row("the same, no time", values(found, 1, "no time", given.steps, "old")))
    print("\n".join([*table(found, given.times), *verdicts(found, given.times)]))


if __name__ == "__main__":
    main()
