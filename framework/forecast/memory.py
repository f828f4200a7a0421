"""What a rank needs of its device's memory at the peak of a step: what is allocated (plan/peak.py), what context and
communicators take, and what the allocator reserves besides. What counts against a device is what is reserved.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from framework.data.splits import resolve_degrees
from framework.forecast.draws import Draw, deal_of, draws_of
from framework.forecast.encoders import resident_bytes
from framework.models.config import ExecutionConfig
from framework.parallel.config import AXES, GROUP_AXES, MeshShape
from framework.plan.activations import ActivationBytes
from framework.plan.hardware import Hardware
from framework.plan.peak import StepPeak, most_activations, step_peak
from framework.plan.sent import Weights, weights_of
from framework.recipe import Recipe

# The formula is within 10 % of what is counted on CPUs, mostly closer; what a GPU's allocator reserves is assumed.
TIGHT: Final = 0.95
OWN: Final = ("ema", "encoders", "communicators", "context", "headroom")  # of Memory, beside the step's


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. step: what a step allocates, in the bucket that needs the most. ema: its part of the average.
    encoders: those that stay (encoders.py). headroom: reserved and not allocated. capacity: of the device.
    """

    step: StepPeak
    ema: float
    encoders: float
    communicators: float
    context: float
    headroom: float
    capacity: float

    @property
    def total(self) -> float:
        return self.step.total + sum(getattr(self, name) for name in OWN)

    @property
    def host(self) -> float:
        """Bytes in the host's memory."""
        return self.step.host

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    @property
    def used(self) -> float:
        """Share of the device's memory."""
        return self.total / self.capacity

    @property
    def tight(self) -> bool:
        """Whether it fits by less than what the count may be wrong by."""
        return self.fits and self.used > TIGHT

    def parts(self) -> dict[str, float]:
        """By name; their sum is the total."""
        return {**self.step.parts(), **{name: getattr(self, name) for name in OWN}}

    def refusal(self) -> str:
        """Why it doesn't fit."""
        largest = sorted(self.parts().items(), key=lambda part: -part[1])[:3]
        said = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in largest)
        return (
            f"a rank needs {self.total / 1e9:.1f} GB and the device has {self.capacity / 1e9:.1f}: {said}; "
            "`cuboid plan --search` ranks what fits"
        )


class Held:
    """What a rank of a mesh holds whatever its engine is, for recipes that differ in zero and execution alone: a search
    asks for the same again and again. encoders: bytes of those that stay.
    """

    def __init__(self, shape: MeshShape, draws: Sequence[Draw], encoders: float) -> None:
        self.shape, self.draws, self.encoders = shape, draws, encoders
        self.communicators = num_communicators([shape, *(draw.shape for draw in draws)])
        self._activations: dict[ExecutionConfig, list[ActivationBytes]] = {}

    def activations(self, recipe: Recipe) -> list[ActivationBytes]:
        """Of each draw, the most of its micro-batches."""
        found = self._activations.get(recipe.execution)
        if found is None:
            found = [most_activations(recipe, self.shape, draw.micros) for draw in self.draws]
            self._activations[recipe.execution] = found
        return found


def memory_of(recipe: Recipe, hardware: Hardware, held: Held, weights: Weights) -> Memory:
    """Of a rank of a mesh. weights: of its tp part."""
    device, shape = hardware.device, held.shape
    ranks = shape.dp * shape.cp
    peaks = (
        step_peak(recipe, shape, draw.micros, weights=weights, activations=found)
        for draw, found in zip(held.draws, held.activations(recipe), strict=True)
    )
    step = max(peaks, key=lambda peak: peak.total)
    ema = 4 * weights.share(recipe.zero, recipe.zero.partition_size(ranks)) if recipe.ema.decay else 0.0
    return Memory(
        step=step,
        ema=ema,
        encoders=held.encoders,
        communicators=device.communicator * held.communicators,
        context=device.context,
        headroom=(device.headroom - 1) * (step.total + ema + held.encoders),
        capacity=device.memory,
    )


def plan_memory(recipe: Recipe, shape: MeshShape, hardware: Hardware) -> Memory:
    """Of a rank, from the recipe alone. Raises ValueError where the mesh can't be split as the buckets say."""
    recipe = resolve_degrees(recipe, shape)
    draws = draws_of(recipe, shape, deal_of(recipe))
    return memory_of(recipe, hardware, Held(shape, draws, resident_bytes(recipe)), weights_of(recipe, shape.tp))


def num_communicators(shapes: Iterable[MeshShape]) -> int:
    """Process groups of more than one rank that a rank is in; groups of the same ranks share one (parallel/mesh.py)."""
    spans = {ranks_of(shape, axes) for shape in shapes for axes in GROUP_AXES.values()}
    return len(spans - {()})


def ranks_of(shape: MeshShape, axes: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """The ranks of a group as (stride, count) from the inside out, neighbouring axes as one: equal for equal ranks."""
    found: list[tuple[int, int]] = []
    stride = 1
    for axis in reversed(AXES):
        size = getattr(shape, axis)
        if axis in axes and size > 1:
            joins = found and found[-1][0] * found[-1][1] == stride
            found[-1:] = [(found[-1][0], found[-1][1] * size)] if joins else [*found[-1:], (stride, size)]
        stride *= size
    return tuple(found)
