"""The most bytes that a rank holds in a step: model states, what is gathered, gradients on their way, and activations.

States are those of memory.py. What is gathered on top of them, of psi parameters in c bytes:

    fsdp2 2        all of it, from the step's first forward to its last backward
    fsdp2 3        what is in no block, and two blocks: the one that computes and the one that is fetched ahead
    deepspeed 3    what `zero.reuse_distance` and `zero.prefetch` let it hold on to, at most all of it; in the forward
                   what arrived of `zero.prefetch` together once more

Gradients on their way are a block's in g bytes as it is reduced; DeepSpeed's stages have a bucket instead
(`zero.bucket_size`, allocated whole). With more than one micro-batch its stage 1 in float32 holds the sum unreduced,
4 psi, and stage 2 a micro-batch's part beside the sum's, c psi / N.

All that, the moment of the most activations and the reduced gradients are taken together, though they may miss each
other by a little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from framework.models.config import NO_ADAPTERS
from framework.parallel.config import MeshShape
from framework.parallel.zero.config import SIZES
from framework.plan.activations import ActivationBytes, activation_bytes
from framework.plan.memory import StateBytes, state_bytes
from framework.plan.sent import Weights, weights_of
from framework.plan.traffic import MicroShape
from framework.recipe import Recipe


@dataclass(frozen=True)
class StepPeak:
    """Bytes on a rank. gathered, gradients: see above, beside the states. host: of optimizer and activations, apart."""

    states: StateBytes
    gathered: float
    gradients: float
    activations: ActivationBytes

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def host(self) -> float:
        return self.states.host + self.activations.host

    def parts(self) -> dict[str, float]:
        """Bytes on the device by name."""
        states = {name: getattr(self.states, name) for name in ("parameters", "masters", "moments", "gradients")}
        return {
            **states,
            "gathered": self.gathered,
            "gradients_on_their_way": self.gradients,
            "activations": self.activations.total,
        }


def most_activations(recipe: Recipe, shape: MeshShape, micros: Sequence[MicroShape]) -> ActivationBytes:
    """Of the micro-batch that has the most. Where weights are frozen, those of a model that is trained whole, which are
    more. Raises ValueError where there is no formula.
    """
    trains_all = replace(recipe, lora=NO_ADAPTERS, train=replace(recipe.train, trainable=[]))
    return max((activation_bytes(trains_all, shape, micro) for micro in set(micros)), key=lambda each: each.total)


def step_peak(
    recipe: Recipe,
    shape: MeshShape,
    micros: Sequence[MicroShape],
    *,
    weights: Weights | None = None,
    activations: ActivationBytes | None = None,
) -> StepPeak:
    """Of a step of `micros` on the first rank of a mesh. Raises ValueError where activations have no formula.

    weights: `weights_of(recipe, shape.tp)`, for who asks for many meshes of one model. activations: `most_activations`,
    for who asks for many engines, which don't change them.
    """
    found = activations or most_activations(recipe, shape, micros)
    weights = weights or weights_of(recipe, shape.tp)
    whole, block = weights.elements, weights.block
    zero, precision, ranks = recipe.zero, recipe.precision, shape.dp * shape.cp
    size, frozen = zero.partition_size(ranks), whole - weights.trained
    held = round(weights.share(zero, size) * size)
    states = state_bytes(held, ranks, zero=zero, precision=precision, num_frozen=frozen)
    c, g = SIZES[precision.default.compute], SIZES[precision.of("").reduce]
    gathered, gradients = 0.0, 0.0
    if zero.engine == "fsdp2":
        outer = whole - recipe.model.num_layers * block
        gathered = c * (whole if zero.stage == 2 else outer + min(2, recipe.model.num_layers) * block)
        gradients = float(g * block)
    else:
        gradients = float(c * zero.bucket_size)
        if zero.stage == 1 and precision.parameters == "float32" and len(micros) > 1:
            gradients += 4 * weights.trained * (1 - 1 / size)
        if zero.stage == 2 and len(micros) > 1:
            gradients += c * weights.trained / size
        if zero.stage == 3:
            gathered = float(c * min(whole, block + zero.prefetch + zero.reuse_distance))
            # In the forward what arrived together is there twice, until the last of it is used.
            forward = found.forward + c * min(whole, zero.prefetch)
            gathered += max(0, forward - found.total)
    return StepPeak(states, gathered, gradients, found)
