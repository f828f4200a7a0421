"""The sections of a recipe that belong to the loop itself: optimizer, average, length, guard, log and resume."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: lr, betas, eps and weight_decay as in arXiv 1711.05101. clip: largest global gradient norm, 0 = off.

    warmup: steps of linear rise. schedule: what follows, down to lr * final at decay_steps (auto: the train.steps that
    the run starts with, so that raising them later changes nothing).
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    final: float = 0.0
    decay_steps: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr={self.lr} must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must lie in [0, 1)")
        if self.decay_steps != "auto" and self.decay_steps < 1:
            raise ValueError(f"optimizer.decay_steps={self.decay_steps} must be at least 1, or auto")
        for name in ("eps", "weight_decay", "clip", "warmup", "final"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be at least 0")


def decays(name: str, num_dims: int) -> bool:
    """Whether weight decay applies to a parameter: to weights of two and more dimensions, not to biases, norms and
    modulation tables.
    """
    return num_dims >= 2 and "scale_shift_table" not in name


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the fp32 master weights with the decay min(decay, (1 + n) / (10 + n)) at step n.
    decay=0: none is kept, as it would be the weights themselves.
    """

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must lie in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimizer steps. trainable: shell patterns on names of parameters that are trained; empty = everything, or
    with `lora.rank` the adapters alone, which are trained in any case. deterministic: only kernels with a fixed order
    of summation. collect_garbage_every: steps between Python's garbage collections, which are otherwise off.
    max_bad_steps: updates skipped in a row (`guard`) before the run goes back, or stops.
    """

    steps: int = 1000
    trainable: list[str] = field(default_factory=list)
    deterministic: bool = False
    collect_garbage_every: int = 100
    max_bad_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "collect_garbage_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class GuardConfig:
    """What is done about bad updates. One whose gradient norm isn't finite is always skipped.

    spike: skip also where the norm, before clipping, is above `spike` times the median of the last `window` good ones;
    0 = off. rollbacks: train.max_bad_steps of them in a row go back to the newest checkpoint and pass over the data
    since; so often without a new checkpoint, then the run stops. hash_every: steps between comparisons of the weights
    that all tensor-parallel ranks hold alike, 0 = off; with tp=1 there are none.
    """

    spike: float = 0.0
    window: int = 128
    rollbacks: int = 2
    hash_every: int = 1000

    def __post_init__(self) -> None:
        if self.spike and not 1 < self.spike < float("inf"):
            raise ValueError(f"guard.spike={self.spike} must be above 1 (times the median norm), or 0 for no limit")
        if self.window < 1:
            raise ValueError(f"guard.window={self.window} must be at least 1")
        for name in ("rollbacks", "hash_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True)
class LogConfig:
    """every: steps between printed lines. tensorboard: also write event files into the run directory. wandb: project of
    Weights & Biases, to which all attempts report as one run; "" = none.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")


@dataclass(frozen=True)
class ResumeConfig:
    """allow: keys that may differ from the stored recipe although they change the data order, the loss or the model.
    fall_back: where the newest checkpoint is damaged, go on from the newest one that is whole. Both are for one start.
    """

    allow: list[str] = field(default_factory=list)
    fall_back: bool = False
