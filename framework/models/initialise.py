"""Initial values of one tensor, by its name.

A tensor is drawn alone, from its own generator, so that any rank can make any tensor in any order. The values are those
of Wan's own initialisation (Wan2.1 `wan/modules/model.py`, `init_weights`), with diffusers' names:

    linears and the patch embedding     uniform(-a, a), a = sqrt(6 / (fan_in + fan_out))    (Glorot and Bengio 2010)
    text and time embedder              normal(0, 0.02^2)
    modulation tables                   normal(0, 1/D)
    norms 1, biases 0, image positions 0, proj_out 0
    adapters: A uniform(-a, a), a = 1 / sqrt(fan_in), B 0      (Kaiming uniform of slope sqrt(5), as PEFT)

One difference: torch's conv3d would give the patch embedding a random bias; here it is zero like the others.

As `proj_out` is zero, so is the first prediction, and the first step's gradient, except that of `proj_out` itself.
"""

import math
import re

import torch
from torch import Tensor

from framework.models.config import LORA_A, LORA_B, ModelConfig

EMBEDDER_STD = 0.02
EMBEDDER_WEIGHT = re.compile(r"condition_embedder\.(time_embedder|text_embedder)\.linear_[12]\.weight")
NORM = re.compile(r"(.*\.)?norm(\d|_q|_k|_added_k)\.(weight|bias)")


def init_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator, config: ModelConfig) -> Tensor:
    """The float32 values of the parameter `name` of the whole, unsplit model, on the generator's device.

    ValueError for a name that no parameter of the model has.
    """
    values = torch.zeros(shape, dtype=torch.float32, device=generator.device)
    if norm := NORM.fullmatch(name):
        return values + 1 if norm.group(3) == "weight" else values
    if name.endswith((".bias", ".pos_embed", f".{LORA_B}.weight")) or name == "proj_out.weight":
        return values
    if name.endswith(f".{LORA_A}.weight"):
        bound = shape[1] ** -0.5
        return values.uniform_(-bound, bound, generator=generator)
    if name.split(".")[-1] == "scale_shift_table":
        return values.normal_(0.0, config.width**-0.5, generator=generator)
    if EMBEDDER_WEIGHT.fullmatch(name):
        return values.normal_(0.0, EMBEDDER_STD, generator=generator)
    if name.endswith(".weight") and len(shape) >= 2:
        bound = math.sqrt(6.0 / (math.prod(shape[1:]) + shape[0]))
        return values.uniform_(-bound, bound, generator=generator)
    raise ValueError(f"no initial value is known for {name!r} of shape {shape}: add its pattern to {__name__}")
