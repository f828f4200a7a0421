"""Which implementation computes attention, as data.

`auto` is an alias that is resolved once, before a run starts, by the table below; the resolved name is what the run's
recipe records, so that a later attempt computes the same numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

KernelName = Literal["auto", "aten", "reference"]

RESOLVED: Final[Mapping[KernelName, KernelName]] = MappingProxyType(
    {"auto": "aten", "aten": "aten", "reference": "reference"}
)


@dataclass(frozen=True)
class AttentionConfig:
    """`kernel`: `aten` is torch's `scaled_dot_product_attention`; `reference` a plain softmax, slow and for checks."""

    kernel: KernelName = "auto"

    def __post_init__(self) -> None:
        if self.kernel not in RESOLVED:
            raise ValueError(f"attention kernel {self.kernel!r} is unknown: choose one of {', '.join(RESOLVED)}")


def resolve_attention(config: AttentionConfig) -> AttentionConfig:
    """The same config with `auto` replaced by the kernel that it stands for."""
    return replace(config, kernel=RESOLVED[config.kernel])
