"""Bytes that a ZeRO engine sends from one rank in a step, by the bandwidth-optimal algorithm (what counts is said in
parallel/zero/meter.py), and the least that its stage needs.

Of a step of m micro-batches; a rank's psi parameters, tau of them trained, of c bytes each where they compute and g
where they are reduced; N ranks that partition, R replicas of what they hold together:

    deepspeed 1   (N-1)/N (c tau + g tau)            with bfloat16 its optimizer all-reduces: g tau twice
    deepspeed 2   (N-1)/N (c tau + m g tau)
    deepspeed 3   (N-1)/N (k m c psi + m g tau)
    fsdp2 2       (N-1)/N (c psi + m g tau)          + 2 (R-1)/R g tau / N
    fsdp2 3       (N-1)/N (2 m c psi + m g tau)      + 2 (R-1)/R g tau / N

That is the minimum. What is sent has the norm's scalars and padding in it: a multiple of 2 N elements in each of
DeepSpeed's two groups of parameters (stages 1 and 2, what is gathered), of N in every parameter (stage 3), of N rows
(fsdp2).

k of DeepSpeed's stage 3: 1 where `zero.reuse_distance` spans the model there and back (2 psi): nothing is released
before its backward. Else 2, and with recompute 3 for blocks of which it doesn't span two. In between it keeps some and
prefetches past others, so 2 is an upper bound, exact for `zero.reuse_distance=0 zero.prefetch=0`. Parameters of at most
`zero.persistence` elements are gathered once a step.

Where weights are frozen, a module that no backward reaches (backward.py) is gathered for the forward alone; fsdp2 asks
so of whole blocks, and prefetches one block more than is reached (one group of parameters: with several rows of the
precision table in a block this is an upper bound). DeepSpeed's stage 3 holds what is frozen from its recomputation to
its backward.

Source: ZeRO, arXiv 1910.02054, section 7; hybrid sharding: PyTorch FSDP, arXiv 2304.11277, section 3.2.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from framework.config import decays
from framework.parallel.config import MeshShape
from framework.parallel.zero.config import SIZES
from framework.plan.backward import Reach, module_of
from framework.plan.parameters import ParameterShape, TensorParallel, block_shapes, elements_of, parameter_shapes
from framework.plan.traffic import share
from framework.recipe import Recipe

ALIGNMENT: Final = 2  # DeepSpeed's stages 1 and 2 pad a group to this many times N


@dataclass(frozen=True)
class EngineTraffic:
    """Bytes by kind of collective; minimum: of all of them, without padding and without the scalars of the norm."""

    sent: dict[str, Fraction]
    minimum: Fraction

    @property
    def total(self) -> Fraction:
        return sum(self.sent.values(), Fraction())

    @property
    def ratio(self) -> float:
        """What is sent against the minimum; 1 where nothing has to be."""
        return float(self.total / self.minimum) if self.minimum else 1.0


def engine_traffic(recipe: Recipe, shape: MeshShape, rank: int, num_micro: int) -> EngineTraffic:
    """Of a step of so many micro-batches on a rank of a mesh, from the fourth step on: in the first ones DeepSpeed's
    stage 3 traces the model.
    """
    tp, patterns = TensorParallel(shape.tp, rank % shape.tp), recipe.train.trainable
    parameters = parameter_shapes(recipe.model, tp, lora=recipe.lora, trainable=patterns)
    match recipe.zero.engine:
        case "deepspeed":
            return deepspeed_traffic(recipe, shape, parameters, num_micro)
        case "fsdp2":
            return fsdp2_traffic(recipe, shape, parameters, num_micro)


def deepspeed_traffic(
    recipe: Recipe, shape: MeshShape, parameters: list[ParameterShape], num_micro: int
) -> EngineTraffic:
    """DeepSpeed's stages."""
    c, g = SIZES[recipe.precision.default.compute], SIZES[recipe.precision.of("").reduce]
    ranks, stage = shape.dp * shape.cp, recipe.zero.stage
    trained, half = [p for p in parameters if p.trained], recipe.precision.parameters == "bfloat16"
    decayed = elements_of([p for p in trained if decays(p.name, len(p.shape))])
    whole = elements_of(trained)
    groups = [n for n in (decayed, whole - decayed) if n]
    if stage == 3:
        gathers, reach = elements_of(parameters), Reach(recipe.model, parameters)
        times = [(p.num_elements, stage3_gathers(recipe, p, gathers, num_micro, reach)) for p in parameters]
        padded = sum(-(-p.num_elements // ranks) * ranks for p in trained)
        gathered = sum(-(-count // ranks) * ranks * k for count, k in times)
        sent = {"all_gather": share(gathered * c, ranks), "reduce_scatter": num_micro * share(padded * g, ranks)}
        minimum = share(sum(count * k for count, k in times) * c, ranks) + num_micro * share(whole * g, ranks)
        scalars = len(groups) * (2 * share(8, ranks) + 2 * share(8, shape.tp))  # of each group: its norm in float64
    else:
        reductions = 1 if stage == 1 else num_micro
        padded = sum(-(-n // (ALIGNMENT * ranks)) * ALIGNMENT * ranks for n in groups)
        sent = {"all_gather": share(padded * c, ranks), "reduce": reductions * share(whole * g, ranks)}
        minimum = sum(sent.values(), Fraction()) - share((padded - whole) * c, ranks)
        scalars = len(groups) * (2 * share(4, ranks) + 2 * share(4, shape.tp))
        if stage == 1 and half:
            sent["reduce"], scalars = 2 * share(padded * g, ranks), 2 * share(4, shape.tp)
        elif half:
            scalars += 2 * share(1, ranks) + 2 * share(1, shape.tp)  # whether a gradient overflowed
    return EngineTraffic(sent | {"scalars": scalars}, minimum)


def stage3_gathers(recipe: Recipe, parameter: ParameterShape, whole: int, num_micro: int, reach: Reach) -> int:
    """How often a step of DeepSpeed's stage 3 gathers a parameter (k m of the docstring)."""
    zero = recipe.zero
    if parameter.num_elements <= zero.persistence:
        return 1
    if zero.reuse_distance >= 2 * whole:
        return num_micro
    block = elements_of(block_shapes(recipe.model)) // recipe.mesh.tp
    # A block's own table is held while the block is computed again.
    inside = re.fullmatch(r"blocks\.\d+\.(?!scale_shift_table).*", parameter.name) is not None
    recomputed = inside and is_recomputed(recipe, block_of(parameter.name)) and block_of(parameter.name) in reach
    again = recomputed and zero.reuse_distance < 2 * block and parameter.trained
    backward = module_of(parameter.name) in reach
    return num_micro * (1 + (recomputed + backward if again else recomputed or backward))


def is_recomputed(recipe: Recipe, block: str) -> bool:
    """Whether a block is, by its name."""
    return recipe.execution.recomputes(int(block.removeprefix("blocks.")), recipe.model.num_layers)


def block_of(parameter: str) -> str:
    """The block that a parameter is in; "" for the model, which every backward reaches."""
    return ".".join(parameter.split(".")[:2]) if parameter.startswith("blocks.") else ""


def next_block(block: str) -> str:
    """The block after one."""
    return f"blocks.{int(block.removeprefix('blocks.')) + 1}"


def fsdp2_traffic(recipe: Recipe, shape: MeshShape, parameters: list[ParameterShape], num_micro: int) -> EngineTraffic:
    """FSDP2: rows of dimension 0 are dealt to the ranks in equal parts."""
    ranks = shape.dp * shape.cp
    size = recipe.zero.partition_size(ranks)
    replicas, reach = ranks // size, Reach(recipe.model, parameters)
    sent = {"all_gather": Fraction(), "reduce_scatter": Fraction(), "all_reduce": Fraction()}
    minimum = Fraction()
    for parameter in parameters:
        row = recipe.precision.of(parameter.name)
        rows, elements = parameter.shape[0], parameter.num_elements
        padded = -(-rows // size) * size * (elements // rows)
        c, g = SIZES[row.compute], SIZES[row.reduce]
        block = block_of(parameter.name)
        twice = block in reach or (block != "" and next_block(block) in reach)
        gathers = num_micro * (1 + twice) if recipe.zero.stage == 3 else 1
        sent["all_gather"] += gathers * share(padded * c, size)
        minimum += gathers * share(elements * c, size)
        if parameter.trained:
            sent["reduce_scatter"] += num_micro * share(padded * g, size)
            sent["all_reduce"] += 2 * share(padded // size * g, replicas)
            minimum += num_micro * share(elements * g, size)
            minimum += Fraction(2 * (replicas - 1) * elements * g, replicas * size)
    return EngineTraffic(sent | {"scalars": 2 * share(8, size)}, minimum)
