"""What a rank sends in a step, in closed form: the same bytes as traffic.py and zero_traffic.py, without their loops over
layers and parameters, for planners that ask a thousand times.

Closed forms hold for a model of which everything is trained, in one row of the precision table; for any other the
ledgers themselves are asked. The rank is the first of its replica: Ulysses and tp deal remainders to the first ranks,
so it has the most to do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from framework.parallel.config import MeshShape, split_shape
from framework.parallel.zero.config import SIZES
from framework.plan.parameters import ParameterShape, TensorParallel, block_shapes, elements_of, parameter_shapes
from framework.plan.traffic import MicroShape, compute, is_summed, own_ledger, part_tokens, precise
from framework.plan.zero_traffic import ALIGNMENT, engine_traffic
from framework.recipe import Recipe, bucket_degrees, decays
from framework.shapes import even_parts

Own = dict[tuple[str, str], tuple[int, float]]  # (group, purpose) -> (calls, bytes)
STEP = ("loss", "stop", "grad_norm")  # purposes of a step, whatever its micro-batches


@dataclass(frozen=True)
class Weights:
    """The parameters of a tp rank. shapes: those around the blocks, and one block's. layers: blocks. elements: of all.
    trained: of those that are.
    """

    shapes: tuple[ParameterShape, ...]
    layers: int
    elements: int
    trained: int

    def times(self, parameter: ParameterShape) -> int:
        """How many parameters it stands for."""
        return self.layers if parameter.name.startswith("blocks.") else 1


def is_closed(recipe: Recipe) -> bool:
    """Whether the closed forms hold."""
    return not (recipe.lora.rank or recipe.train.trainable or recipe.precision.table)


def weights_of(recipe: Recipe, tp: int) -> Weights:
    """What a tp rank holds of the model, whole."""
    model, layers = recipe.model, recipe.model.num_layers
    place = TensorParallel(tp)
    if is_closed(recipe):
        shapes = parameter_shapes(replace(model, num_layers=1), place)
        elements = sum(p.num_elements * (layers if p.name.startswith("blocks.") else 1) for p in shapes)
        return Weights(tuple(shapes), layers, elements, elements)
    every = parameter_shapes(model, place, lora=recipe.lora, trainable=recipe.train.trainable)
    return Weights(tuple(every), 1, elements_of(every), elements_of([p for p in every if p.trained]))


class Sum:
    """Calls and bytes by group and purpose, added up."""

    def __init__(self) -> None:
        self.own: Own = {}

    def add(self, group: str, purpose: str, num_bytes: float, size: int, calls: int) -> None:
        """`calls` collectives of `size` ranks that send (n-1)/n of so many bytes each."""
        if size > 1 and num_bytes and calls:
            before = self.own.get((group, purpose), (0, 0.0))
            self.own[group, purpose] = before[0] + calls, before[1] + (size - 1) * num_bytes * calls / size


def own_sent(recipe: Recipe, shape: MeshShape, micros: Sequence[MicroShape], weights: Weights) -> Own:
    """What our own collectives send in a step; see own_ledger."""
    total = Sum()
    for micro, count in Counter(micros).items():
        for key, (calls, sent) in micro_sent(recipe, shape, micro, weights).items():
            before = total.own.get(key, (0, 0.0))
            total.own[key] = before[0] + count * calls, before[1] + count * sent
    total.add("world", "loss", 2 * precise(recipe), shape.world_size, 1)
    total.add("control", "stop", 2 * 24, shape.world_size, 1)
    if recipe.zero.engine == "fsdp2":
        total.add("tp", "grad_norm", 2 * 8, shape.tp, 1)
    return total.own


def micro_sent(recipe: Recipe, shape: MeshShape, micro: MicroShape, weights: Weights) -> Own:
    """What they send in one micro-batch."""
    if not is_closed(recipe):
        ledger = own_ledger(recipe, shape, 0, [micro])
        return {key: (calls, float(sent)) for key, (calls, sent) in ledger.items() if key[1] not in STEP}
    degrees, total = split_shape(shape, *bucket_degrees(recipe, micro.bucket)), Sum()
    if degrees.tp > 1:
        add_tensor_parallel(total, recipe, degrees, micro, weights)
    n, u, r = degrees.tp, degrees.ulysses, degrees.ring
    layers, again = recipe.model.num_layers, recipe.execution.recompute == "all"
    heads = recipe.model.num_attention_heads // n
    one = part_tokens(recipe, degrees, micro) * recipe.model.attention_head_dim * compute(recipe)
    spread, gathered = heads * one, even_parts(heads, u)[0] * u * one
    total.add("ulysses", "gather_tokens_scatter_heads", 3 * spread, u, layers * (1 + again))
    total.add("ulysses", "scatter_tokens_gather_heads", gathered, u, layers * (1 + again))
    total.add("ulysses", "gather_tokens_scatter_heads", spread, u, layers)
    total.add("ulysses", "scatter_tokens_gather_heads", 3 * gathered, u, layers)
    if r > 1:  # a message is sent whole: (2-1)/2 of twice its bytes
        total.add("ring", "ring", 4 * gathered, 2, layers * (2 + again) * (r - 1))
        total.add("ring", "ring_gradients", 4 * gathered, 2, layers * (r - 1))
    return total.own


def add_tensor_parallel(total: Sum, recipe: Recipe, shape: MeshShape, micro: MicroShape, weights: Weights) -> None:
    """Tokens, norms and replicated weights of a micro-batch."""
    n, c, p, width = shape.tp, compute(recipe), precise(recipe), recipe.model.width
    tokens, seen = part_tokens(recipe, shape, micro), micro.samples * (micro.text + micro.image)
    passes, norms = 2 + (recipe.execution.recompute != "none"), 4 + bool(micro.image)
    layers = recipe.model.num_layers
    for purpose in ("gather_tokens", "scatter_tokens"):
        total.add("tp", purpose, tokens * width * c, n, layers * 3 * passes)
    total.add("tp", "qk_norm", 2 * p * (3 * tokens + seen) / norms, n, layers * norms * passes)
    steps, narrow = micro.samples * micro.timesteps * width * p, micro.samples * width * c
    for size in (steps, 6 * steps, narrow * micro.text, narrow * micro.image):
        total.add("tp", "replicated", 2 * size, n, 1)
    summed = [(p.num_elements, weights.times(p)) for p in weights.shapes if is_summed(p.name)]
    count = sum(times for _, times in summed)
    total.add("tp", "replicated", 2 * c * sum(size * times for size, times in summed) / count, n, count)


def engine_sent(recipe: Recipe, shape: MeshShape, num_micro: int, weights: Weights) -> dict[str, float]:
    """Bytes that the ZeRO engine sends by kind of collective; see engine_traffic."""
    if not is_closed(recipe):
        return {kind: float(sent) for kind, sent in engine_traffic(recipe, shape, 0, num_micro).sent.items()}
    if recipe.zero.engine == "fsdp2":
        return fsdp2_sent(recipe, shape, num_micro, weights)
    c, g = SIZES[recipe.precision.default.compute], SIZES[recipe.precision.default.reduce]
    ranks, stage, half = shape.dp * shape.cp, recipe.zero.stage, recipe.precision.parameters == "bfloat16"
    part = (ranks - 1) / ranks
    decayed = sum(p.num_elements * weights.times(p) for p in weights.shapes if decays(p.name, len(p.shape)))
    groups = [n for n in (decayed, weights.elements - decayed) if n]

    def scalars(size: int, over_zero: float) -> float:
        return 2 * size * (over_zero + (shape.tp - 1) / shape.tp)

    if stage == 3:
        padded = [(p, -(-p.num_elements // ranks) * ranks * weights.times(p)) for p in weights.shapes]
        gathered = sum(count * stage3_gathers(recipe, p, weights, num_micro, shape.tp) for p, count in padded)
        reduced = num_micro * sum(count for _, count in padded)
        sent = {"all_gather": part * gathered * c, "reduce_scatter": part * reduced * g}
        return sent | {"scalars": len(groups) * scalars(8, part)}
    padding = ALIGNMENT * ranks
    whole = sum(-(-n // padding) * padding for n in groups)
    sent = {"all_gather": part * whole * c, "reduce": part * weights.elements * g * (1 if stage == 1 else num_micro)}
    if stage == 1 and half:
        return sent | {"reduce": 2 * part * whole * g, "scalars": scalars(4, 0)}
    return sent | {"scalars": len(groups) * scalars(4, part) + (scalars(1, part) if half else 0)}


def stage3_gathers(recipe: Recipe, parameter: ParameterShape, weights: Weights, num_micro: int, tp: int) -> int:
    """How often DeepSpeed's stage 3 gathers a parameter; see zero_traffic.stage3_gathers."""
    zero = recipe.zero
    if parameter.num_elements <= zero.persistence:
        return 1
    if zero.reuse_distance >= 2 * weights.elements:
        return num_micro
    inside = parameter.name.startswith("blocks.") and not parameter.name.endswith(".scale_shift_table")
    recomputed = inside and recipe.execution.recompute != "none"
    block = elements_of(block_shapes(recipe.model)) // tp
    return num_micro * (3 if recomputed and zero.reuse_distance < 2 * block else 2)


def fsdp2_sent(recipe: Recipe, shape: MeshShape, num_micro: int, weights: Weights) -> dict[str, float]:
    """FSDP2's."""
    row, ranks = recipe.precision.default, shape.dp * shape.cp
    size = recipe.zero.partition_size(ranks)
    replicas, part = ranks // size, (size - 1) / size
    padded = sum(
        -(-p.shape[0] // size) * size * (p.num_elements // p.shape[0]) * weights.times(p) for p in weights.shapes
    )
    gathers = 2 * num_micro if recipe.zero.stage == 3 else 1
    return {
        "all_gather": gathers * part * padded * SIZES[row.compute],
        "reduce_scatter": num_micro * part * padded * SIZES[row.reduce],
        "all_reduce": 2 * (replicas - 1) / replicas * (padded / size) * SIZES[row.reduce],
        "scalars": 2 * part * 8,
    }
