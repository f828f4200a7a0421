"""The loss on held-out clips."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ValidationConfig:
    """every: steps, 0 = never. shards: directories of held-out clips. samples: clips a bucket. sigmas: noise levels
    each.

    held_out: refuse when a clip is also trained on; only a recipe that overfits on purpose sets it to false.
    """

    every: int = 0
    shards: list[str] = field(default_factory=list)
    samples: int = 32
    sigmas: int = 8
    held_out: bool = True

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"validation.every={self.every} must be at least 0")
        if self.every > 0 and not self.shards:
            raise ValueError(
                f"validation.every={self.every} but validation.shards is empty: name a directory of shards, or set 0"
            )
        if self.samples < 1 or self.sigmas < 1:
            raise ValueError(
                f"validation.samples={self.samples} and validation.sigmas={self.sigmas} must be at least 1"
            )
