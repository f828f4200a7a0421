"""When checkpoints are written, and how many stay."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between saves (one more is written at the end). keep: the newest ones that stay."""

    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be at least 1")
