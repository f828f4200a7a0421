"""`cuboid bench`, on one rank: a recipe's own training loop for some steps, timed, and nothing written.

As JSON, one object; seconds are medians over steps of the slowest rank's:

    recipe, stage                           of the recipe, "" where it has none
    mesh, ranks, device, torch              what ran, where
    parameters, tokens                      of the model; of a step, over all ranks
    steps                                   that were timed
    seconds, seconds_low, seconds_high      of a step: median and quartiles
    rank_tflops                             model TFLOP/s of a rank, by plan/flops.py
    mfu                                     against `device.peak` of the hardware; null where none is given or known
    exposed, exposed_by                     seconds of a step in which a rank neither computed nor waited for data.
                                            by profiler: communication kernels while no other kernel ran (CUDA); by
                                            processor time: the loop's thread had no core, or waited for others (CPU)
    peak_bytes, peak_of                     the largest over ranks: reserved (CUDA's allocator), or rss
    data_wait                               seconds of a step that the loop waited for its data
    hardware, predicted                     seconds of a step by plan/time.py; null without hardware
    predicted_ratio                         predicted / seconds
"""

import resource
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from framework.data.buckets import streams_of
from framework.data.schedule import Work
from framework.ema import Ema
from framework.environment import Environment
from framework.parallel.collectives import barrier, gather_floats
from framework.parallel.mesh import Mesh, close_mesh
from framework.plan.flops import step_flops
from framework.plan.hardware import Hardware
from framework.plan.sent import weights_of
from framework.plan.time import step_time
from framework.plan.traffic import MicroShape
from framework.programs import build
from framework.programs.parts import Parts, build_parts
from framework.programs.train import optimizer_step
from framework.recipe import Recipe

WARMUP = 4  # steps until every engine is in its stride
PROFILED = 3  # steps after the timed ones, on a GPU
LOOK_AHEAD = 1  # steps that the loader may know of beyond the last one
Span = tuple[float, float]


@dataclass(frozen=True)
class Bench:
    """See the docstring above."""

    recipe: str
    stage: str
    mesh: str
    ranks: int
    device: str
    torch: str
    parameters: int
    tokens: float
    steps: int
    seconds: float
    seconds_low: float
    seconds_high: float
    rank_tflops: float
    mfu: float | None
    exposed: float
    exposed_by: str
    peak_bytes: float
    peak_of: str
    data_wait: float
    hardware: str | None
    predicted: float | None
    predicted_ratio: float | None


@dataclass(frozen=True)
class Step:
    """A timed step: the slowest rank's seconds, those that it neither computed nor waited for data in, and those that
    some rank waited for its data.
    """

    work: Work
    seconds: float
    idle: float
    data_wait: float


def bench(
    recipe: Recipe,
    env: Environment,
    *,
    name: str,
    steps: int,
    minutes: float,
    hardware: Hardware | None,
    stage: str = "",
) -> Bench:
    """Time up to `steps` steps, within so many minutes, on this job's ranks. A collective; alike on every rank. name,
    stage: of the recipe, for the report; a stage's recipe is its own.
    """
    recipe = build.settle(recipe, env)
    recipe = replace(recipe, train=replace(recipe.train, steps=WARMUP + steps + PROFILED + LOOK_AHEAD))
    mesh = build.open_mesh(recipe, env)
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    build.take_weights(engine.fragments(), recipe, shards, mesh.control)
    engine.refresh(updates=0)
    encoders = build.Encoders(recipe, build.this_device())
    ema = Ema(engine.fragments(), recipe.ema)
    parts = build_parts(recipe, mesh, engine, streams=streams_of(recipe), ema=ema, encoders=encoders)
    timed = timed_steps(parts, mesh, steps=steps, minutes=minutes)
    on_gpu = torch.cuda.is_available()
    exposed = profiled_exposure(parts) if on_gpu else statistics.median(step.idle for step in timed)
    peak = float(torch.cuda.max_memory_reserved()) if on_gpu else peak_rss()
    everywhere = gather_floats([peak, exposed], mesh.control)
    text = encoders.text.encode([""])[0].shape[1]
    parts.loader.close()
    engine.destroy()
    close_mesh(mesh)
    found = statistics.median(step.seconds for step in timed)
    quartiles = statistics.quantiles([step.seconds for step in timed], n=4) if len(timed) > 1 else [found] * 3
    predicted = predicted_seconds(recipe, mesh, hardware, timed, text)
    rate = statistics.median(flops_of(parts, step.work, text) / step.seconds for step in timed) / mesh.world.size
    top = hardware.device.peak.get(recipe.precision.default.compute) if hardware else None
    return Bench(
        recipe=name,
        stage=stage,
        mesh=str(mesh.shape),
        ranks=mesh.world.size,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        torch=torch.__version__,
        parameters=weights_of(recipe, 1).elements,
        tokens=statistics.mean(tokens_of(parts, step.work) for step in timed),
        steps=len(timed),
        seconds=found,
        seconds_low=quartiles[0],
        seconds_high=quartiles[2],
        rank_tflops=rate / 1e12,
        mfu=rate / top if top else None,
        exposed=max(each for _, each in everywhere),
        exposed_by="profiler" if on_gpu else "processor time",
        peak_bytes=max(each for each, _ in everywhere),
        peak_of="reserved" if on_gpu else "rss",
        data_wait=statistics.median(step.data_wait for step in timed),
        hardware=hardware.name if hardware else None,
        predicted=predicted,
        predicted_ratio=predicted / found if predicted else None,
    )


def timed_steps(parts: Parts, mesh: Mesh, *, steps: int, minutes: float) -> list[Step]:
    """Run the loop's steps. At least one is timed, whatever it takes; the first rank's clock says when to stop."""
    timed: list[Step] = []
    began = time.perf_counter()
    number = 0
    while len(timed) < steps:
        barrier(mesh.control)
        waited, begin, busy = parts.loader.waited, time.perf_counter(), time.thread_time()
        work = parts.loader.next_work()
        optimizer_step(parts, work, step=number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent, used = time.perf_counter() - begin, time.thread_time() - busy
        data = parts.loader.waited - waited
        mine = [spent, max(0.0, spent - used - data), data, time.perf_counter() - began]
        rows = gather_floats(mine, mesh.control)
        slowest = max(rows, key=lambda row: row[0])
        number += 1
        if number > WARMUP:
            timed.append(Step(work, slowest[0], slowest[1], max(row[2] for row in rows)))
        if timed and rows[0][3] > 60 * minutes:
            break
    return timed


def predicted_seconds(
    recipe: Recipe, mesh: Mesh, hardware: Hardware | None, timed: Sequence[Step], text: int
) -> float | None:
    """The median prediction of the timed steps."""
    if hardware is None:
        return None
    weights = weights_of(recipe, mesh.shape.tp)
    micros = ([MicroShape(m.bucket, len(m.slots), text) for m in step.work.micro_batches] for step in timed)
    return statistics.median(step_time(recipe, mesh.shape, hardware, each, weights=weights).total for each in micros)


def tokens_of(parts: Parts, work: Work) -> int:
    """Of a step, over all ranks."""
    return sum(count * tokens for count, tokens in zip(work.counts, parts.num_tokens, strict=True))


def flops_of(parts: Parts, work: Work, text: int) -> float:
    """Model FLOPs of a step, over all ranks."""
    model = parts.recipe.model
    pairs = zip(work.counts, parts.num_tokens, strict=True)
    return float(sum(count * step_flops(model, tokens=tokens, text=text).total for count, tokens in pairs))


def peak_rss() -> float:
    """The most memory that this process has had, in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def profiled_exposure(parts: Parts) -> float:
    """Seconds of a step in which communication kernels ran and no other kernel did, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            work = parts.loader.next_work()
            optimizer_step(parts, work)
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for event in kernels:
        spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    return uncovered(spans[True], spans[False]) / 1e6 / PROFILED  # the profiler counts microseconds


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of some spans, in order and without overlap."""
    union: list[Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union


def uncovered(spans: Iterable[Span], covers: Iterable[Span]) -> float:
    """How long the union of `spans` is outside the union of `covers`."""
    first, second = merged(spans), merged(covers)
    total, index = sum(end - begin for begin, end in first), 0
    for begin, end in first:
        while index < len(second) and second[index][1] <= begin:
            index += 1
        for low, high in second[index:]:
            if low >= end:
                break
            total -= min(end, high) - max(begin, low)
    return total


def bench_lines(found: Bench) -> list[str]:
    """As text."""
    stage = f", stage {found.stage}" if found.stage else ""
    mfu = "" if found.mfu is None else f", MFU {100 * found.mfu:.1f} %"
    lines = [
        f"{found.recipe}{stage}: {found.mesh}, {found.ranks} x {found.device}, torch {found.torch}",
        f"step            {1e3 * found.seconds:10.1f} ms   quartiles {1e3 * found.seconds_low:.1f} to "
        f"{1e3 * found.seconds_high:.1f}, {found.steps} steps of {found.tokens:,.0f} tokens",
        f"model FLOP/s    {found.rank_tflops:10.3f} TFLOP/s a rank{mfu}",
        f"exposed         {1e3 * found.exposed:10.1f} ms   {100 * found.exposed / found.seconds:.1f} %, by "
        f"{found.exposed_by}",
        f"data wait       {1e3 * found.data_wait:10.1f} ms",
        f"peak memory     {found.peak_bytes / 1e9:10.2f} GB   {found.peak_of}",
    ]
    if found.predicted is not None:
        lines.append(
            f"predicted       {1e3 * found.predicted:10.1f} ms   {found.predicted_ratio:.3f} of the measured, by "
            f"{found.hardware}"
        )
    return [*lines, bench_row(found)]


def bench_row(found: Bench) -> str:
    """A row for the table of recipes/README.md: recipe, hardware, degrees, tokens a step, measured."""
    stage = f", stage {found.stage}" if found.stage else ""
    mfu = "" if found.mfu is None else f" (MFU {100 * found.mfu:.1f} %)"
    return (
        f"| `{found.recipe}`{stage} | {found.ranks} x {found.device} | {found.mesh} | {found.tokens:,.0f} | "
        f"{1e3 * found.seconds:.1f} ms a step, {found.rank_tflops:.3f} TFLOP/s a rank{mfu}, "
        f"{found.peak_bytes / 1e9:.2f} GB {found.peak_of}, torch {found.torch} |"
    )
