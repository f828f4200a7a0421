"""The one file that applies parallelism to a model, in a fixed order: adapters, tp table, attention, chunks,
recompute, compile.

Data parallelism needs nothing from the model: the ZeRO engine partitions what a rank holds. Context parallelism changes
self-attention alone. Tensor parallelism splits linears by the table below, and the norms of q and k with them. Tokens
are split over tp too wherever there is no linear (arXiv 2205.05198): a module's `enter` gathers them, a row linear
sums and scatters them.

What every tp rank holds whole but uses on its own tokens has its gradient summed over tp where it is used
(`on_tokens`): norms, modulation tables, patch embedding, head, biases of row linears, and what the embedders of time,
text and image give, which stay replicated. Everything else sees all tokens of the group, or only its own columns.

An adapter (adapters.py) is split with its linear. The matrix that is whole sees other columns on every rank, so its
gradient is summed over tp:

    column   y_i = x W_i + s (x A) B_i       A whole, B_i this rank's columns of the output
    row      sum over tp of  x_i W_i + s (x_i A_i) B       A_i this rank's columns of the input, B whole
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.models.adapters import Adapted, AdaptedLinear, Factor, add_adapters
from framework.models.config import LORA_A, LORA_B, NO_ADAPTERS, ExecutionConfig, LoraConfig, is_trained
from framework.models.dit import Block, DiT, call
from framework.models.offload import HostMemory
from framework.parallel.collectives import gather_tokens, sum_gradient
from framework.parallel.context_parallel.attention import ContextAttention, keep_nothing, leave_here
from framework.parallel.fragments import ParameterShard, mark_split
from framework.parallel.mesh import Group, Mesh
from framework.parallel.tensor_parallel import RowLinear, SplitRMSNorm
from framework.shapes import even_parts

Style = Literal["column", "row", "norm"]

# Within a block: module -> linear or norm -> style. A linear that isn't there (image tokens) is left out.
TABLE: Final[Mapping[str, Mapping[str, Style]]] = MappingProxyType(
    {
        "attn1": MappingProxyType(
            {
                "to_q": "column",
                "to_k": "column",
                "to_v": "column",
                "norm_q": "norm",
                "norm_k": "norm",
                "to_out.0": "row",
            }
        ),
        "attn2": MappingProxyType(
            {
                "to_q": "column",
                "to_k": "column",
                "to_v": "column",
                "add_k_proj": "column",
                "add_v_proj": "column",
                "norm_q": "norm",
                "norm_k": "norm",
                "norm_added_k": "norm",
                "to_out.0": "row",
            }
        ),
        "ffn": MappingProxyType({"net.0.proj": "column", "net.2": "row"}),
    }
)
# Where replicated weights meet a rank's own tokens: in the model, and in each of its blocks.
ON_TOKENS: Final = ("", "patch_embedding", "proj_out")
ON_TOKENS_IN_BLOCK: Final = ("", "norm2")


class AdaptedRowLinear(Adapted, RowLinear):
    """An adapted row linear."""

    def product(self, input: Tensor) -> Tensor:
        return self.add_adapter(RowLinear.product(self, input), input)


def parallelize(
    model: DiT,
    mesh: Mesh,
    execution: ExecutionConfig,
    *,
    lora: LoraConfig = NO_ADAPTERS,
    trainable: Sequence[str] = (),
) -> list[ParameterShard]:
    """Apply adapters and the mesh to a model on the meta device; the shards of its parameters, in the model's order.

    trainable: patterns of what is trained besides the adapters; without either, everything is.
    """
    add_adapters(model, lora)
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    split: dict[str, tuple[int, int]] = {}
    for prefix, block in blocks_of(model):
        split |= {f"{prefix}.{name}": place for name, place in split_block(block, mesh.tp).items()}
        for name in ON_TOKENS_IN_BLOCK:
            object.__setattr__(block.get_submodule(name), "on_tokens", partial(sum_gradient, group=mesh.tp))
        block.attn1.attention = ContextAttention(block.attn1.kernel)
    for name in ON_TOKENS:
        module = model.get_submodule(name)
        for user in (module, *factors_of(module)):
            object.__setattr__(user, "on_tokens", partial(sum_gradient, group=mesh.tp))
    for name, parameter in named(model):
        parameter.requires_grad_(is_trained(name, lora, trainable))
    apply_chunks(model, execution)
    apply_recompute(model, execution)
    if execution.compile:
        for _, block in blocks_of(model):
            block.compile()
    return [shard_of(name, parameter, whole[name], split.get(name), mesh.tp) for name, parameter in named(model)]


def blocks_of(model: DiT) -> Iterator[tuple[str, Block]]:
    """Every block and its name."""
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        yield f"blocks.{index}", block


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by name."""
    return list(model.named_parameters())


def factors_of(module: nn.Module) -> tuple[Factor, ...]:
    """The matrices of a linear's adapter, if it has one."""
    return (module.lora_A, module.lora_B) if isinstance(module, Adapted) else ()


def split_block(block: Block, tp: Group) -> dict[str, tuple[int, int]]:
    """Put this rank's parts in the place of the table's linears and norms: parameter -> (dim, offset)."""
    places: dict[str, tuple[int, int]] = {}
    for module_name, rows in TABLE.items():
        module = block.get_submodule(module_name)
        object.__setattr__(module, "enter", partial(gather_tokens, group=tp))
        for name, style in rows.items():
            holder_name, _, attribute = name.rpartition(".")
            holder = module.get_submodule(holder_name)
            if not hasattr(holder, attribute):
                continue
            part, found = split_module(getattr(holder, attribute), style, block.attn1.head_dim, tp)
            setattr(holder, attribute, part)
            places |= {f"{module_name}.{name}.{parameter}": place for parameter, place in found.items()}
    return places


def split_module(
    module: nn.Module, style: Style, head_dim: int, tp: Group
) -> tuple[nn.Module, dict[str, tuple[int, int]]]:
    """This rank's part of a linear or norm, and where its parameters lie: name -> (dim, offset)."""
    match style:
        case "column":
            assert isinstance(module, nn.Linear)
            return split_column(module, tp)
        case "row":
            assert isinstance(module, nn.Linear)
            return split_row(module, tp)
        case "norm":
            dim = module.get_parameter("weight").numel()
            size, offset = part_of(dim, tp)
            with torch.device("meta"):
                return SplitRMSNorm(size, dim, float(str(module.eps)), tp), {"weight": (0, offset)}


def split_column(module: nn.Linear, tp: Group) -> tuple[nn.Linear, dict[str, tuple[int, int]]]:
    """This rank's columns of the output."""
    size, offset = part_of(module.out_features, tp)
    places = {"weight": (0, offset), "bias": (0, offset)}
    with torch.device("meta"):
        if not isinstance(module, Adapted):
            return nn.Linear(module.in_features, size), places
        part, rank = AdaptedLinear(module.in_features, size), module.lora_A.weight.shape[0]
        part.attach(Factor(module.in_features, rank), Factor(rank, size), module.scale)
    object.__setattr__(part.lora_A, "on_tokens", partial(sum_gradient, group=tp))
    return part, places | {f"{LORA_B}.weight": (0, offset)}


def split_row(module: nn.Linear, tp: Group) -> tuple[RowLinear, dict[str, tuple[int, int]]]:
    """This rank's columns of the input."""
    size, offset = part_of(module.in_features, tp)
    with torch.device("meta"):
        if not isinstance(module, Adapted):
            return RowLinear(size, module.out_features, tp), {"weight": (1, offset)}
        part, rank = AdaptedRowLinear(size, module.out_features, tp), module.lora_A.weight.shape[0]
        part.attach(Factor(size, rank), Factor(rank, module.out_features), module.scale)
    object.__setattr__(part.lora_B, "on_tokens", partial(sum_gradient, group=tp))
    return part, {"weight": (1, offset), f"{LORA_A}.weight": (1, offset)}


def part_of(columns: int, tp: Group) -> tuple[int, int]:
    """This rank's number of columns and the first of them. The recipe's check makes tp divide the heads, so a part of
    the attention's columns is whole heads; the feed-forward's may differ by one.
    """
    sizes = even_parts(columns, tp.size)
    return sizes[tp.index], sum(sizes[: tp.index])


def shard_of(
    name: str, parameter: nn.Parameter, whole: tuple[int, ...], place: tuple[int, int] | None, tp: Group
) -> ParameterShard:
    """What this rank holds of a parameter; marks what tp splits, as DeepSpeed's norm asks for it."""
    offset = [0] * len(whole)
    if place is not None and tp.size > 1:
        dim, start = place
        offset[dim] = start
        mark_split(parameter)
        return ParameterShard(name, whole, tuple(offset), tuple(parameter.shape), trainable=parameter.requires_grad)
    owner = tp.index == 0
    return ParameterShard(name, whole, tuple(offset), whole, owner=owner, trainable=parameter.requires_grad)


def apply_chunks(model: DiT, execution: ExecutionConfig) -> None:
    """Say over how many tokens at a time modules run."""
    model.score_tokens = execution.loss_chunk_tokens
    for _, block in blocks_of(model):
        for module in (block, block.ffn, block.norm2):
            object.__setattr__(module, "chunk_tokens", execution.chunk_tokens)


def apply_recompute(model: DiT, execution: ExecutionConfig) -> None:
    """Decide what a block's backward computes again instead of keeping it, and where the rest waits."""
    blocks = [block for _, block in blocks_of(model)]
    chosen = {block for index, block in enumerate(blocks) if execution.recomputes(index, len(blocks))}
    if not chosen:
        return
    keeps = execution.recompute == "keep_attention"
    host = HostMemory() if execution.offload else None

    def run_block(block: Block, x_bsd: Tensor, *inputs: object) -> Tensor:
        if block not in chosen:
            return call(block, x_bsd, *inputs)
        attention = block.attn1.attention
        assert isinstance(attention, ContextAttention)
        shelf = None if host is None else host.next_shelf()
        put_away = leave_here if shelf is None else shelf.put
        with nullcontext() if shelf is None else shelf.holding(x_bsd):
            out: Tensor = checkpoint(
                block,
                x_bsd,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(attention.keeping, put_away) if keeps else keep_nothing,
            )
        return out

    model.run_block = run_block
