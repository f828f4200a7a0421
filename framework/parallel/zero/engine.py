"""What a ZeRO engine does for the training loop, whoever implements it.

The gradient is d(global mean loss)/d(global tensor). Engines average over the zero group (dp x cp), so `backward`
scales the local sum by  size(zero) / global_count,  once, here and nowhere else.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from framework.batch import Condition, Score, Tokens
from framework.parallel.fragments import Fragment


@dataclass(frozen=True)
class StepStats:
    """grad_norm: global, before clipping. skipped: the norm wasn't finite, or above the limit, and no weight was
    touched.
    """

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """A model whose weights, gradients and optimizer state are partitioned over the zero group."""

    def __call__(self, tokens: Tokens, condition: Condition) -> Tensor:
        """Predict: `B S Q`. A collective in stage 3: every rank of the zero group must call it the same number of
        times.
        """
        ...

    def scored(self, tokens: Tokens, condition: Condition, score: Score) -> Tensor:
        """The same, given to `score`: `B`."""
        ...

    def backward(self, loss_sum: Tensor, *, global_count: float, last: bool) -> None:
        """Accumulate the gradient of loss_sum / global_count; `last` marks the step's last micro-batch."""
        ...

    def step(self, *, lr: float, limit: float = math.inf) -> StepStats:
        """Clip, update, clear the gradients. Skips the update, on all ranks alike, when the gradient's norm before
        clipping isn't finite or is above the limit.
        """
        ...

    def fragments(self) -> list[Fragment]:
        """Live views of the master weights and the two moments, as far as this rank holds them, and of the frozen
        weights in the dtype that they are held in, which have no moments (`shard.trainable`).
        """
        ...

    def refresh(self, *, updates: int | None = None) -> None:
        """After the master weights were written from outside: recompute what is cast or gathered from them.

        updates: what Adam's bias correction has counted, after a load; None leaves the count alone.
        """
        ...

    def gradients(self) -> list[Fragment]:
        """What this rank holds of the reduced gradient, state "grad", between the last backward and the step. No
        collective; views or copies, to be read only.
        """
        ...

    def destroy(self) -> None:
        """Remove hooks and buffers, so that another engine can follow in the same process."""
        ...


def predict(
    module: nn.Module, tokens: Tokens, condition: Condition, dtype: torch.dtype, score: Score | None = None
) -> Tensor:
    """Call a model as engines do: floating-point inputs in its computing dtype, timesteps and positions as they are."""
    image = None if condition.image is None else condition.image.to(dtype)
    prediction: Tensor = module(
        tokens.patches.to(dtype),
        tokens.positions,
        tokens.frame_index,
        tokens.timesteps,
        condition.text.to(dtype),
        layout=tokens.layout,
        text_mask_bl=condition.text_mask,
        image_bnd=image,
        score=score,
    )
    return prediction
