"""The degrees of parallelism."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Final, Literal

from framework.shapes import divisors

AXES = ("dp", "ring", "ulysses", "tp")
GROUP_AXES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "tp": ("tp",),
        "ulysses": ("ulysses",),
        "ring": ("ring",),
        "cp": ("ring", "ulysses"),
        "replica": ("ring", "ulysses", "tp"),
        "dp": ("dp",),
        "zero": ("dp", "ring", "ulysses"),
        "world": AXES,
    }
)


@dataclass(frozen=True)
class MeshConfig:
    """dp * ring * ulysses * tp == world size.

    dp: data parallelism; auto takes what the ranks leave. ring and ulysses: context parallelism over spacetime tokens,
    across and inside the link domain. tp: tensor parallelism.
    """

    dp: int | Literal["auto"] = "auto"
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "ring", "ulysses", "tp"):
            degree = getattr(self, name)
            if degree != "auto" and degree < 1:
                raise ValueError(f"mesh.{name}={degree} must be at least 1")


@dataclass(frozen=True)
class MeshShape:
    """The degrees dp, ring, ulysses and tp, with dp resolved."""

    dp: int
    ring: int
    ulysses: int
    tp: int

    @property
    def world_size(self) -> int:
        return self.dp * self.ring * self.ulysses * self.tp

    @property
    def cp(self) -> int:
        return self.ring * self.ulysses

    @property
    def replica(self) -> int:
        return self.cp * self.tp

    def splits_heads(self, heads: int) -> bool:
        """Whether a model's heads can be split so: tp cuts through none, and every rank of Ulysses gets one."""
        return heads % self.tp == 0 and self.ulysses <= heads // self.tp

    def __str__(self) -> str:
        return f"dp={self.dp} ring={self.ring} ulysses={self.ulysses} tp={self.tp}"


def split_shape(shape: MeshShape, ring: int, ulysses: int) -> MeshShape:
    """The ranks of `shape` cut by a bucket's own ring and ulysses: dp * ring * ulysses, and tp, stay what they are.

    Raises ValueError with the equation, the values and the nearest degrees when it can't be.
    """
    ranks = shape.dp * shape.cp
    if ranks % (ring * ulysses):
        nearest = sorted(divisors(ranks), key=lambda n: abs(n - ring * ulysses))[:2]
        raise ValueError(
            f"a bucket's ring * ulysses must divide mesh.dp * ring * ulysses: {ring} * {ulysses} = {ring * ulysses} "
            f"doesn't divide {shape.dp} * {shape.ring} * {shape.ulysses} = {ranks}; the nearest products that do are "
            f"{' and '.join(map(str, sorted(nearest)))}"
        )
    return MeshShape(ranks // (ring * ulysses), ring, ulysses, shape.tp)


def nearest_shapes(config: MeshConfig, num_ranks: int, *, heads: int | None = None, count: int = 3) -> list[MeshShape]:
    """Meshes of `num_ranks` ranks, those first whose degrees are the least far, as factors, from the wanted ones.
    heads: of a model, which they can split.
    """
    shapes = [
        MeshShape(num_ranks // (ring * ulysses * tp), ring, ulysses, tp)
        for ring, ulysses, tp in product(divisors(num_ranks), repeat=3)
        if num_ranks % (ring * ulysses * tp) == 0
    ]

    def distance(shape: MeshShape) -> float:
        pairs = [(shape.ring, config.ring), (shape.ulysses, config.ulysses), (shape.tp, config.tp)]
        pairs += [] if config.dp == "auto" else [(shape.dp, config.dp)]
        return sum(abs(math.log(got / wanted)) for got, wanted in pairs)

    return sorted((each for each in shapes if heads is None or each.splits_heads(heads)), key=distance)[:count]


def resolve_mesh(
    config: MeshConfig, *, num_ranks: int | None, num_gpus: int = 0, heads: int | None = None
) -> MeshShape:
    """Degrees for the ranks that are there (num_ranks), else for the visible GPUs, else for one replica.

    Raises ValueError with the equation, the values and the nearest meshes that work, when they don't fit. heads: of the
    model, which those can split.
    """
    replica = config.ring * config.ulysses * config.tp
    if config.dp != "auto":
        dp = config.dp
    elif num_ranks is not None:
        dp = num_ranks // replica
    else:
        dp = max(1, num_gpus // replica)
    shape = MeshShape(dp, config.ring, config.ulysses, config.tp)
    if num_ranks is not None and shape.world_size != num_ranks:
        fits = num_ranks // replica
        fix = (
            f"mesh.dp={fits} uses {fits * replica} of the ranks" if fits else f"one replica alone needs {replica} ranks"
        )
        nearest = "; ".join(str(mesh) for mesh in nearest_shapes(config, num_ranks, heads=heads))
        raise ValueError(
            f"dp * ring * ulysses * tp == world_size doesn't hold: {config.dp} * {config.ring} * {config.ulysses} * "
            f"{config.tp} against {num_ranks} ranks; {fix}; the nearest meshes of {num_ranks} ranks: {nearest}"
        )
    return shape
