"""How parameters, gradients and optimizer state are partitioned over dp x cp, and in which precision they are kept."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ZeroConfig:
    """engine: what partitions. stage: 1 optimizer state, 2 gradients too, 3 parameters too (ZeRO, arXiv 1910.02054).

    bucket_size: elements of a reduction bucket (DeepSpeed allocates it whole). persistence: stage 3 keeps parameters of
    fewer elements than this gathered.
    """

    engine: Literal["deepspeed"] = "deepspeed"
    stage: int = 2
    bucket_size: int = 50_000_000
    persistence: int = 100_000

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"zero.stage={self.stage}: ZeRO has the stages 1, 2 and 3")
        if self.persistence < 0:
            raise ValueError(f"zero.persistence={self.persistence} must be at least 0")
        if self.bucket_size < 1:
            raise ValueError(f"zero.bucket_size={self.bucket_size} must be at least 1")


@dataclass(frozen=True)
class PrecisionConfig:
    """parameters: what forward and backward compute in, by tables in the model kept at float32 or above for norms, time
    embedding and modulation. Master weights, moments, EMA and accumulated gradients are float32 either way."""

    parameters: Literal["float32", "bfloat16"] = "float32"
