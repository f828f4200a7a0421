"""The objective's distribution of timesteps, and the sampler."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LogitNormalConfig:
    """sigma = sigmoid(N(mean, std^2)), before the shift (SD3, arXiv 2403.03206, equation 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"flow.timesteps.logit_normal.std={self.std} must be above 0")


@dataclass(frozen=True)
class TimestepsConfig:
    """name: the distribution of the noise level sigma. stratified: the samples of a bucket in a step share
    out (0, 1). per_frame: a level for each latent frame, independent of the others (diffusion forcing, arXiv
    2407.01392); sampling and validation have one for all."""

    name: Literal["uniform", "logit_normal"] = "uniform"
    logit_normal: LogitNormalConfig | None = None
    stratified: bool = False
    per_frame: bool = False

    def __post_init__(self) -> None:
        if self.stratified and self.per_frame:
            raise ValueError(
                "flow.timesteps: stratified=true shares out one level a sample, and per_frame=true draws many: "
                "set one of them to false"
            )


@dataclass(frozen=True)
class FixedShiftConfig:
    """value: the shift, the same for every token count. Wan 2.1 trains and samples with 3 at 480p and 5 at 720p."""

    value: float = 1.0

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"flow.shift.fixed.value={self.value} must be above 0; 1 shifts nothing")


@dataclass(frozen=True)
class TokensShiftConfig:
    """shift = value * sqrt(tokens / base_tokens) (SD3, arXiv 2403.03206, equation 23)."""

    value: float = 1.0
    base_tokens: int = 4096

    def __post_init__(self) -> None:
        if not self.value > 0 or self.base_tokens < 1:
            raise ValueError(
                f"flow.shift.tokens: value={self.value} and base_tokens={self.base_tokens} must be above 0"
            )


@dataclass(frozen=True)
class ShiftConfig:
    """name: how noise levels move up with resolution and duration: s' = k s / (1 + (k - 1) s)."""

    name: Literal["fixed", "tokens"] = "fixed"
    fixed: FixedShiftConfig | None = None
    tokens: TokensShiftConfig | None = None


@dataclass(frozen=True)
class FlowConfig:
    """range: the noise levels that are trained, applied after the shift: one expert of two (Wan 2.2: [0.875, 1] and
    [0, 0.875])."""

    timesteps: TimestepsConfig = field(default_factory=TimestepsConfig)
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.range[0] < self.range[1] <= 1:
            raise ValueError(f"flow.range={list(self.range)} must be [lo, hi] with 0 <= lo < hi <= 1")


@dataclass(frozen=True)
class LossConfig:
    """weight: per_sample gives every clip the same weight whatever its length and step, per_token gives it to every
    token, per_step to every step (diffusion/flow.py).
    """

    weight: Literal["per_sample", "per_token", "per_step"] = "per_sample"


@dataclass(frozen=True)
class SamplerConfig:
    """Euler steps; guidance leads away from the prompt `negative`, and 1 needs no pass for it; shift None takes the
    training shift. levels: before the shift, even falls in equal steps to 1 / steps and then to 0; diffusers is the
    grid of its FlowMatchEulerDiscreteScheduler. fps of the file written: None takes the sampled bucket's, else 24.
    """

    steps: int = 30
    guidance: float = 1.0
    negative: str = ""
    shift: float | None = None
    levels: Literal["even", "diffusers"] = "even"
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps} must be at least 1")
        for name in ("shift", "fps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"sampler.{name}={value} must be above 0, or null")


@dataclass(frozen=True)
class SamplesConfig:
    """Videos sampled while training, from the live weights, in the shape of the first bucket of more than one frame.

    every: steps, 0 = never. prompts: a video each. seed: of their noise.
    """

    every: int = 0
    prompts: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"samples.every={self.every} must be at least 0")
        if self.every > 0 and not self.prompts:
            raise ValueError(
                f"samples.every={self.every} but samples.prompts is empty: give it prompts, or set samples.every=0"
            )
