"""PROVISIONAL"""

from collections.abc import Sequence
from dataclasses import dataclass

from framework.parallel.config import MeshShape
from framework.plan.memory import StateBytes, state_bytes
from framework.plan.sent import weights_of
from framework.plan.traffic import MicroShape, part_tokens
from framework.recipe import Recipe


@dataclass(frozen=True)
class Peak:
    states: StateBytes
    gathered: float
    activations: float
    host: float

    @property
    def total(self) -> float:
        return self.states.total + self.gathered + self.activations

    def parts(self) -> dict[str, float]:
        s = self.states
        return {
            "parameters": s.parameters,
            "masters": s.masters,
            "moments": s.moments,
            "gradients": s.gradients,
            "gathered": self.gathered,
            "activations": self.activations,
        }


def peak_of(recipe: Recipe, shape: MeshShape, micros: Sequence[MicroShape]) -> Peak:
    w = weights_of(recipe, shape.tp)
    s = state_bytes(w.trained, shape.dp * shape.cp, zero=recipe.zero, precision=recipe.precision)
    tokens = max(part_tokens(recipe, shape, m) for m in micros) / shape.tp
    d = recipe.model.width * 2
    per = {"none": 34, "keep_attention": 6, "all": 1}[recipe.execution.recompute]
    return Peak(s, 0.0, tokens * d * (per * recipe.model.num_layers + 34), s.host)
