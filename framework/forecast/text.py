"""A forecast as a person reads it: plain text, aligned."""

from collections.abc import Sequence
from dataclasses import asdict

from framework.data.report_text import size, table
from framework.forecast.encoding import ASSUMED_SHARE
from framework.forecast.forecast import VERSION, BucketForecast, Forecast
from framework.forecast.memory import TIGHT, Memory
from framework.forecast.search import Layout
from framework.plan.time import StepTime

COLUMNS = (
    "bucket",
    "tokens",
    "samples",
    "mix",
    "PFLOP",
    "attention",
    "ring x ulysses",
    "tokens a rank",
    "micro",
    "step",
    "MFU",
)


def forecast_lines(found: Forecast) -> list[str]:
    """The whole plan."""
    mesh, stage = found.mesh, f", stage {found.stage}" if found.stage else ""
    trained = "" if found.trained == found.parameters else f", {found.trained:,} of them trained"
    return [
        f"{found.run}{stage}: {found.parameters:,} parameters{trained}",
        f"{mesh} = {mesh.world_size:,} x {found.hardware}; {found.layout}",
        "",
        *table([COLUMNS, *(bucket_row(bucket) for bucket in found.buckets)]),
        *(
            f"  of {bucket.name} {bucket.empty:.0%} of the slots are empty: {bucket.samples} samples a draw for "
            f"{mesh.world_size // (bucket.ring * bucket.ulysses * mesh.tp)} replicas"
            for bucket in found.buckets
            if bucket.empty > 0.05
        ),
        "",
        *memory_lines(found),
        "",
        *step_lines(found),
        "",
        *end_lines(found),
    ]


def total_lines(found: Sequence[Forecast]) -> list[str]:
    """What several stages take together, and which numbers of the hardware nobody has measured."""
    lines = []
    if len(found) > 1:
        hours, gpu_hours, cost = (sum(getattr(each, name) for each in found) for name in ("hours", "gpu_hours", "cost"))
        samples = sum(each.samples for each in found)
        lines.append(
            f"all {len(found)} stages: {samples:,.0f} samples, {hours:,.1f} h, {gpu_hours:,.0f} GPU-hours, about "
            f"${cost:,.0f}"
        )
    if found[0].assumed:
        lines.append(f"assumed of {found[0].hardware}, not measured: {', '.join(found[0].assumed)}")
    return lines


def bucket_row(bucket: BucketForecast) -> tuple[str, ...]:
    """One bucket."""
    sizes = bucket.micro_batches
    micro = f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else f"{len(sizes)} x {sizes[-1]}-{sizes[0]}"
    return (
        bucket.name,
        f"{bucket.tokens:,}",
        f"{bucket.samples:,}",
        f"{bucket.share:.1%}",
        f"{bucket.petaflops:,.3g}",
        f"{bucket.attention:.0%}",
        f"{bucket.ring} x {bucket.ulysses}",
        f"{bucket.tokens_a_rank:,}",
        micro,
        seconds(bucket.seconds),
        share(bucket.mfu),
    )


def memory_lines(found: Forecast) -> list[str]:
    """What a rank holds at its peak."""
    memory = found.memory
    parts = {name.replace("_", " "): value for name, value in memory.parts().items() if value}
    rows = [(f"  {name}", f"{value / 1e9:,.2f}") for name, value in parts.items()]
    verdict = f"fits{', tight' * memory.tight}" if memory.fits else "does NOT fit"
    host = f"; {memory.host / 1e9:,.1f} GB more on the host" if memory.host else ""
    return [
        "memory of a rank at its peak, GB",
        *table(rows),
        f"  {memory.total / 1e9:,.1f} of {memory.capacity / 1e9:,.1f} GB ({memory.used:.0%}): {verdict}{host}",
    ]


def step_lines(found: Forecast) -> list[str]:
    """Where a step's time goes, and what it sends."""
    parts = [(name, value) for name, value in found.time.parts().items() if value]
    shares = ", ".join(f"{name} {value / found.time.total:.0%}" for name, value in sorted(parts, key=lambda p: -p[1]))
    sent = ", ".join(f"{group} {size(sent)}" for group, sent in sorted(found.traffic.items(), key=lambda p: -p[1]))
    return [
        f"a step takes {seconds(found.time.total)}, MFU {share(found.time.mfu)}: {shares}",
        f"a rank sends in a step: {sent or 'nothing'}",
    ]


def end_lines(found: Forecast) -> list[str]:
    """To the end of the recipe."""
    return [
        f"{found.steps:,} steps: {found.samples:,.0f} samples, {found.tokens:,.0f} tokens, {found.hours:,.1f} h, "
        f"{found.gpu_hours:,.0f} GPU-hours, about ${found.cost:,.0f}",
        f"a checkpoint is {size(found.checkpoint)}, and a step waits {seconds(found.stall)} for its copy; the samples "
        f"as latents, each as often as it is drawn: {size(found.latents)}",
        encoding_line(found),
        "data are taken to be encoded ahead (cuboid encode): "
        + ("encoders are on the device for samples.every" if found.memory.encoders else "no encoder is on the device"),
    ]


def encoding_line(found: Forecast) -> str:
    """What a million clips take, since a recipe doesn't say how many there are."""
    line = f"a million clips of this mix are {size(1e6 * found.clip_latents)} of latents"
    if found.clip_encoding is None:
        return f"{line}; what encoding them takes isn't known of this tokenizer"
    hours = 1e6 * found.clip_encoding / 3600
    return (
        f"{line}, and {hours:,.0f} GPU-hours of Wan 2.1's encoder to make, at an assumed {ASSUMED_SHARE:.0%} of "
        "device.matmul.bfloat16; decoding videos not counted"
    )


def layout_lines(layouts: Sequence[Layout], *, stage: int | None = None, most: int = 10) -> list[str]:
    """The best layouts, a line each, and how to take the first."""
    best = layouts[0]
    rows = [("step", "MFU", "GB", "used", "mesh", "ZeRO", "recompute", "micro")]
    for layout in layouts[:most]:
        zero, execution = layout.recipe.zero, layout.recipe.execution
        parts = "" if zero.partition == "all" else f"/{zero.partition}"
        host = " +host" * (zero.offload == "optimizer")
        kept = execution.recompute + " +host" * execution.offload
        rows.append(
            (
                seconds(layout.time.total),
                share(layout.time.mfu),
                f"{layout.memory.total / 1e9:.1f}",
                f"{layout.memory.used:.0%}{' tight' * layout.memory.tight}",
                str(layout.shape),
                f"{zero.engine} {zero.stage}{parts}{host}",
                kept,
                str(layout.recipe.data.micro_batch),
            )
        )
    return [
        f"{len(layouts):,} layouts fit; the fastest:",
        *table(rows),
        *tight_lines(layouts[:most]),
        f"the first as words: {' '.join(staged(best.words, stage))}",
    ]


def tight_lines(layouts: Sequence[Layout]) -> list[str]:
    """What `tight` means, where one is."""
    if not any(layout.memory.tight for layout in layouts):
        return []
    return [f"tight: above {TIGHT:.0%} of the memory, which the count may be wrong by: try it before a long run"]


def to_json(found: Sequence[Forecast]) -> dict[str, object]:
    """The plan as plain data: of each stage (one without a name in a recipe without stages) the fields of Forecast,
    memory and time by part with their sums.
    """
    parts = [asdict(each) | {"memory": memory_json(each.memory), "time": time_json(each.time)} for each in found]
    return {"version": VERSION, "stages": parts}


def staged(words: Sequence[str], stage: int | None) -> list[str]:
    """Words of a recipe as those of one of its stages."""
    return [word if stage is None else f"stages.{stage}.{word}" for word in words]


def layouts_json(layouts: Sequence[Layout], *, stage: int | None = None) -> list[dict[str, object]]:
    """Layouts as plain data, the fastest first."""
    return [
        {"words": staged(layout.words, stage), "memory": memory_json(layout.memory), "time": time_json(layout.time)}
        for layout in layouts
    ]


def memory_json(memory: Memory) -> dict[str, object]:
    """Bytes by part."""
    return {
        **memory.parts(),
        "total": memory.total,
        "host": memory.host,
        "capacity": memory.capacity,
        "used": memory.used,
        "fits": memory.fits,
        "tight": memory.tight,
    }


def time_json(time: StepTime) -> dict[str, object]:
    """Seconds by part."""
    return {**time.parts(), "total": time.total, "mfu": time.mfu, "model_flops": time.model_flops}


def seconds(value: float) -> str:
    """A time at a readable scale."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def share(value: float | None) -> str:
    """Per cent, where it is known."""
    return "-" if value is None else f"{value:.1%}"
