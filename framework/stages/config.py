"""What ends a stage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlateauConfig:
    """evaluations: validations in a row without a relative improvement above min_improvement of the mean loss of the
    live weights, against the best of the stage before them.
    """

    evaluations: int = 0
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError(
                f"plateau.evaluations={self.evaluations} must be at least 1: how many validations to look at"
            )
        if not 0 <= self.min_improvement < 1:
            raise ValueError(f"plateau.min_improvement={self.min_improvement} must lie in [0, 1): a share of the loss")


@dataclass(frozen=True)
class ExitConfig:
    """One of steps: optimizer steps of the stage; samples: of the stage, the step that reaches them being the last;
    plateau, with steps as its bound.
    """

    steps: int | None = None
    samples: int | None = None
    plateau: PlateauConfig | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.samples is not None and (self.steps is not None or self.plateau is not None):
            raise ValueError("samples stands alone: leave steps and plateau out, or samples")
        if self.plateau is not None and self.steps is None:
            raise ValueError("a plateau may never come: add steps, the most that the stage may take")
        if self.steps is None and self.samples is None:
            raise ValueError("say steps: N, samples: N, or plateau with steps")

    def __str__(self) -> str:
        if self.samples is not None:
            return f"{self.samples:,} samples"
        return f"{self.steps:,} steps" if self.plateau is None else f"a plateau, at most {self.steps:,} steps"
