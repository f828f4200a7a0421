"""Bytes of parameters, master weights, moments and gradients on a rank (ZeRO, arXiv 1910.02054, sections 3.1 and 5).

psi: trained parameters of the rank's tp part. N: ranks that partition. K = 12: AdamW's master weight and moments in
float32.

    deepspeed, stage 1 and 2    c psi   + K psi / N + 4 psi / N      c = 2 in bfloat16, 4 in float32
    deepspeed, stage 3          c psi/N + K psi / N + 4 psi / N
    fsdp2                                 K psi / N + 4 psi / N      the parameters are a cast of the master weights

Gradients are counted between the last backward and the step, reduced and in float32. DeepSpeed's stage 1 with bfloat16
then holds all of them, and the unreduced ones in bfloat16 too: (4 + 2) psi. In float64 (fsdp2) all of it doubles.
Of phi frozen parameters DeepSpeed's stages 1 and 2 hold c phi, its stage 3 c phi / N, and fsdp2 4 phi / N.
What is gathered on the way, buckets, padding and activations come on top; fsdp2's stage 2 gathers c psi in a step.
"""

from dataclasses import dataclass

from framework.parallel.zero.config import SIZES, PrecisionConfig, ZeroConfig


@dataclass(frozen=True)
class StateBytes:
    """Bytes on a rank. host: those of master weights and moments that lie on the host instead."""

    parameters: float
    masters: float
    moments: float
    gradients: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.parameters + self.masters + self.moments + self.gradients


def state_bytes(
    num_parameters: int,
    num_ranks: int,
    *,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    num_gathered: int = 0,
    num_frozen: int = 0,
) -> StateBytes:
    """Of `num_parameters` that are trained, on the dp x cp = `num_ranks` that share them; by the default row of the
    precision table.

    num_gathered: elements of parameters that DeepSpeed's stage 3 keeps gathered (`zero.persistence`). num_frozen:
    parameters besides, counted under `parameters`.
    """
    size = zero.partition_size(num_ranks)
    row, part = precision.default, num_parameters / size
    wide = SIZES[row.parameter]
    if zero.engine == "fsdp2":
        return StateBytes(wide * num_frozen / size, wide * part, 2 * wide * part, wide * part)
    whole = (num_parameters + num_frozen) / (size if zero.stage == 3 else 1)
    parameters = SIZES[row.compute] * (whole + num_gathered * (zero.stage == 3))
    unreduced = zero.stage == 1 and row.compute == "bfloat16"
    gradients = (4 + 2) * num_parameters if unreduced else 4 * part
    if zero.offload == "optimizer":
        return StateBytes(parameters, 0, 0, 0, host=(4 + 8 + 4) * part)
    return StateBytes(parameters, 4 * part, 8 * part, gradients)
