"""The transformer's parameters by name and shape, as its definition makes them (models/dit.py) and tp splits them
(models/parallelize.py): what a planner counts without a model.

Shapes are those of one tp rank. `D` width, `F` feed-forward width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final, Literal

from framework.models.config import LORA_A, LORA_B, NO_ADAPTERS, LoraConfig, ModelConfig, is_adapter, is_trained
from framework.shapes import even_parts

Style = Literal["column", "row", "norm"]

# Parts of a block's names -> how tp splits what is below them (the table of models/parallelize.py, by suffix).
SPLIT: Final[Mapping[str, Style]] = MappingProxyType(
    {
        "to_q": "column",
        "to_k": "column",
        "to_v": "column",
        "add_k_proj": "column",
        "add_v_proj": "column",
        "net.0.proj": "column",
        "to_out.0": "row",
        "net.2": "row",
        "norm_q": "norm",
        "norm_k": "norm",
        "norm_added_k": "norm",
    }
)
# What of a split module every tp rank holds whole.
WHOLE: Final[Mapping[Style, tuple[str, ...]]] = MappingProxyType(
    {"column": (LORA_A,), "row": ("bias", LORA_B), "norm": ()}
)


@dataclass(frozen=True)
class TensorParallel:
    """A rank's place in its tp group."""

    size: int = 1
    index: int = 0


@dataclass(frozen=True)
class ParameterShape:
    """A parameter on one tp rank. split: whether other tp ranks hold other parts. trained: whether it isn't frozen."""

    name: str
    shape: tuple[int, ...]
    split: bool = False
    trained: bool = True

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def parameter_shapes(
    config: ModelConfig,
    tp: TensorParallel = TensorParallel(),
    *,
    lora: LoraConfig = NO_ADAPTERS,
    trainable: Sequence[str] = (),
) -> list[ParameterShape]:
    """Every parameter of the model on this tp rank. trainable: as in `train.trainable`."""
    whole = [
        ParameterShape(f"blocks.{index}.{inner.name}", inner.shape)
        for index in range(config.num_layers)
        for inner in block_shapes(config)
    ]
    whole = [*outer_shapes(config), *whole]
    targets = {f"{name}.weight" for name in linear_names(whole) if lora.adapts(name)}
    adapters = [matrix for p in whole if p.name in targets for matrix in adapter_shapes(p, lora.rank)]
    shapes = [*whole, *adapters]
    return [replace(split_over(p, tp), trained=is_trained(p.name, lora, trainable)) for p in shapes]


def elements_of(parameters: list[ParameterShape]) -> int:
    """The elements of all of them."""
    return sum(parameter.num_elements for parameter in parameters)


def linear_names(parameters: list[ParameterShape]) -> list[str]:
    """The linears among the modules of some parameters."""
    return [p.name.removesuffix(".weight") for p in parameters if p.name.endswith(".weight") and len(p.shape) == 2]


def adapter_shapes(weight: ParameterShape, rank: int) -> list[ParameterShape]:
    """The matrices of the adapter of a linear."""
    module, (out_dim, in_dim) = weight.name.removesuffix(".weight"), weight.shape
    return [
        ParameterShape(f"{module}.{LORA_A}.weight", (rank, in_dim)),
        ParameterShape(f"{module}.{LORA_B}.weight", (out_dim, rank)),
    ]


def check_patterns(config: ModelConfig, lora: LoraConfig, trainable: Sequence[str]) -> None:
    """Raises ValueError for a pattern of `lora.targets` or `train.trainable` that names nothing of the model."""
    parameters = parameter_shapes(config)
    linears = linear_names(parameters)
    modules = {parameter.name.rpartition(".")[0] for parameter in parameters}
    for pattern in lora.targets if lora.rank else ():
        if any(fnmatchcase(name, pattern) for name in linears):
            continue
        others = sorted(name for name in modules if fnmatchcase(name, pattern))
        wrong = f"only {others[0]}, which is no linear" if others else "nothing of the model"
        raise ValueError(
            f"lora.targets: {pattern!r} matches {wrong}; name linears, such as {linears[-3]} or '*.ffn.net.2' "
            "(* and ? stand for anything)"
        )
    names = [parameter.name for parameter in parameter_shapes(config, lora=lora)]
    for pattern in trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"train.trainable: {pattern!r} matches no parameter of the model; names are like {names[1]} and "
                "blocks.0.ffn.net.2.bias (* and ? stand for anything)"
            )


def linear(name: str, in_dim: int, out_dim: int) -> list[ParameterShape]:
    """Weight and bias."""
    return [ParameterShape(f"{name}.weight", (out_dim, in_dim)), ParameterShape(f"{name}.bias", (out_dim,))]


def outer_shapes(config: ModelConfig) -> list[ParameterShape]:
    """What is in no block; tp leaves it whole."""
    width, embedder = config.width, "condition_embedder"
    made = [
        ParameterShape("scale_shift_table", (1, 2, width)),
        ParameterShape("patch_embedding.weight", (width, config.in_channels, *config.patch_size)),
        ParameterShape("patch_embedding.bias", (width,)),
        *linear(f"{embedder}.time_embedder.linear_1", config.freq_dim, width),
        *linear(f"{embedder}.time_embedder.linear_2", width, width),
        *linear(f"{embedder}.time_proj", width, 6 * width),
        *linear(f"{embedder}.text_embedder.linear_1", config.text_dim, width),
        *linear(f"{embedder}.text_embedder.linear_2", width, width),
    ]
    if config.image_dim is not None:
        image = f"{embedder}.image_embedder"
        if config.pos_embed_seq_len is not None:
            made.append(ParameterShape(f"{image}.pos_embed", (1, config.pos_embed_seq_len, config.image_dim)))
        for norm, size in (("norm1", config.image_dim), ("norm2", width)):
            made += [ParameterShape(f"{image}.{norm}.{name}", (size,)) for name in ("weight", "bias")]
        made += linear(f"{image}.ff.net.0.proj", config.image_dim, config.image_dim)
        made += linear(f"{image}.ff.net.2", config.image_dim, width)
    return [*made, *linear("proj_out", width, config.out_patch_dim)]


def block_shapes(config: ModelConfig) -> list[ParameterShape]:
    """A block's parameters, whole, named from the block on."""
    width, hidden = config.width, config.ffn_dim
    made = [ParameterShape("scale_shift_table", (1, 6, width))]
    for attention in ("attn1", "attn2"):
        linears, norms = ["to_q", "to_k", "to_v", "to_out.0"], ["norm_q", "norm_k"]
        if attention == "attn2" and config.added_kv_proj_dim is not None:
            linears, norms = [*linears, "add_k_proj", "add_v_proj"], [*norms, "norm_added_k"]
        for name in linears:
            made += linear(f"{attention}.{name}", width, width)
        made += [ParameterShape(f"{attention}.{name}.weight", (width,)) for name in norms]
    if config.cross_attn_norm:
        made += [ParameterShape(f"norm2.{name}", (width,)) for name in ("weight", "bias")]
    return [*made, *linear("ffn.net.0.proj", width, hidden), *linear("ffn.net.2", hidden, width)]


def split_style(parameter: str) -> Style | None:
    """How tp splits the linear or norm that a parameter belongs to, if it does."""
    module = parameter.rpartition(".")[0]
    module = module.rpartition(".")[0] if is_adapter(parameter) else module
    found = (style for suffix, style in SPLIT.items() if module.endswith(f".{suffix}"))
    return next(found, None) if module.startswith("blocks.") else None


def split_over(parameter: ParameterShape, tp: TensorParallel) -> ParameterShape:
    """This tp rank's part of a parameter."""
    style, path = split_style(parameter.name), parameter.name.split(".")
    kind = path[-2] if is_adapter(parameter.name) else path[-1]
    if style is None or tp.size == 1 or kind in WHOLE[style]:
        return parameter
    dim = 1 if style == "row" else 0
    sizes = list(parameter.shape)
    sizes[dim] = even_parts(sizes[dim], tp.size)[tp.index]
    return replace(parameter, shape=tuple(sizes), split=True)
