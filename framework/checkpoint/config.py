"""When checkpoints are written, where to, and how many stay."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between saves (one more is written at the end). store: where they go, a directory or
    s3://bucket/prefix; "" is RUN/checkpoints.

    What stays: the newest `keep`; with keep_every those whose step is a multiple of it; those with a name (`cuboid
    checkpoint keep`). Where that is more than max_gigabytes (10^9 bytes, 0 = no limit), the oldest without a name go,
    never the newest.

    local: a directory of the node itself, written first and copied from there to the store; a resume on the same nodes
    reads it. layout: own, every rank writes what it holds; even, the ranks exchange pieces first, so that each writes
    an equal range in few large boxes; adaptive takes even where own would make more than a hundred thousand boxes.
    retries: further tries of a save that failed, before the run stops.
    """

    every: int = 500
    store: str = ""
    keep: int = 3
    keep_every: int = 0
    max_gigabytes: float = 0.0
    local: str = ""
    layout: Literal["adaptive", "own", "even"] = "adaptive"
    retries: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be at least 1")
        for name in ("keep_every", "max_gigabytes", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least 0")
        if "://" in self.local:
            raise ValueError(
                f"checkpoint.local={self.local} must be a directory of the node; set checkpoint.store to it"
            )
