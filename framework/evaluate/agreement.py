"""How far two runs of one recipe are apart: samples, losses, gradients, norms, weights.

The error of a tensor is max|a - b| / max|b|. Limits (float32: what different orders of summation lead to, measured):

    float64    1e-12 in the loss and the gradient; no step is taken
    float32    5e-6 in a gradient, 1e-5 in a norm, 1e-4 in losses and weights
    bfloat16   twice the error that the reference mesh itself has in bfloat16 against its float32; as a single number's
               error can be small by chance, losses and norms are judged by their largest error over the steps
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What a run on a mesh came to. samples: draw -> digest. gradients and weights: whole tensors by name."""

    samples: Mapping[str, str]
    gradients: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    losses: tuple[float, ...]
    norms: tuple[float, ...]

    def save(self, path: Path) -> None:
        """Write it as an npz file."""
        arrays = {f"gradient/{name}": value for name, value in self.gradients.items()}
        arrays |= {f"weight/{name}": value for name, value in self.weights.items()}
        plain = json.dumps({"samples": dict(self.samples), "losses": self.losses, "norms": self.norms})
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, plain=np.array(plain), **arrays)

    @staticmethod
    def load(path: Path) -> "Observation":
        """Read it back."""
        with np.load(path) as file:
            plain = json.loads(str(file["plain"]))
            parts = {name: file[name] for name in file.files}
        return Observation(
            samples=plain["samples"],
            gradients={n.removeprefix("gradient/"): v for n, v in parts.items() if n.startswith("gradient/")},
            weights={n.removeprefix("weight/"): v for n, v in parts.items() if n.startswith("weight/")},
            losses=tuple(plain["losses"]),
            norms=tuple(plain["norms"]),
        )


@dataclass(frozen=True)
class Limits:
    """Largest errors that are let pass."""

    loss: float
    gradient: float
    norm: float
    curve: float
    weight: float


LIMITS: Final[Mapping[str, Limits]] = MappingProxyType(
    {
        "float64": Limits(loss=1e-12, gradient=1e-12, norm=1e-12, curve=1e-12, weight=1e-12),
        "float32": Limits(loss=1e-5, gradient=5e-6, norm=1e-5, curve=1e-4, weight=1e-4),
    }
)


@dataclass(frozen=True)
class Errors:
    """Of one mesh against another: largest relative errors, and the tensors where they are. loss, gradient and norm are
    the first step's, curve and norms the largest over all.
    """

    same_samples: bool
    loss: float
    gradient: float
    gradient_name: str
    norm: float
    curve: float
    norms: float
    weight: float
    weight_name: str

    def within(self, limits: Limits) -> bool:
        """Whether the meshes agree. NaN never does."""
        return self.same_samples and all(
            error <= limit
            for error, limit in (
                (self.loss, limits.loss),
                (self.gradient, limits.gradient),
                (self.norm, limits.norm),
                (self.curve, limits.curve),
                (self.weight, limits.weight),
            )
        )


def compare(got: Observation, reference: Observation) -> Errors:
    """How far `got` is from the reference."""
    gradient_name, gradient = worst(got.gradients, reference.gradients)
    weight_name, weight = worst(got.weights, reference.weights)
    curve, norms = (
        [abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in ((got.losses, reference.losses), (got.norms, reference.norms))
    )
    return Errors(
        same_samples=dict(got.samples) == dict(reference.samples),
        loss=curve[0],
        gradient=gradient,
        gradient_name=gradient_name,
        norm=norms[0],
        curve=max(curve),
        norms=max(norms),
        weight=weight,
        weight_name=weight_name,
    )


def worst(got: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """The tensor with the largest error; a tensor that only one of them has is infinitely far."""
    errors = {name: float("inf") for name in got.keys() ^ reference.keys()}
    for name in got.keys() & reference.keys():
        a, b = got[name].astype(np.float64), reference[name].astype(np.float64)
        error = float(np.abs(a - b).max() / max(float(np.abs(b).max()), np.finfo(np.float64).tiny))
        errors[name] = float("inf") if np.isnan(error) else error
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]


def bfloat16_limits(own: Errors) -> Limits:
    """Twice what the first mesh itself is off by in bfloat16."""
    return Limits(
        loss=2 * own.curve,
        gradient=2 * own.gradient,
        norm=2 * own.norms,
        curve=2 * own.curve,
        weight=2 * own.weight,
    )
