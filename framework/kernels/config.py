"""Which implementation computes attention, as data.

`ROWS` says what each kernel can do on a device; everything that is chosen or refused follows from it. `auto` is an
alias that is resolved once, before a run starts, to the first row that fits; the resolved name is what the run's recipe
records, so that a later attempt computes the same numbers.

Where the columns come from: flash-attn and torch's own flash take a `deterministic` argument in their backward (torch
reads `use_deterministic_algorithms`); torch's memory-efficient backward, float32 on a GPU, then doesn't split the keys;
for cuDNN's backward torch has no such mode, and leaves it out itself under deterministic algorithms (sdp_utils.cpp).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from types import MappingProxyType
from typing import Final, Literal

KernelName = Literal["auto", "flash", "cudnn", "aten", "reference"]
Device = Literal["cuda", "cpu"]

NAMES: Final = ("auto", "flash", "cudnn", "aten", "reference")
# flash-attn's generations -> the distribution that brings them. All three may name their package flash_attn, so it is
# the distribution that is asked for.
FLASH_DISTRIBUTIONS: Final[Mapping[int, str]] = MappingProxyType(
    {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}
)
# Major compute capability -> generations, the fastest first. 3 is written for Hopper, 4 for Hopper and Blackwell (and
# has no backward below); 2 runs everywhere, at little more than half of 3's speed on Hopper.
FLASH_ORDER: Final[Mapping[int, tuple[int, ...]]] = MappingProxyType(
    {8: (2, 3), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (4, 2)}
)


@dataclass(frozen=True)
class Row:
    """What a `kernel` does on a `device`.

    dtypes: of q, k and v. deterministic: whether its backward can be. head_multiple, head_max: channels of a head.
    """

    kernel: KernelName
    device: Device
    dtypes: tuple[str, ...]
    deterministic: bool
    head_multiple: int
    head_max: int


HALF: Final = ("bfloat16",)
ALL: Final = ("bfloat16", "float32", "float64")
ANY: Final = 1 << 16
# In auto's order, which is that of measured speed on H100 (full attention, 32k tokens, d = 128,
# bfloat16, forward and backward in TFLOP/s: flash-attn 3 701 and 600, cuDNN 618 and 534, flash-attn 2, which torch's
# own is too, 376 and 335).
ROWS: Final = (
    Row("flash", "cuda", HALF, True, 8, 256),
    Row("cudnn", "cuda", HALF, False, 8, 128),
    Row("aten", "cuda", HALF, True, 8, 256),
    Row("aten", "cuda", ("float32",), True, 4, ANY),
    Row("aten", "cpu", ALL, True, 1, ANY),
    Row("reference", "cuda", ALL, True, 1, ANY),
    Row("reference", "cpu", ALL, True, 1, ANY),
)


@dataclass(frozen=True)
class BlockCausalConfig:
    """frames: of a block, all of whose tokens attend to each other and to all earlier blocks."""

    frames: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"attention.pattern.block_causal.frames={self.frames} must be at least 1")


@dataclass(frozen=True)
class WindowConfig:
    """frames: that a token sees on both sides of its own. sinks: of the clip's first frames, which all tokens see."""

    frames: int = 16
    sinks: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"attention.pattern.window.{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True)
class PatternConfig:
    """name: which tokens of a clip attend to each other, by their latent frames (kernels/pattern.py). Text is seen by
    all. A clip no longer than the window, or than one block, is attended in full.
    """

    name: Literal["full", "block_causal", "window"] = "full"
    block_causal: BlockCausalConfig | None = None
    window: WindowConfig | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """`kernel`: `flash` is flash-attn 2, 3 or 4, whichever is installed; `cudnn` cuDNN's; `aten` torch's own;
    `reference` a plain softmax, slow and for checks. auto: the fastest that is there and can do what the recipe needs.
    pattern: which tokens attend to each other, by any kernel.
    """

    kernel: KernelName = "auto"
    pattern: PatternConfig = field(default_factory=PatternConfig)

    def __post_init__(self) -> None:
        if self.kernel not in NAMES:
            raise ValueError(f"attention kernel {self.kernel!r} is unknown: choose one of {', '.join(NAMES)}")


@dataclass(frozen=True)
class AttentionNeeds:
    """What a run asks of its kernel.

    dtype: what q, k and v are computed in. head_dim: channels of a head. deterministic: the backward must sum in a
    fixed order. has_gpu: where it runs. capability: of that GPU, None where it isn't known.
    """

    dtype: str
    head_dim: int
    deterministic: bool
    has_gpu: bool
    capability: tuple[int, int] | None = None

    @property
    def device(self) -> Device:
        return "cuda" if self.has_gpu else "cpu"


def installed_flash() -> tuple[int, ...]:
    """The generations of flash-attn that are installed, found without importing them (they import torch)."""
    found = []
    for generation, distribution in FLASH_DISTRIBUTIONS.items():
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        found.append(generation)
    return tuple(found)


def resolve_attention(config: AttentionConfig, needs: AttentionNeeds, flash: tuple[int, ...]) -> AttentionConfig:
    """The same config with `auto` replaced by the kernel that it stands for. flash: what `installed_flash` found."""
    if config.kernel != "auto":
        return config
    fits = (row.kernel for row in ROWS if row.device == needs.device and not shortcomings(row, needs, flash))
    return replace(config, kernel=next(fits))


def check_attention(config: AttentionConfig, needs: AttentionNeeds, flash: tuple[int, ...]) -> None:
    """Raises ValueError when the kernel can't do what is needed, with every reason and the kernel that can."""
    if config.kernel == "auto":
        return
    here = [row for row in ROWS if row.kernel == config.kernel and row.device == needs.device]
    reasons = [shortcomings(row, needs, flash) for row in here]
    if here and not all(reasons):
        return
    if not here:
        row = next(row for row in ROWS if row.kernel == config.kernel)
        reasons = [["it needs a GPU, and none is visible here", *shortcomings(row, needs, flash)]]
    fewest = min(reasons, key=lambda found: len(found))
    can = resolve_attention(AttentionConfig(), needs, flash).kernel
    raise ValueError(f"attention.kernel={config.kernel}: {'; '.join(fewest)}; attention.kernel={can} can")


def shortcomings(row: Row, needs: AttentionNeeds, flash: tuple[int, ...]) -> list[str]:
    """What the row lacks of what is needed, and what would help."""
    found = []
    if row.kernel == "flash" and not flash:
        found.append(
            f"none of {', '.join(FLASH_DISTRIBUTIONS.values())} is installed: `pip install flash-attn-4` (Hopper, "
            "Blackwell) or `pip install flash-attn --no-build-isolation`"
        )
    elif row.kernel == "flash" and needs.capability and not fitting_flash(flash, needs.capability, needs.deterministic):
        have, (major, minor) = ", ".join(FLASH_DISTRIBUTIONS[one] for one in flash), needs.capability
        found.append(f"{have} has no backward that fits here for this GPU's compute capability {major}.{minor}")
    if needs.dtype not in row.dtypes:
        found.append(f"it computes in {', '.join(row.dtypes)}, not in precision.parameters={needs.dtype}")
    if needs.head_dim % row.head_multiple or needs.head_dim > row.head_max:
        most = f" and at most {row.head_max}" if needs.head_dim > row.head_max else ""
        found.append(
            f"it needs model.attention_head_dim % {row.head_multiple} == 0{most}, and that is {needs.head_dim}"
        )
    if needs.deterministic and not row.deterministic:
        found.append("its backward isn't deterministic, which train.deterministic asks for")
    return found


def fitting_flash(installed: tuple[int, ...], capability: tuple[int, int], deterministic: bool) -> int | None:
    """The fastest generation of flash-attn, of those installed, that runs on a GPU."""
    order = FLASH_ORDER.get(capability[0], ())
    # flash-attn-4 asserts a deterministic backward away on 12.x.
    left_out = {4} if deterministic and capability[0] == 12 else set()
    return next((one for one in order if one in installed and one not in left_out), None)
