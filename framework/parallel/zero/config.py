"""How parameters, gradients and optimizer state are partitioned over dp x cp, and in which precision they are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final, Literal

from framework.shapes import divisors

Dtype = Literal["default", "float32", "bfloat16", "float64"]
SIZES: Final[Mapping[str, int]] = MappingProxyType({"bfloat16": 2, "float32": 4, "float64": 8})  # bytes
# A row without a rule: what is kept and updated, what forward and backward see, what gradients are summed in.
DEFAULT_ROWS = (
    ("float32", ("float32", "float32", "float32")),
    ("bfloat16", ("float32", "bfloat16", "float32")),
    ("float64", ("float64", "float64", "float64")),
)


@dataclass(frozen=True)
class ZeroConfig:
    """engine: what partitions; deepspeed, or torch's fsdp2. stage: 1 optimizer state, 2 gradients too, 3 parameters too
    (ZeRO, arXiv 1910.02054). With fsdp2 everything is partitioned between steps; stage 2 keeps the gathered parameters
    until the step's last backward, stage 3 gathers them twice a micro-batch, and there is no stage 1.

    partition: ranks over which is partitioned, a divisor of dp x cp; below that (fsdp2 only) every group of so many
    neighbours holds a replica. offload: optimizer keeps master weights and moments on the host, and updates them there
    (deepspeed only). bucket_size: elements of a reduction bucket (DeepSpeed allocates it whole). persistence:
    DeepSpeed's stage 3 keeps parameters of fewer elements than this gathered. reuse_distance: it doesn't release a
    parameter that is used again before so many elements of others: less to gather again, more to hold. prefetch:
    elements that it gathers ahead; what it meets gathered on the way ahead isn't released either.
    """

    engine: Literal["deepspeed", "fsdp2"] = "deepspeed"
    stage: int = 2
    partition: int | Literal["all"] = "all"
    offload: Literal["none", "optimizer"] = "none"
    bucket_size: int = 50_000_000
    persistence: int = 100_000
    reuse_distance: int = 1_000_000_000
    prefetch: int = 50_000_000

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"zero.stage={self.stage}: ZeRO has the stages 1, 2 and 3")
        for name in ("persistence", "reuse_distance", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"zero.{name}={getattr(self, name)} must be at least 0")
        if self.bucket_size < 1:
            raise ValueError(f"zero.bucket_size={self.bucket_size} must be at least 1")
        if self.partition != "all" and self.partition < 1:
            raise ValueError(f"zero.partition={self.partition} must be at least 1, or all")
        if self.engine == "fsdp2" and self.stage == 1:
            raise ValueError(
                "zero.stage=1 with zero.engine=fsdp2: FSDP2 always partitions gradients and parameters between steps; "
                "set zero.stage=2 (parameters stay gathered from forward to backward), or zero.engine=deepspeed"
            )
        if self.engine == "fsdp2" and self.offload != "none":
            raise ValueError(
                f"zero.offload={self.offload} with zero.engine=fsdp2: FSDP2 can't keep the optimizer's state alone on "
                "the host, only the parameters with it; set zero.engine=deepspeed, or zero.offload=none"
            )
        if self.engine == "deepspeed" and self.partition != "all":
            raise ValueError(
                f"zero.partition={self.partition} with zero.engine=deepspeed: its stages partition over all of dp x "
                "cp; set zero.engine=fsdp2, or zero.partition=all"
            )

    def partition_size(self, num_ranks: int) -> int:
        """Ranks over which is partitioned, of the `num_ranks` of dp x cp. Raises ValueError when it doesn't divide."""
        size = num_ranks if self.partition == "all" else self.partition
        if num_ranks % size:
            nearest = sorted(sorted(divisors(num_ranks), key=lambda n: abs(n - size))[:2])
            raise ValueError(
                f"zero.partition must divide dp * ring * ulysses: {num_ranks} % {size} == {num_ranks % size}; the "
                f"nearest that do are {' and '.join(map(str, nearest))}"
            )
        return size


@dataclass(frozen=True)
class Precision:
    """Dtypes of a parameter, by name. parameter: what the optimizer updates. compute: what forward and backward see,
    and what is gathered. reduce: what gradients are summed in over the ranks.
    """

    parameter: str
    compute: str
    reduce: str


@dataclass(frozen=True)
class PrecisionRule:
    """Dtypes of the parameters whose name matches `pattern` (of a shell: * and ?); "default" leaves the row of
    `precision.parameters`.

    parameter: what the optimizer updates. compute: what forward and backward see. reduce: what gradients are summed in.
    """

    pattern: str = "*"
    parameter: Dtype = "default"
    compute: Dtype = "default"
    reduce: Dtype = "default"

    def __post_init__(self) -> None:
        if self.parameter == "bfloat16":
            raise ValueError(
                f"precision.table, pattern {self.pattern!r}: parameter=bfloat16 loses every update below 1/256 of its "
                "weight; set parameter=float32 compute=bfloat16"
            )


@dataclass(frozen=True)
class PrecisionConfig:
    """parameters: what forward and backward compute in, by tables in the model kept at float32 or above for norms, time
    embedding and modulation. Master weights, moments, EMA and reduced gradients are float32, or float64 with float64.

    table: rules for parameters by their name, of which the first that matches counts.
    """

    parameters: Literal["float32", "bfloat16", "float64"] = "float32"
    table: list[PrecisionRule] = field(default_factory=list)

    @property
    def default(self) -> Precision:
        """The row of a parameter without a rule."""
        return Precision(*dict(DEFAULT_ROWS)[self.parameters])

    def of(self, name: str) -> Precision:
        """The row of a parameter."""
        rule = next((rule for rule in self.table if fnmatchcase(name, rule.pattern)), None)
        return self.default if rule is None else self.row(rule)

    def row(self, rule: PrecisionRule) -> Precision:
        """A rule with its defaults filled in."""
        given = {"parameter": rule.parameter, "compute": rule.compute, "reduce": rule.reduce}
        return replace(self.default, **{name: dtype for name, dtype in given.items() if dtype != "default"})


def check_engine(zero: ZeroConfig, precision: PrecisionConfig) -> None:
    """Raises ValueError where the engine can't keep the precision, with the rule and the fix."""
    if zero.engine == "fsdp2":
        return
    if precision.parameters == "float64":
        raise ValueError(
            "precision.parameters=float64 with zero.engine=deepspeed: its master weights and moments are float32; set "
            "zero.engine=fsdp2"
        )
    if precision.parameters == "bfloat16" and zero.stage == 1 and zero.offload == "optimizer":
        raise ValueError(
            "zero.offload=optimizer with zero.stage=1 and precision.parameters=bfloat16: DeepSpeed's optimizer for "
            "that stage, which sums gradients in float32, doesn't offload; set zero.stage=2"
        )
    for rule in precision.table:
        row, default = precision.row(rule), precision.default
        fix = "set zero.engine=fsdp2, or drop the rule"
        if (row.parameter, row.compute) != (default.parameter, default.compute):
            raise ValueError(
                f"precision.table, pattern {rule.pattern!r}: DeepSpeed keeps all parameters alike "
                f"(parameter={default.parameter} compute={default.compute}), not parameter={row.parameter} "
                f"compute={row.compute}; {fix}"
            )
        if row.reduce != precision.of("").reduce or row.reduce == "float64":
            raise ValueError(
                f"precision.table, pattern {rule.pattern!r}: DeepSpeed sums all gradients in one dtype, float32 or "
                f"bfloat16, not reduce={row.reduce} for some; make it one rule with the pattern '*', or {fix}"
            )
