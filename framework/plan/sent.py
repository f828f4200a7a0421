"""What a rank sends in a step, in closed form: the same bytes as traffic.py and zero_traffic.py, without their loops
over layers and parameters, for planners that ask a thousand times.

Closed forms hold for a model of which everything is trained, in one row of the precision table; for any other the
ledgers themselves are asked. The rank is the first of its replica: Ulysses and tp deal remainders to the first ranks,
so it has the most to do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from framework.config import decays
from framework.parallel.config import MeshShape, split_shape
from framework.parallel.zero.config import SIZES, ZeroConfig
from framework.plan.parameters import ParameterShape, TensorParallel, block_shapes, elements_of, parameter_shapes
from framework.plan.traffic import MicroShape, compute, is_summed, own_ledger, part_tokens, precise
from framework.plan.zero_traffic import ALIGNMENT, engine_traffic
from framework.recipe import Recipe, bucket_degrees
from framework.shapes import even_parts

Own = dict[tuple[str, str], tuple[int, float]]  # (group, purpose) -> (calls, bytes)
STEP = ("loss", "stop", "grad_norm")  # purposes of a step, whatever its micro-batches


@dataclass(frozen=True)
class Part:
    """Parameters that a tp rank holds alike: so many elements in so many rows. inside: a block's, gathered anew where a
    block is computed again.
    """

    elements: int
    rows: int
    inside: bool


@dataclass(frozen=True)
class Weights:
    """What a tp rank holds of the model: made once for a model, asked for every mesh. parts: with how many parameters
    are so; empty where the closed forms don't hold. count, elements: of all parameters. trained: elements that are.
    decayed: those that AdamW decays. summed: (parameters, elements) whose gradients are summed over tp. block:
    elements of one block.
    """

    parts: tuple[tuple[Part, int], ...]
    count: int
    elements: int
    trained: int
    decayed: int
    summed: tuple[int, int]
    block: int

    def share(self, zero: ZeroConfig, size: int) -> float:
        """Elements that are trained on the first of `size` ranks that partition them. FSDP2 deals out rows of dimension
        0, so it has the whole of a modulation table, whose one row can't be shared.
        """
        if zero.engine == "deepspeed" or not self.parts:
            return self.trained / size
        return sum(times * -(-part.rows // size) * (part.elements // part.rows) for part, times in self.parts)


def is_closed(recipe: Recipe) -> bool:
    """Whether the closed forms hold."""
    return not (recipe.lora.rank or recipe.train.trainable or recipe.precision.table)


def weights_of(recipe: Recipe, tp: int) -> Weights:
    """What a rank of a tp group holds."""
    model, closed, place = recipe.model, is_closed(recipe), TensorParallel(tp)
    one = replace(model, num_layers=1) if closed else model
    shapes = parameter_shapes(one, place, lora=recipe.lora, trainable=recipe.train.trainable)
    layers = model.num_layers if closed else 1
    counted = [(p, layers if p.name.startswith("blocks.") else 1) for p in shapes]
    parts: Counter[Part] = Counter()
    for parameter, times in counted if closed else ():
        inside = parameter.name.startswith("blocks.") and not parameter.name.endswith(".scale_shift_table")
        parts[Part(parameter.num_elements, parameter.shape[0], inside)] += times
    summed = [(p, times) for p, times in counted if is_summed(p.name)]
    return Weights(
        parts=tuple(parts.items()),
        count=sum(times for _, times in counted),
        elements=elements(counted),
        trained=elements([(p, times) for p, times in counted if p.trained]),
        decayed=elements([(p, times) for p, times in counted if decays(p.name, len(p.shape))]),
        summed=(sum(times for _, times in summed), elements(summed)),
        block=elements([(p, 1) for p, _ in counted if p.name.startswith("blocks.0.")]),
    )


def elements(counted: list[tuple[ParameterShape, int]]) -> int:
    """Of parameters that are there so often."""
    return sum(parameter.num_elements * times for parameter, times in counted)


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
    count, size = weights.summed
    total.add("tp", "replicated", 2 * c * size / count, n, count)


def engine_sent(recipe: Recipe, shape: MeshShape, num_micro: int, weights: Weights) -> dict[str, float]:
    """Bytes that the ZeRO engine sends by kind of collective; see engine_traffic."""
    if not is_closed(recipe):
        return {kind: float(sent) for kind, sent in engine_traffic(recipe, shape, 0, num_micro).sent.items()}
    if recipe.zero.engine == "fsdp2":
        return fsdp2_sent(recipe, shape, num_micro, weights)
    c, g = SIZES[recipe.precision.default.compute], SIZES[recipe.precision.default.reduce]
    ranks, stage, half = shape.dp * shape.cp, recipe.zero.stage, recipe.precision.parameters == "bfloat16"
    part = (ranks - 1) / ranks
    groups = [n for n in (weights.decayed, weights.elements - weights.decayed) if n]

    def scalars(size: int, over_zero: float) -> float:
        return 2 * size * (over_zero + (shape.tp - 1) / shape.tp)

    if stage == 3:
        padded = [(p, -(-p.elements // ranks) * ranks * times) for p, times in weights.parts]
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


def stage3_gathers(recipe: Recipe, part: Part, weights: Weights, num_micro: int, tp: int) -> int:
    """How often DeepSpeed's stage 3 gathers a parameter; see zero_traffic.stage3_gathers."""
    zero = recipe.zero
    if part.elements <= zero.persistence:
        return 1
    if zero.reuse_distance >= 2 * weights.elements:
        return num_micro
    again = part.inside and recipe.execution.recompute != "none"
    if again and zero.reuse_distance < 2 * (elements_of(block_shapes(recipe.model)) // tp):
        return 3 * num_micro
    return 2 * num_micro


def fsdp2_sent(recipe: Recipe, shape: MeshShape, num_micro: int, weights: Weights) -> dict[str, float]:
    """FSDP2's."""
    row, ranks = recipe.precision.default, shape.dp * shape.cp
    size = recipe.zero.partition_size(ranks)
    replicas, part = ranks // size, (size - 1) / size
    padded = sum(-(-p.rows // size) * size * (p.elements // p.rows) * times for p, times in weights.parts)
    gathers = 2 * num_micro if recipe.zero.stage == 3 else 1
    return {
        "all_gather": gathers * part * padded * SIZES[row.compute],
        "reduce_scatter": num_micro * part * padded * SIZES[row.reduce],
        "all_reduce": 2 * (replicas - 1) / replicas * (padded / size) * SIZES[row.reduce],
        "scalars": 2 * part * 8,
    }
