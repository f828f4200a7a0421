"""A description of this machine (plan/hardware.py), measured: what its devices reach (rates.py), what its links do.

Where there is no GPU, ranks share the machine's cores: devices are measured by as many ranks at once as have a core
each, and what all ranks do together is divided by how many take turns on a core, as time.py will multiply it by that.

A collective's seconds are latency + steps hop + bytes / bandwidth (plan/links.py), from a small and a large tensor in
groups of two ranks and of all (link_rates.py). The host's part is what is left of a small model's real steps, of one
micro-batch and of three, when everything else is taken from them: `device.launch` from their difference (on a GPU,
whose host runs ahead, from a block of few tokens), `device.step` from the first.
"""

import datetime
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from framework.batch import Condition, Noised
from framework.ema import Ema
from framework.environment import Environment
from framework.models.patchify import patchify
from framework.parallel.collectives import (
    barrier,
)
from framework.parallel.config import MeshShape
from framework.parallel.context_parallel.tokens import split_tokens
from framework.parallel.mesh import Mesh
from framework.plan.computing import slowdown
from framework.plan.hardware import read_hardware
from framework.plan.links import Kind
from framework.plan.sent import weights_of
from framework.plan.time import step_time
from framework.plan.traffic import MicroShape
from framework.plan.work import micro_kernels
from framework.programs import build
from framework.programs.link_rates import LinkTimes, collectives, link_times, measure_overlap, measure_skew
from framework.programs.rates import Rates, measure_rates, wait
from framework.recipe import Recipe, build_recipe, resolve_auto
from framework.shapes import latent_shape
from framework.tokenizer.config import tokenizer_strides

STEPS = 28  # of the small model; the first four aren't counted
MICROS = (1, 3)  # micro-batches of its steps
TEXT = 32
Leaf = dict[str, object]


def calibrate(env: Environment, out: Path) -> None:
    """Measure on these ranks, and write the description on the first. Raises ValueError on fewer than two ranks: they
    have no link to measure.
    """
    if env.world_size < 2:
        raise ValueError("calibration needs at least 2 ranks, as one has no link to measure: raise --ranks")
    recipe = small_recipe(env.world_size)
    mesh = build.open_mesh(recipe, env)
    device = build.this_device()
    turns = turns_of(env.world_size)
    busy = round(env.world_size / turns)
    kernel = resolve_auto(recipe).attention.kernel
    rates = measure_rates(device, kernel) if env.rank < busy else None
    barrier(mesh.control)
    measured = {kind: link_times(kind, mesh, turns, device) for kind in collectives()}
    shares = {"overlap": measure_overlap(mesh, device), **measure_skew(mesh, turns, device)}
    spent = [real_step(recipe, mesh, env, num_micro) for num_micro in MICROS]
    if env.is_first:
        assert rates is not None
        launch, step = rates.block.launch, 0.0
        for _ in range(1 if device.type == "cuda" else 3):  # bandwidth follows from launch, and the other way round
            tree = describe(rates, measured, shares, ranks=env.world_size, launch=launch, step=step)
            found = host_seconds(recipe, mesh.shape, tree, spent)
            launch, step = (launch if device.type == "cuda" else found[0]), found[1]
        tree = describe(rates, measured, shares, ranks=env.world_size, launch=launch, step=step)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(yaml.safe_dump(tree, sort_keys=False, width=120))
        read_hardware(tree, out)
    barrier(mesh.control)


def turns_of(ranks: int) -> float:
    """How many ranks take turns on a core of this machine; 1 where every rank has a GPU."""
    if torch.cuda.is_available():
        return 1.0
    return max(1.0, ranks / cores())


def cores() -> int:
    """Ranks that this machine computes at full speed at once."""
    return max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())


def small_recipe(ranks: int) -> Recipe:
    """A model of 2 layers on 240 tokens, split over pairs of ranks."""
    return build_recipe(
        {
            "run": "calibration",
            "mesh": {"dp": ranks // 2, "ulysses": 2},
            "zero": {"engine": "fsdp2", "stage": 2},
            "tokenizer": {"name": "dct", "dct": {"coefficients": 8}},
            "text": {"name": "bytes", "bytes": {"max_length": TEXT}},
            "model": {
                "in_channels": 8,
                "out_channels": 8,
                "num_layers": 2,
                "num_attention_heads": 4,
                "attention_head_dim": 48,
                "ffn_dim": 512,
                "text_dim": 256,
            },
            "data": {"streams": [{"path": "none"}], "buckets": [{"frames": 17, "height": 128, "width": 96}]},
        }
    )


def real_step(recipe: Recipe, mesh: Mesh, env: Environment, num_micro: int) -> float:
    """Seconds of a small model's step of so many micro-batches; on a CPU the thread's own, without any waiting."""
    recipe = build.settle(recipe, env)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    engine.refresh(updates=0)
    ema, flow, device = Ema(engine.fragments(), recipe.ema), build.build_flow(recipe), build.this_device()
    latent = latent_shape(recipe.data.buckets[0].clip, tokenizer_strides(recipe.tokenizer))
    shape = (1, recipe.model.in_channels, latent.frames, latent.height, latent.width)
    latents, target = (torch.randn(shape, device=device) for _ in range(2))
    noised = Noised(latents, target, torch.ones(1, 1, device=device), torch.ones(1, device=device))
    condition = Condition(torch.randn(1, TEXT, recipe.model.text_dim, device=device))
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    spent = []
    for number in range(STEPS):
        barrier(mesh.control)
        begin = clock()
        for index in range(num_micro):
            tokens = split_tokens(patchify(noised, recipe.model.patch_size), mesh, recipe.attention.pattern)
            loss = engine.scored(tokens, condition, flow.score(tokens)).sum()
            engine.backward(loss, global_count=float(mesh.dp.size), last=index + 1 == num_micro)
        engine.step(lr=1e-4)
        ema.update(step=number)
        wait(device)
        spent.append(clock() - begin)
    engine.destroy()
    return statistics.median(spent[4:])


def host_seconds(recipe: Recipe, shape: MeshShape, tree: dict[str, Any], spent: list[float]) -> tuple[float, float]:
    """(for a kernel, for a step): what a description doesn't explain of real steps. spent: seconds of `MICROS` micro-
    batches, without exchanges on a CPU.
    """
    hardware = read_hardware(tree, Path("calibration"))
    counts = [micro_kernels(recipe, weights_of(recipe, shape.tp).count) * num_micro for num_micro in MICROS]
    said = [step_time(recipe, shape, hardware, [MicroShape(0, 1, TEXT)] * num_micro) for num_micro in MICROS]
    if hardware.device.kind == "gpu":
        return hardware.device.launch, max(0.0, spent[0] - said[0].total + hardware.device.step)
    own = [(each.computing + each.optimizer) / slowdown(shape, hardware) for each in said]
    launch = max(1e-7, (spent[1] - spent[0] - own[1] + own[0]) / (counts[1] - counts[0]))
    return launch, max(0.0, spent[0] - own[0] - counts[0] * launch)


def leaf(value: float, origin: str) -> Leaf:
    """A number with its source; four digits are more than are reproducible."""
    return {"value": float(f"{value:.4g}"), "source": origin}


def source() -> str:
    """When, where and with what."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    today = datetime.datetime.now(datetime.UTC).date()
    return f"measured on {today} on {socket.gethostname()} ({device}), torch {torch.__version__}"


def describe(
    rates: Rates, links: dict[Kind, LinkTimes], shares: dict[str, float], *, ranks: int, launch: float, step: float
) -> dict[str, Any]:
    """The description as a plain tree."""
    here, on_gpu = source(), torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else host_bytes() / ranks
    sides = {
        name: {kind: leaf(getattr(times, name), here) for kind, times in links.items()}
        | {"default": leaf(getattr(links["reduce_scatter"], name), "assumed: as of reduce_scatter")}
        for name in ("bandwidth", "latency", "hop")
    }
    device: dict[str, Any] = {
        "kind": "gpu" if on_gpu else "cpu",
        "memory": leaf(memory, here if on_gpu else f"{here}, shared out to {ranks} ranks"),
        "context": leaf(0.6e9 if on_gpu else 0.7e9, "assumed: of the libraries"),
        "communicator": leaf(0.3e9 if on_gpu else 1e6, "assumed"),
        "headroom": leaf(1.06 if on_gpu else 1.0, "assumed"),
        "matmul": {dtype: leaf(rate, here) for dtype, rate in rates.matmul.items()},
        "attention": {
            rates.kernel: dict(zip(("forward", "backward"), (leaf(r, here) for r in rates.attention), strict=True))
        },
        **{name: leaf(getattr(rates, name), here) for name in ("update", "host_bandwidth", "host_memory")},
        "bandwidth": leaf(rates.block.bandwidth(0.0 if on_gpu else launch), here),
        "launch": leaf(launch, here),
        "step": leaf(step, here),
        "price": leaf(0.0, "assumed: your own machine"),
    }
    if not on_gpu:
        device["shared"] = leaf(cores(), here)
    across = {
        name: {kind: {**each, "source": f"assumed: one machine was measured; {here}"} for kind, each in side.items()}
        for name, side in sides.items()
    }
    network = {
        "domain": leaf(max(ranks, cores()), f"{here}: one machine"),
        "inside": sides,
        "across": across,
        **{name: leaf(share, here) for name, share in shares.items()},
    }
    return {"device": device, "network": network}


def host_bytes() -> float:
    """Of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
