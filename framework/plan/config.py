"""The hardware that a recipe is written for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HardwareConfig:
    """name: a description in plan/hardware/ (h100), or the path of one; "" = this machine's. gpus: how many the recipe
    is meant for, 0 = as many as its mesh names. Only plans read this: a run takes the ranks that it is given.
    """

    name: str = ""
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise ValueError(f"hardware.gpus={self.gpus} must be at least 0")
