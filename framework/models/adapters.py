"""Low-rank adapters beside the model's linears (LoRA, arXiv 2106.09685), on one device:

    y = W x + b + (alpha / rank) B A x        A: rank in, uniform;  B: out rank, zero at first, so y begins at W x + b

The linear keeps its name and its parameters, and has the two matrices below it: `blocks.0.attn1.to_q.weight`,
`blocks.0.attn1.to_q.lora_A.weight` and `.lora_B.weight`, PEFT's names.

An adapter file as diffusers' `WanPipeline.load_lora_weights` and PEFT read it is one safetensors file of those names
below `transformer.` (`file_name`), with `file_metadata` as its metadata. A merged weight W + (alpha / rank) B A needs
no adapter (`merged`).
"""

import json
from collections.abc import Iterable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.models.config import LORA_A, LORA_B, LoraConfig, is_adapter
from framework.models.layers import PreciseLinear, Seam, TokenLinear, Use, as_it_is

ADAPTER_FILE: Final = "pytorch_lora_weights.safetensors"
METADATA_KEY: Final = "lora_adapter_metadata"  # diffusers' `loaders/lora_base.py`


class Factor(nn.Module):
    """One of an adapter's matrices: `... in` -> `... out` in x's dtype, which is its linear's computing dtype."""

    upcasts = True
    on_tokens: Seam = staticmethod(as_it_is)

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.on_tokens(self.weight).to(x.dtype))


class Adapted(nn.Module):
    """What adapted linears have in common."""

    scale: float
    lora_A: Factor
    lora_B: Factor

    def attach(self, lora_a: Factor, lora_b: Factor, scale: float) -> None:
        """Take the two matrices."""
        self.lora_A, self.lora_B, self.scale = lora_a, lora_b, scale

    def add_adapter(self, out: Tensor, x: Tensor) -> Tensor:
        """out + scale B A x."""
        return torch.add(out, self.lora_B(self.lora_A(x)), alpha=self.scale)


class AdaptedLinear(Adapted, nn.Linear):
    """An adapted linear."""

    def forward(self, input: Tensor) -> Tensor:
        return self.add_adapter(nn.Linear.forward(self, input), input)


class AdaptedPreciseLinear(Adapted, PreciseLinear):
    """An adapted linear of the time embedding."""

    def forward(self, input: Tensor) -> Tensor:
        out = PreciseLinear.forward(self, input)
        return self.add_adapter(out, input.to(out.dtype))


class AdaptedTokenLinear(Adapted, TokenLinear):
    """An adapted head."""

    def forward(self, input: Tensor, use: Use | None = None) -> Tensor:
        if use is None:
            return self.add_adapter(TokenLinear.forward(self, input), input)
        return TokenLinear.forward(
            self, input, lambda linear, x: use(lambda part: self.add_adapter(linear(part), part), x)
        )


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Give the model's linears that `lora` targets an adapter. New linears take the place of the old, whose parameters
    they share.
    """
    targets = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and lora.adapts(n)]
    for name in targets:
        holder_name, _, attribute = name.rpartition(".")
        holder = model.get_submodule(holder_name)
        linear = holder.get_submodule(attribute)
        assert isinstance(linear, nn.Linear)
        setattr(holder, attribute, adapted(linear, lora))


def adapted(linear: nn.Linear, lora: LoraConfig) -> nn.Linear:
    """The linear with an adapter, around the same parameters."""
    with torch.device("meta"):
        made: AdaptedLinear | AdaptedPreciseLinear | AdaptedTokenLinear
        match linear:
            case PreciseLinear():
                made = AdaptedPreciseLinear(linear.in_features, linear.out_features)
            case TokenLinear():
                made = AdaptedTokenLinear(linear.in_features, linear.out_features)
            case _:
                made = AdaptedLinear(linear.in_features, linear.out_features)
    made.weight, made.bias = linear.weight, linear.bias
    with linear.weight.device:
        made.attach(Factor(linear.in_features, lora.rank), Factor(lora.rank, linear.out_features), lora.scale)
    return made


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + scale B A in float32, `out in`, for a linear that needs no adapter. scale: `LoraConfig.scale`."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scale)


def adapters_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The name of each adapted linear's weight -> the names of its A and B, among the parameters' names."""
    linears = (name.removesuffix(f".{LORA_A}.weight") for name in names if name.endswith(f".{LORA_A}.weight"))
    return {f"{n}.weight": (f"{n}.{LORA_A}.weight", f"{n}.{LORA_B}.weight") for n in linears}


def file_name(name: str, component: str = "transformer") -> str:
    """An adapter's parameter -> its name in the file that diffusers and PEFT read. component: `transformer_2` for the
    second expert of Wan 2.2.
    """
    assert is_adapter(name), f"{name} is no adapter's"
    return f"{component}.{name}"


def file_metadata(lora: LoraConfig, names: Iterable[str], component: str = "transformer") -> dict[str, str]:
    """The metadata of the file. Without it diffusers takes alpha for the rank, silently. names: of all parameters."""
    targets = sorted(name.removesuffix(".weight") for name in adapters_of(names))
    config = {
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "target_modules": targets,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "use_dora": False,
        "lora_bias": False,
    }
    below = {f"{component}.{key}": value for key, value in config.items()}
    return {"format": "pt", METADATA_KEY: json.dumps(below, indent=2, sort_keys=True)}
