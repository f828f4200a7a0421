"""Predicted against measured step time on meshes of up to 4 gloo ranks on this machine's cores.

    OMP_NUM_THREADS=1 python tools/bench/planned.py --repeats 7

The machine is calibrated first (`--hardware FILE` takes a calibration instead): microbenchmarks, and steps of a small
model with FSDP2 stage 2, dp 2 and Ulysses 2, which is none of the twelve meshes here. Then each of these is built,
warmed and timed once a repeat, in an order that changes (interleave.py), so that a slow minute slows all of them; what
a mesh measured is the median of its repeats' medians. The claim:

    mean |predicted - measured| / measured  <=  10 %, or twice the spread of the repeats, where that is more

spread: the mean over meshes of the repeats' interquartile range / (2 median). What `cuboid plan --search` puts first
for so many ranks is measured among them, and counted apart:

    the search's pick / the best of all that were measured  <=  1.15
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from interleave import orders
from machine import machine
from ranks import run_ranks

from framework.data.index import SampleInfo
from framework.data.shard_writer import ShardWriter
from framework.data.shards import LATENT_SCHEMA, Caption, LatentSample
from framework.environment import read_environment
from framework.launch.calibrate import calibrate
from framework.plan.hardware import load_hardware
from framework.recipe import load_recipe
from framework.shapes import ClipShape, latent_shape
from framework.tokenizer.config import DctConfig, TokenizerConfig, tokenizer_strides, tokenizer_version

CLIP = ClipShape(17, 128, 128)  # 5 x 8 x 8 = 320 tokens
COEFFICIENTS = 8
GOAL = 0.1
BEHIND = 0.15
PICK = "the search's"
MESHES = (
    ("dp=4", ("mesh.dp=4",)),
    ("dp=4 stage 3", ("mesh.dp=4", "zero.stage=3")),
    ("dp=4 fsdp2", ("mesh.dp=4", "zero.engine=fsdp2")),
    ("ulysses=4", ("mesh.ulysses=4",)),
    ("ring=4", ("mesh.ring=4",)),
    ("tp=4", ("mesh.tp=4",)),
    ("dp=2 ring=2 fsdp2", ("mesh.dp=2", "mesh.ring=2", "zero.engine=fsdp2")),
    ("ulysses=2 tp=2", ("mesh.ulysses=2", "mesh.tp=2")),
    ("dp=2", ("mesh.dp=2",)),
    ("ulysses=2 recompute", ("mesh.ulysses=2", "execution.recompute=all")),
    ("ring=2 fsdp2", ("mesh.ring=2", "zero.engine=fsdp2", "zero.stage=3")),
    ("tp=2", ("mesh.tp=2",)),
)


@dataclass(frozen=True)
class Once:
    """One repeat of a mesh: seconds of a step, measured and predicted."""

    mesh: str
    ranks: int
    measured: float
    predicted: float


def write_data(out: Path) -> None:
    """16 samples of random latents."""
    config = TokenizerConfig("dct", DctConfig(COEFFICIENTS))
    latent = latent_shape(CLIP, tokenizer_strides(config))
    shape = (COEFFICIENTS, latent.frames, latent.height, latent.width)
    version = tokenizer_version(config)
    with ShardWriter(out, schema=LATENT_SCHEMA, tokenizer_version=version, part_size=4, shard_bytes=1 << 22) as writer:
        for number in range(16):
            latents = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
            info = SampleInfo(f"{number}@0", CLIP.frames, CLIP.height, CLIP.width, 24.0)
            writer.write(info.uid, "random", [LatentSample(info, latents, (Caption("noise"),))])
        writer.finish()


def write_recipe(folder: Path) -> Path:
    """A model of 3 layers and 1.6M parameters, 4 samples of 320 tokens a step, one at a time."""
    tree = {
        "run": str(folder / "run"),
        "tokenizer": {"name": "dct", "dct": {"coefficients": COEFFICIENTS}},
        "text": {"name": "bytes", "bytes": {"max_length": 16}},
        "zero": {"bucket_size": 1_000_000},
        "model": {
            "in_channels": COEFFICIENTS,
            "out_channels": COEFFICIENTS,
            "num_layers": 3,
            "num_attention_heads": 4,
            "attention_head_dim": 48,
            "ffn_dim": 512,
            "text_dim": 256,
        },
        "data": {
            "streams": [{"path": str(folder / "latents")}],
            "buckets": [{"frames": CLIP.frames, "height": CLIP.height, "width": CLIP.width}],
            "global_batch": 4,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def world_of(words: tuple[str, ...]) -> int:
    """Ranks of a mesh."""
    degrees = [int(word.partition("=")[2]) for word in words if word.startswith("mesh.")]
    return int(np.prod(degrees))


def on_rank(folder: Path, world: int, repeats: int, steps: int) -> None:
    """Time every mesh of so many ranks, again and again; rank 0 writes what was found."""
    from framework.programs.bench import bench

    env, hardware = read_environment(), load_hardware(str(folder / "hardware.yaml"))
    assert env is not None
    meshes = {name: words for name, words in MESHES if world_of(words) == world}
    meshes[PICK] = tuple(json.loads((folder / f"pick-{world}.json").read_text()))
    found = []
    for _, order in zip(range(repeats), orders(list(meshes)), strict=False):
        for name in order:
            words = meshes[name] if any(w.startswith("mesh.dp") for w in meshes[name]) else ("mesh.dp=1", *meshes[name])
            recipe = load_recipe(folder / "recipe.yaml", list(words))
            timed = bench(recipe, env, name=name, steps=steps, minutes=2.0, hardware=hardware)
            assert timed.predicted is not None
            found.append(Once(name, world, timed.seconds, timed.predicted))
            if env.is_first:
                print(json.dumps(asdict(found[-1])), flush=True)
    if env.is_first:
        (folder / f"found-{world}.json").write_text(json.dumps([asdict(each) for each in found]))


def half_range(values: list[float]) -> float:
    """Half the interquartile range, as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def report(found: list[Once]) -> None:
    """The table and the verdict."""
    by_mesh: defaultdict[tuple[int, str], list[Once]] = defaultdict(list)
    for each in found:
        by_mesh[each.ranks, each.mesh].append(each)
    print(
        f"{'ranks':>5} {'mesh':22}{'measured':>10}{'predicted':>11}{'error':>9}{'spread':>9}   ms, medians of repeats"
    )
    measured, predicted, spreads = {}, {}, []
    for (ranks, name), each in by_mesh.items():
        seconds = [once.measured for once in each]
        measured[ranks, name], predicted[ranks, name] = statistics.median(seconds), each[0].predicted
        spreads.append(half_range(seconds))
        error = predicted[ranks, name] / measured[ranks, name] - 1
        print(
            f"{ranks:5} {name:22}{1e3 * measured[ranks, name]:10.1f}{1e3 * predicted[ranks, name]:11.1f}"
            f"{100 * error:+8.1f}%{100 * spreads[-1]:8.1f}%"
        )
    mean = statistics.mean(abs(predicted[key] / measured[key] - 1) for key in measured if key[1] != PICK)
    spread = statistics.mean(spreads)
    limit = max(GOAL, 2 * spread)
    verdict = "holds" if mean <= limit else "does NOT hold"
    print(f"mean error {100 * mean:.1f} %, spread {100 * spread:.1f} %: at most {100 * limit:.1f} % {verdict}")
    for ranks in sorted({key[0] for key in measured}):
        best = min((key for key in measured if key[0] == ranks), key=measured.__getitem__)
        behind = measured[ranks, PICK] / measured[best] - 1
        verdict = "holds" if behind <= BEHIND else "does NOT hold"
        print(
            f"{ranks} ranks: the search's pick takes {100 * behind:.1f} % more than the best measured, {best[1]!r}: "
            f"at most {100 * BEHIND:.0f} % {verdict}"
        )


def search_pick(recipe: Path, hardware: Path, world: int) -> list[str]:
    """Words of the layout that the search puts first."""
    command = [sys.executable, "-m", "framework.cli", "plan", str(recipe), "--search", "--json", "--gpus", str(world)]
    said = subprocess.run([*command, "--gpu", str(hardware)], check=True, capture_output=True, text=True)
    words: list[str] = json.loads(said.stdout)["stages"][0]["layouts"][0]["words"]
    return words


def main() -> None:
    """Here: calibrate, start the ranks, report. On a rank: measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a repeat")
    parser.add_argument("--hardware", help="a calibration of this machine, instead of making one")
    parser.add_argument("--rank-of", nargs=2, metavar=("FOLDER", "WORLD"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of:
        on_rank(Path(given.rank_of[0]), int(given.rank_of[1]), given.repeats, given.steps)
        return
    print(json.dumps(machine("deepspeed")))
    with tempfile.TemporaryDirectory(prefix="planned-") as name:
        folder = Path(name)
        write_data(folder / "latents")
        write_recipe(folder)
        if given.hardware:
            (folder / "hardware.yaml").write_text(Path(given.hardware).read_text())
        else:
            calibrate(folder / "hardware.yaml", 4)
        found: list[Once] = []
        for world in sorted({world_of(words) for _, words in MESHES}):
            pick = search_pick(folder / "recipe.yaml", folder / "hardware.yaml", world)
            print(f"{world} ranks, the search's pick: {' '.join(pick)}")
            (folder / f"pick-{world}.json").write_text(json.dumps(pick))
            words = ["--rank-of", name, str(world), "--repeats", str(given.repeats), "--steps", str(given.steps)]
            run_ranks(words, world)
            found += [Once(**each) for each in json.loads((folder / f"found-{world}.json").read_text())]
    report(found)


if __name__ == "__main__":
    main()
