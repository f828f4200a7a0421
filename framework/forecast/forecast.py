"""What a recipe will need and take on described hardware, before a rank starts: `cuboid plan`. Imports no torch.

A step is one draw of one bucket (data/budget.py), so what a step takes on average is the mean over the buckets'
draws; what it needs of memory is the most of any. Nothing here looks at the data: whether they are there, and how they
fill the buckets, says `cuboid data report`.
"""

from collections import defaultdict
from dataclasses import dataclass

from framework.data.splits import resolve_degrees
from framework.forecast.draws import Draw, deal_of, draws_of
from framework.forecast.encoders import resident_bytes
from framework.forecast.encoding import encoder_seconds, latent_bytes
from framework.forecast.memory import Held, Memory, memory_of
from framework.forecast.step import mean_step, step_of
from framework.parallel.config import MeshShape
from framework.plan.hardware import Hardware
from framework.plan.parameters import elements_of, parameter_shapes
from framework.plan.sent import Weights, own_sent, weights_of
from framework.plan.time import StepTime
from framework.plan.zero_traffic import engine_traffic
from framework.recipe import Recipe

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class BucketForecast:
    """A bucket. tokens: of a sample. samples: of a draw. share: of the samples trained on. petaflops: of
    training on a sample, recompute not counted; attention: its share of that. tokens_a_rank: of a micro-batch's
    samples, padding included. micro_batches: samples of each, on the rank that has the most; empty: share of
    all replicas' slots without a sample. seconds: of a step of it. latent: bytes of a clip as it is stored. encoding:
    seconds of a device that made it, at an assumed rate (encoding.py), None where the encoder isn't known.
    """

    name: str
    tokens: int
    samples: int
    share: float
    petaflops: float
    attention: float
    ring: int
    ulysses: int
    tokens_a_rank: int
    micro_batches: tuple[int, ...]
    empty: float
    seconds: float
    mfu: float | None
    latent: int
    encoding: float | None


@dataclass(frozen=True)
class Forecast:
    """One stage of a recipe on a mesh of some hardware. parameters, trained: numbers of elements. traffic: bytes that a
    rank sends in a step, by group; `zero` is the engine's. time: seconds of a step by part. hours: to train.steps;
    cost: of them, in USD. checkpoint: bytes of one, frozen
    weights apart, which are written once; stall: seconds that a step waits for its copy to the host.
    latents: bytes of the samples as latents, each counted as often as it is drawn. clip_latents, clip_encoding: bytes
    and seconds of a device of one clip, on average over the buckets' shares of the samples.
    """

    run: str
    stage: str
    hardware: str
    mesh: MeshShape
    layout: str
    parameters: int
    trained: int
    buckets: tuple[BucketForecast, ...]
    memory: Memory
    traffic: dict[str, float]
    time: StepTime
    steps: int
    samples: float
    tokens: float
    hours: float
    gpu_hours: float
    cost: float
    checkpoint: int
    stall: float
    latents: float
    clip_latents: float
    clip_encoding: float | None
    assumed: tuple[str, ...]


def forecast(recipe: Recipe, shape: MeshShape, hardware: Hardware, *, stage: str = "") -> Forecast:
    """Of a checked recipe. Raises ValueError where the mesh can't be split as the buckets say."""
    recipe = resolve_degrees(recipe, shape)
    deal, weights = deal_of(recipe), weights_of(recipe, shape.tp)
    draws = draws_of(recipe, shape, deal)
    parameters = parameter_shapes(recipe.model, lora=recipe.lora, trainable=recipe.train.trainable)
    total, trained = elements_of(parameters), elements_of([p for p in parameters if p.trained])
    time, shares = mean_step(recipe, shape, hardware, draws, weights), deal.batches.weights
    hours = time.total * recipe.train.steps / 3600
    samples = deal.batches.mean * recipe.data.rounds * recipe.train.steps
    checkpoint = 4 * trained * (3 + (recipe.ema.decay > 0))
    buckets = tuple(
        bucket_forecast(recipe, draw, shares[draw.bucket], hardware, step_of(recipe, shape, hardware, draw, weights))
        for draw in draws
    )
    latents = sum(bucket.share * bucket.latent for bucket in buckets)
    encoding = [bucket.share * bucket.encoding for bucket in buckets if bucket.encoding is not None]
    return Forecast(
        run=recipe.run,
        stage=stage,
        hardware=hardware.name,
        mesh=shape,
        layout=f"ZeRO stage {recipe.zero.stage} ({recipe.zero.engine}), {recipe.precision.parameters}, recompute "
        f"{recipe.execution.recompute}",
        parameters=total,
        trained=trained,
        buckets=buckets,
        memory=memory_of(recipe, hardware, Held(shape, draws, resident_bytes(recipe)), weights),
        traffic=traffic_of(recipe, shape, draws, weights),
        time=time,
        steps=recipe.train.steps,
        samples=samples,
        tokens=samples * sum(share * tokens for share, tokens in zip(shares, deal.tokens, strict=True)),
        hours=hours,
        gpu_hours=hours * shape.world_size,
        cost=hours * shape.world_size * hardware.device.price,
        checkpoint=checkpoint,
        stall=checkpoint / shape.world_size / hardware.device.host_bandwidth,
        latents=samples * latents,
        clip_latents=latents,
        clip_encoding=sum(encoding) if len(encoding) == len(buckets) else None,
        assumed=hardware.assumed,
    )


def bucket_forecast(recipe: Recipe, draw: Draw, share: float, hardware: Hardware, time: StepTime) -> BucketForecast:
    """A step of one bucket. share: its weight."""
    degrees = draw.shape
    flops = draw.flops
    return BucketForecast(
        name=recipe.data.buckets[draw.bucket].name,
        tokens=draw.tokens,
        samples=draw.samples,
        share=share,
        petaflops=flops.total / 1e15,
        attention=flops.attention / flops.total,
        ring=degrees.ring,
        ulysses=degrees.ulysses,
        tokens_a_rank=max(micro.samples for micro in draw.micros) * -(-draw.tokens // degrees.replica),
        micro_batches=tuple(micro.samples for micro in draw.micros),
        empty=draw.empty,
        seconds=time.total,
        mfu=time.mfu,
        latent=latent_bytes(recipe, draw.bucket),
        encoding=encoder_seconds(recipe, draw.bucket, hardware),
    )


def traffic_of(recipe: Recipe, shape: MeshShape, draws: list[Draw], weights: Weights) -> dict[str, float]:
    """Bytes that the first rank sends in a step, on average over the draws, by group."""
    found: defaultdict[str, float] = defaultdict(float)
    for draw in draws:
        micros = draw.micros * recipe.data.rounds
        for (group, _), (_, sent) in own_sent(recipe, shape, micros, weights).items():
            found[group] += draw.share * sent
        found["zero"] += draw.share * float(engine_traffic(recipe, shape, 0, len(micros)).total)
    return {group: sent for group, sent in found.items() if sent}
