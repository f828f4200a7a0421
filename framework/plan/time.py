"""Predicted seconds of a step on described hardware (hardware.py), by part, in closed form.

    a micro-batch   layers x (forward + backward [+ forward again])  +  what is around the blocks
    a step          micro-batches + ZeRO's exchanges + optimizer + the host's part

A part is FLOPs over the rate that its kernels reach, bytes moved over the memory's bandwidth (work.py), or bytes sent
over a link (sent.py, links.py). What hides behind what follows from the code:

* A ring's message travels while the kernel of the same step runs; the last of the gradients' is waited for.
* Ulysses and tp wait for their exchanges: all of them are exposed.
* FSDP2 gathers a block while the one before computes, and reduces a block while the next one's backward runs.
  DeepSpeed's stage 3 gathers ahead likewise. Its reductions, and the gathers of stages 1 and 2 at the step, don't
  overlap (`overlap_comm` is off, parallel/zero/deepspeed.py).
* Of what could hide so, the share `network.overlap` does.
* Ranks that compute alike don't come to an exchange at one time: all wait for the slowest, `network.skew` of the time
  that they computed. Over longer stretches than `network.stretch` delays average out, with the root of the time.

On a GPU the host runs ahead, so its launches count where they take longer than everything else; on a CPU they add up.
Where LoRA or `train.trainable` freezes weights, bytes are exact but the backward's linears are scaled: by the share of
weights that is trained, beside the gradient of what goes in, as if all blocks were reached.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from framework.models.config import NO_ADAPTERS
from framework.parallel.config import MeshShape, split_shape
from framework.plan.activations import activation_bytes
from framework.plan.bucket import bucket_flops
from framework.plan.computing import Compute, attention_rates, compute_of, optimizer_seconds, slowdown
from framework.plan.hardware import Attention, Hardware, Network
from framework.plan.links import Kind, Place, place_of, seconds
from framework.plan.sent import Own, Weights, engine_sent, micro_sent, weights_of
from framework.plan.traffic import MicroShape
from framework.plan.work import ATTENTION_BACKWARD, block_work
from framework.recipe import Recipe, bucket_degrees

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "gather_tokens": "all_gather",
        "scatter_tokens": "reduce_scatter",
        "qk_norm": "all_reduce",
        "replicated": "all_reduce",
        "gather_tokens_scatter_heads": "all_to_all",
        "scatter_tokens_gather_heads": "all_to_all",
        "ring": "ring",
        "ring_gradients": "ring",
    }
)

GLOO_THREADS = 2  # of a process group (ProcessGroupGloo::Options)


@dataclass(frozen=True)
class Exchange:
    """Seconds of some collectives, and those of them that nothing hides."""

    total: float = 0.0
    exposed: float = 0.0

    def __add__(self, other: "Exchange") -> "Exchange":
        return Exchange(self.total + other.total, self.exposed + other.exposed)

    def __mul__(self, times: float) -> "Exchange":
        return Exchange(self.total * times, self.exposed * times)


# Of StepTime, what adds up over steps.
EXCHANGES: Final = ("tp", "ulysses", "ring", "zero")
SUMMED: Final = (
    "linears",
    "attention",
    "elementwise",
    "recompute",
    *EXCHANGES,
    "offload",
    "optimizer",
    "overhead",
    "skew",
    "model_flops",
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part. elementwise: what is neither a linear nor attention.
    offload: of activations on their way to the host and back, what nothing hides. optimizer: update, EMA and copies
    of gradients. overhead: of the host, and of a step's few scalars. skew: of waiting for slower ranks. model_flops: of
    all ranks, by plan/flops.py.
    peak: FLOP/s of one device that MFU is counted against, None where it isn't known.
    """

    linears: float
    attention: float
    elementwise: float
    recompute: float
    tp: Exchange
    ulysses: Exchange
    ring: Exchange
    zero: Exchange
    offload: float
    optimizer: float
    overhead: float
    skew: float
    model_flops: float
    ranks: int
    peak: float | None

    def __add__(self, other: "StepTime") -> "StepTime":
        """Of two steps on the same ranks."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in SUMMED})

    def __mul__(self, times: float) -> "StepTime":
        return replace(self, **{name: getattr(self, name) * times for name in SUMMED})

    @property
    def computing(self) -> float:
        """Seconds of kernels, without exchanges, optimizer and host."""
        return self.linears + self.attention + self.elementwise + self.recompute

    @property
    def exposed(self) -> float:
        """Seconds of exchanges that nothing hides."""
        return sum(exchange.exposed for exchange in (self.tp, self.ulysses, self.ring, self.zero))

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computing + self.exposed + self.offload + self.optimizer + self.overhead + self.skew

    def parts(self) -> dict[str, float]:
        """Seconds by part, of exchanges those that nothing hides; their sum is the total."""
        found = {name: getattr(self, name) for name in SUMMED if name != "model_flops"}
        return {name: value.exposed if name in EXCHANGES else value for name, value in found.items()}

    @property
    def rank_flops(self) -> float:
        """Model FLOP/s of one rank."""
        return self.model_flops / (self.total * self.ranks)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the data sheet's rate would do in the time; None where that isn't known."""
        return None if self.peak is None else self.rank_flops / self.peak


def step_time(
    recipe: Recipe,
    shape: MeshShape,
    hardware: Hardware,
    micros: Sequence[MicroShape],
    *,
    weights: Weights | None = None,
) -> StepTime:
    """Of a step of `micros` on each rank of a mesh. Raises ValueError where the hardware's description lacks a rate.

    weights: `weights_of(recipe, shape.tp)`, for who asks for many meshes of one model.
    """
    weights, kinds = weights or weights_of(recipe, shape.tp), Counter(micros)
    rates = attention_rates(recipe, hardware)
    compute, flops, exchanges = Compute(), 0.0, 0.0
    tp, ulysses, ring, offload = Exchange(), Exchange(), Exchange(), 0.0
    for micro, count in kinds.items():
        degrees = split_shape(shape, *bucket_degrees(recipe, micro.bucket))
        work, own = block_work(recipe, degrees, micro), micro_sent(recipe, shape, micro, weights)
        exchanges += count * sum(calls for calls, _ in own.values())
        own_compute = compute_of(recipe, hardware, work, rates, weights)
        compute = compute.plus(own_compute, count)
        offload += offload_seconds(recipe, shape, hardware, micro, own_compute) * count
        tp += waited(own, "tp", hardware, group_place(degrees.tp, 1, shape, hardware)) * count
        place = group_place(degrees.ulysses, degrees.tp, shape, hardware)
        ulysses += waited(own, "ulysses", hardware, place) * count
        ring += ring_exchange(degrees, hardware, own, work.attention, rates) * count
        flops += float(bucket_flops(recipe, micro.bucket).total) * micro.samples * degrees.dp * count
    zero = zero_exchange(recipe, shape, hardware, weights, compute, len(micros))
    optimizer = optimizer_seconds(recipe, shape, hardware, weights, len(micros))
    busy = compute.total + tp.exposed + ulysses.exposed + ring.exposed + zero.exposed + offload + optimizer
    slow = slowdown(shape, hardware)
    overhead = overhead_seconds(shape, hardware, compute.kernels, busy)
    exchanges += sum(zero_calls(recipe, shape, hardware, weights, len(micros)).values())
    skew = skew_seconds(hardware.network, compute.total + overhead, exchanges if shape.world_size > 1 else 0)
    return StepTime(
        linears=compute.linears * slow,
        attention=compute.attention * slow,
        elementwise=compute.elementwise * slow,
        recompute=compute.recompute * slow,
        tp=tp * slow,
        ulysses=ulysses * slow,
        ring=ring * slow,
        zero=zero * slow,
        offload=offload * slow,
        optimizer=optimizer * slow,
        overhead=overhead * slow,
        skew=skew * slow,
        model_flops=flops,
        ranks=shape.world_size,
        peak=hardware.device.peak.get(recipe.precision.default.compute),
    )


def group_place(size: int, stride: int, shape: MeshShape, hardware: Hardware) -> Place:
    """Where a group lies whose ranks are `stride` apart."""
    return place_of(size, stride, shape.world_size, hardware.network.domain)


def waited(own: Own, group: str, hardware: Hardware, place: Place) -> Exchange:
    """Collectives that are waited for."""
    total = sum(
        seconds(hardware.network, place, KINDS[purpose], calls, sent)
        for (name, purpose), (calls, sent) in own.items()
        if name == group
    )
    return Exchange(total, total)


def ring_exchange(shape: MeshShape, hardware: Hardware, own: Own, flops: float, rates: Attention) -> Exchange:
    """Keys and values, and their gradients, of a micro-batch. flops: of self-attention in a block's forward.

    In a forward each of r - 1 messages travels during a kernel. In a backward of r kernels the first two see keys and
    values on the way, the last a gradient, those between both; the last gradient is waited for.
    """
    r, key, network = shape.ring, ("ring", "ring"), hardware.network
    if r == 1 or key not in own:
        return Exchange()
    place = place_of(r, shape.tp * shape.ulysses, shape.world_size, network.domain)
    calls, sent = own[key]
    home, returned = own.get(("ring", "ring_gradients"), (0, 0.0))  # none where no backward reaches attention
    pair, gradient = (seconds(network, place, "ring", 1, each) for each in (sent / calls, returned / max(1, home)))
    backwards = home // (r - 1)
    forwards = calls // (r - 1) - backwards
    kernel, back = flops / r / rates.forward, ATTENTION_BACKWARD * flops / r / rates.backward
    hidden = forwards * (r - 1) * min(pair, kernel)
    waits = min(2, r - 1) * min(pair, back) + max(0, r - 3) * min(pair + gradient, back) + (r > 2) * min(gradient, back)
    total = calls * pair + home * gradient
    return Exchange(total, total - network.overlap * (hidden + backwards * waits))


def zero_calls(
    recipe: Recipe, shape: MeshShape, hardware: Hardware, weights: Weights, num_micro: int
) -> dict[Kind, float]:
    """Collectives of the engine in a step, one after another; none where one rank holds everything."""
    zero, ranks = recipe.zero, shape.dp * shape.cp
    size = zero.partition_size(ranks)
    if ranks == 1:
        return {"all_gather": 0, "reduce_scatter": 0, "reduce": 0}
    buckets = -(-weights.trained // zero.bucket_size)
    groups = recipe.model.num_layers + 1
    if zero.engine == "fsdp2":
        gathers = groups * (2 * num_micro if zero.stage == 3 else 1)
        return {"all_gather": gathers, "reduce_scatter": groups * num_micro, "all_reduce": groups * (size < ranks)}
    if zero.stage == 3:
        # What persists is gathered after the update, all at once, of which gloo runs two at a time; the others where
        # they are used.
        kept = sum(times for p, times in weights.parts if p.elements <= zero.persistence)
        at_once = GLOO_THREADS if hardware.device.kind == "cpu" else 1
        used = 2 * num_micro * (weights.count - kept)
        return {"all_gather": kept / at_once + used, "reduce_scatter": buckets * num_micro}
    # A bucket is reduced to the ranks whose parts lie in it.
    return {"all_gather": buckets + 1, "reduce": (buckets + size - 1) * (1 if zero.stage == 1 else num_micro)}


def skew_seconds(network: Network, computed: float, exchanges: float) -> float:
    """What ranks wait for the slowest at so many exchanges."""
    if not computed:
        return 0.0
    return network.skew * computed * min(1.0, (network.stretch * exchanges / computed) ** 0.5)


def zero_exchange(
    recipe: Recipe, shape: MeshShape, hardware: Hardware, weights: Weights, compute: Compute, num_micro: int
) -> Exchange:
    """The engine's, in a step. compute: of the whole step."""
    zero, ranks = recipe.zero, shape.dp * shape.cp
    size = zero.partition_size(ranks)
    inside = group_place(size, shape.tp, shape, hardware)
    across = group_place(ranks // size, shape.tp * size, shape, hardware)
    sent, network = engine_sent(recipe, shape, num_micro, weights), hardware.network
    calls = zero_calls(recipe, shape, hardware, weights, num_micro)
    gather = seconds(network, inside, "all_gather", calls["all_gather"], sent["all_gather"])
    reductions = {name: sent[name] for name in ("reduce", "reduce_scatter") if name in sent}
    reduce = sum(seconds(network, inside, name, calls[name], sent[name]) for name in reductions)
    reduce += seconds(network, across, "all_reduce", calls.get("all_reduce", 0), sent.get("all_reduce", 0.0))
    # The first group of a pass has nothing before it to hide behind.
    rest = recipe.model.num_layers / (recipe.model.num_layers + 1)
    if zero.engine == "fsdp2":
        there = gather / 2 if zero.stage == 3 else gather
        window = compute.forward / (1 if zero.stage == 3 else num_micro)  # stage 2 gathers in the first micro-batch
        hidden = min(there * rest, window) + min((gather - there + reduce) * rest, compute.backward)
    elif zero.stage == 3:
        hidden = min(gather * rest, compute.total)
    else:
        hidden = 0.0
    return Exchange(gather + reduce, gather + reduce - network.overlap * hidden)


def offload_seconds(recipe: Recipe, shape: MeshShape, hardware: Hardware, micro: MicroShape, compute: Compute) -> float:
    """Of activations on their way to the host, beside the forward, and back, beside the backward: what is left over."""
    if not recipe.execution.offload:
        return 0.0
    trains_all = replace(recipe, lora=NO_ADAPTERS, train=replace(recipe.train, trainable=[]))
    way = activation_bytes(trains_all, shape, micro).host / hardware.device.host_bandwidth
    hides = hardware.network.overlap
    return max(0.0, way - hides * compute.forward) + max(0.0, way - hides * compute.backward)


def overhead_seconds(shape: MeshShape, hardware: Hardware, kernels: float, busy: float) -> float:
    """The host's, and the sums of loss and gradient norm. busy: of the device, which a GPU's host runs ahead of."""
    device = hardware.device
    host = kernels * device.launch
    exposed = max(0.0, host - busy) if device.kind == "gpu" else host
    world = group_place(shape.world_size, 1, shape, hardware)
    return exposed + device.step + seconds(hardware.network, world, "all_reduce", 2, 0.0)
