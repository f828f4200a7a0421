"""Published training speeds against the cost model, with one efficiency for all of them.

NVIDIA publishes Wan 2.1 14B on H100 at 37,440 tokens (NVIDIA-NeMo/DFM docs/performance-summary.md, and Megatron-Bridge
examples/models/wan/performance-summary.md), in TFLOP/s a GPU:

    128 GPUs, Megatron-Core, global batch 128, TP 2 with sequence parallelism, CP 4, DDP         325.8
     64 GPUs, NeMo Automodel, FSDP2                                                             228.9
      8 GPUs, NeMo Automodel, FSDP2                                                             175.9

The first calibrates: all rates of the description (products, attention, memory) are multiplied by the one number that
makes its prediction right. The others are then predicted. What the tables don't say is assumed, and printed: recompute,
kernel, FLOP formula, batch. So a prediction within 10 % is "consistent with" what is published, and no more; the second
table shows what other assumptions would give.

    python tools/bench/published.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

from framework.parallel.config import MeshShape
from framework.plan.hardware import Attention, Hardware, Table, load_hardware
from framework.plan.sent import weights_of
from framework.plan.time import StepTime, step_time
from framework.plan.traffic import MicroShape
from framework.recipe import Recipe, bucket_tokens, build_recipe

NEAR = 0.1
TEXT = 512


@dataclass(frozen=True)
class Point:
    """A published speed, TFLOP/s a GPU, and settings that are assumed of it. micros: micro-batches of one sample."""

    name: str
    measured: float
    shape: MeshShape
    micros: int
    engine: str
    stage: int
    recompute: str = "none"
    kernel: str = "cudnn"


POINTS = (
    Point("128 H100, TP2 CP4 DDP", 325.8, MeshShape(16, 1, 4, 2), 8, "deepspeed", 1),
    Point("64 H100, FSDP2", 228.9, MeshShape(64, 1, 1, 1), 1, "fsdp2", 3, "all"),
    Point("8 H100, FSDP2", 175.9, MeshShape(8, 1, 1, 1), 1, "fsdp2", 3, "all"),
)
ASSUMED = (
    "model FLOPs by plan/flops.py (forward 1, backward 2; cross-attention and text count); NVIDIA's was not read",
    "attention by cuDNN in all three; recompute none with CP 4 x TP 2, all of each block with FSDP2",
    "CP 4 is Ulysses inside a node; 8 micro-batches of one sample a replica at 128 GPUs, one of one sample with FSDP2",
    "DDP sends what ZeRO 1 sends in bfloat16, none of it hidden (it is once in 8 micro-batches)",
    "FSDP2 gathers blocks twice (stage 3), no offload, one replica over all GPUs",
    "every number of plan/hardware/h100.yaml that its source calls assumed",
)


def recipe_of(point: Point) -> Recipe:
    """Wan 2.1 14B on a clip of 93 frames, 480 x 832: 24 x 30 x 52 = 37,440 tokens."""
    shape = point.shape
    return build_recipe(
        {
            "run": "published",
            "mesh": {"dp": shape.dp, "ring": shape.ring, "ulysses": shape.ulysses, "tp": shape.tp},
            "zero": {"engine": point.engine, "stage": point.stage},
            "precision": {"parameters": "bfloat16"},
            "attention": {"kernel": point.kernel},
            "execution": {"recompute": point.recompute},
            "tokenizer": {"name": "dct", "dct": {"coefficients": 16}},
            "text": {"name": "bytes", "bytes": {"max_length": TEXT}},
            "model": {"text_dim": 256},
            "data": {"streams": [{"path": "none"}], "buckets": [{"frames": 93, "height": 480, "width": 832}]},
        }
    )


def scaled(hardware: Hardware, efficiency: float) -> Hardware:
    """The machine with every rate of its device multiplied."""

    def times(table: Table) -> Table:
        return MappingProxyType({key: value * efficiency for key, value in table.items()})

    device = hardware.device
    attention = {k: Attention(r.forward * efficiency, r.backward * efficiency) for k, r in device.attention.items()}
    return replace(
        hardware,
        device=replace(
            device,
            matmul=times(device.matmul),
            attention=MappingProxyType(attention),
            bandwidth=device.bandwidth * efficiency,
            update=device.update * efficiency,
        ),
    )


def predict(point: Point, hardware: Hardware) -> StepTime:
    """A step of it."""
    return step_time(recipe_of(point), point.shape, hardware, micros_of(point))


def micros_of(point: Point) -> list[MicroShape]:
    """Of a rank's step."""
    return [MicroShape(0, 1, TEXT)] * point.micros


def calibrated(point: Point, hardware: Hardware) -> float:
    """The efficiency with which its prediction is what was measured; by bisection, as more is always faster."""
    recipe = recipe_of(point)
    weights = weights_of(recipe, point.shape.tp)
    low, high = 0.01, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        found = step_time(recipe, point.shape, scaled(hardware, middle), micros_of(point), weights=weights)
        slower = found.rank_flops < point.measured * 1e12
        low, high = (middle, high) if slower else (low, middle)
    return low


def lines() -> Iterator[str]:
    """Efficiency, points and assumptions."""
    hardware = load_hardware("h100")
    efficiency = calibrated(POINTS[0], hardware)
    yield f"one efficiency, from the first point: {efficiency:.3f} of the rates in h100.yaml"
    yield f"{'':24}{'measured':>10}{'predicted':>10}{'ratio':>8}"
    for number, point in enumerate(POINTS):
        found = predict(point, scaled(hardware, efficiency)).rank_flops / 1e12
        ratio = found / point.measured
        near = (
            "calibrated on" if number == 0 else "consistent with" if abs(ratio - 1) <= NEAR else "NOT consistent with"
        )
        yield f"{point.name:24}{point.measured:10.1f}{found:10.1f}{ratio:8.3f}  {near}"
    tokens = ", ".join(f"{bucket_tokens(recipe_of(point), 0).num_tokens:,}" for point in POINTS)
    yield f"assumed, at {tokens} tokens:"
    yield from (f"  {text}" for text in ASSUMED)


def other_lines() -> Iterator[str]:
    """What other assumptions would give."""
    hardware = load_hardware("h100")
    yield "predicted / measured of the two FSDP2 points under other assumptions, each calibrated anew:"
    for first in ("none", "keep_attention", "all"):
        for kernel in ("cudnn", "aten"):
            for other in ("keep_attention", "all"):
                one = calibrated(replace(POINTS[0], recompute=first), hardware)
                machine = scaled(hardware, one)
                others = [replace(point, recompute=other, kernel=kernel) for point in POINTS[1:]]
                ratios = [predict(point, machine).rank_flops / 1e12 / point.measured for point in others]
                words = f"Megatron recompute {first}, FSDP2 recompute {other} with {kernel}"
                yield f"  {words:70}{one:6.3f}" + "".join(f"{ratio:8.3f}" for ratio in ratios)


if __name__ == "__main__":
    for text in (*lines(), *other_lines()):
        print(text)
