"""Model cells of the parity matrix: the transformer on a mesh against the same transformer on one device, in float64.

No engine takes part: gradients are summed over the zero group by one all-reduce a tensor, and put together over tp by
the shards that `parallelize` names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import mutations
import torch
import torch.distributed as dist
from masked import FULL, mask_of, masked_attention, name_of
from pool import run_ranks
from torch import Tensor

from framework.batch import Noised, Tokens
from framework.environment import Environment
from framework.kernels.aten import AtenAttention
from framework.kernels.config import PatternConfig
from framework.kernels.reference import ReferenceAttention
from framework.models.adapters import add_adapters
from framework.models.config import NO_ADAPTERS, ExecutionConfig, LoraConfig, ModelConfig
from framework.models.dit import DiT
from framework.models.parallelize import blocks_of, parallelize
from framework.models.patchify import patchify
from framework.parallel.collectives import gather_objects
from framework.parallel.config import MeshShape
from framework.parallel.context_parallel.tokens import split_tokens
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import Mesh, build_mesh
from framework.parallel.zero.deepspeed import materialise

MODEL = ModelConfig(
    num_attention_heads=6,
    attention_head_dim=6,
    in_channels=3,
    out_channels=2,
    text_dim=7,
    freq_dim=8,
    ffn_dim=50,
    num_layers=2,
)
IMAGE = replace(MODEL, image_dim=5, added_kv_proj_dim=36, in_channels=4)


@dataclass(frozen=True)
class Cell:
    """One cell. latent: frames, rows, columns of patches. samples: over all dp ranks; 0 of them on some if fewer.
    memory: the other keys of `execution`. adapted: adapters on all kinds of linears. trainable: patterns of what is
    trained besides.
    """

    mesh: MeshShape
    latent: tuple[int, int, int] = (2, 2, 3)
    samples: int = 2
    recompute: Literal["none", "all", "keep_attention"] = "none"
    memory: tuple[tuple[str, int], ...] = ()
    image: bool = False
    micro: int = 1
    split: tuple[int, int] | None = None
    reference_kernel: bool = False
    adapted: bool = False
    trainable: tuple[str, ...] = ()
    pattern: PatternConfig = FULL

    @property
    def lora(self) -> LoraConfig:
        targets = ["*.attn?.*", "*.ffn.net.*", "*.text_embedder.*", "*.time_embedder.*", "proj_out"]
        return LoraConfig(rank=3, alpha=5.0, targets=targets) if self.adapted else NO_ADAPTERS

    @property
    def num_tokens(self) -> int:
        t, h, w = self.latent
        return t * h * w

    def __str__(self) -> str:
        words = [f"dp{self.mesh.dp}r{self.mesh.ring}u{self.mesh.ulysses}tp{self.mesh.tp}", f"{self.num_tokens}tokens"]
        words += [self.recompute] if self.recompute != "none" else []
        words += [f"{name}{value}" for name, value in self.memory]
        words += ["image"] if self.image else []
        words += [f"micro{self.micro}"] if self.micro > 1 else []
        words += ["adapted"] if self.adapted else []
        words += list(self.trainable)
        words += [name_of(self.pattern)] if self.pattern != FULL else []
        words += [f"split{self.split[0]}x{self.split[1]}"] if self.split else []
        return "-".join(words)


@dataclass(frozen=True)
class CellError:
    """Worst relative errors (max|a-b| / max|b|) of the loss and of a gradient, and the gradient's tensor."""

    loss: float
    gradient: float
    name: str
    traffic: dict[str, dict[str, tuple[int, int]]]


@dataclass(frozen=True)
class Inputs:
    """The samples of a cell, all of them: tokens, text and its mask, image tokens."""

    tokens: Tokens
    text: Tensor
    mask: Tensor
    image: Tensor | None


def inputs_of(cell: Cell, config: ModelConfig) -> Inputs:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    t, h, w = cell.latent
    count = cell.samples
    noised = Noised(
        latents=draw(count, config.in_channels, t, 2 * h, 2 * w),
        target=draw(count, config.out_channels, t, 2 * h, 2 * w),
        timesteps=torch.rand((count, t), generator=generator, dtype=torch.float64) * 1000,
        weights=torch.rand(count, generator=generator, dtype=torch.float64) + 0.5,
    )
    mask = torch.arange(5) < torch.tensor([3, 5, 1, 4, 2, 5, 0, 3])[:count, None]
    image = draw(count, 3, 5) if cell.image else None
    return Inputs(patchify(noised, config.patch_size), draw(count, 5, 7), mask, image)


def serial(cell: Cell, config: ModelConfig) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and weights on one device, by the plain kernel, or a dense mask."""
    model = DiT(config, ReferenceAttention())
    if cell.pattern != FULL:
        t, h, w = cell.latent
        mask = mask_of(cell.pattern, t, h * w)
        for _, block in blocks_of(model):
            block.attn1.attention = lambda q, k, v, layout: masked_attention(q, k, v, mask)
    add_adapters(model, cell.lora)
    model.double()
    for name, parameter in model.named_parameters():
        adapter, matches = "lora" in name, any(fnmatchcase(name, pattern) for pattern in cell.trainable)
        parameter.requires_grad_(adapter or matches or not (cell.adapted or cell.trainable))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(base + values * 0.3)
    inputs = inputs_of(cell, config)
    loss = run(model, inputs.tokens, inputs, slice(None)).sum() / cell.samples
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, {name: p.detach() for name, p in model.named_parameters()}


def run(model: DiT, tokens: Tokens, inputs: Inputs, rows: slice) -> Tensor:
    """Each sample's loss."""
    image = None if inputs.image is None else inputs.image[rows]
    return model(
        tokens.patches,
        tokens.positions,
        tokens.frame_index,
        tokens.timesteps,
        inputs.text[rows],
        layout=tokens.layout,
        text_mask_bl=inputs.mask[rows],
        image_bnd=image,
        score=lambda prediction, first: sample_losses(prediction, tokens, first),
    )


def sample_losses(prediction: Tensor, tokens: Tokens, first: int) -> Tensor:
    """Each sample's weighted mean squared error over its real tokens, as far as they are predicted here."""
    assert tokens.target is not None
    target = tokens.target[:, : tokens.layout.num_valid][:, first : first + prediction.shape[1]]
    error = (prediction[:, : target.shape[1]] - target).square().sum(dim=(1, 2))
    return error * tokens.weights / (sum(tokens.layout.valid) * prediction.shape[2])


def rows_of(tokens: Tokens, rows: slice) -> Tokens:
    return replace(
        tokens,
        patches=tokens.patches[rows],
        target=None if tokens.target is None else tokens.target[rows],
        positions=tokens.positions[rows],
        frame_index=tokens.frame_index[rows],
        timesteps=tokens.timesteps[rows],
        weights=tokens.weights[rows],
    )


def fill(model: DiT, shards: list[ParameterShard], weights: dict[str, Tensor]) -> None:
    """Materialise what this rank holds of the weights."""
    for module in model.modules():
        materialise(module, torch.device("cpu"), torch.float64)
    for shard, (name, parameter) in zip(shards, model.named_parameters(), strict=True):
        assert shard.name == name and tuple(parameter.shape) == shard.shape
        Fragment("model", shard, 0, parameter.data.view(-1)).copy_from(weights[name])


def parallel(
    cell: Cell, config: ModelConfig, mesh: Mesh, weights: dict[str, Tensor], change: Callable[[], None] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's loss and gradients, summed over zero but not yet put together over tp."""
    with torch.device("meta"):
        model = DiT(config, ReferenceAttention() if cell.reference_kernel else AtenAttention())
    execution = ExecutionConfig(recompute=cell.recompute, **dict(cell.memory))  # type: ignore[arg-type]
    shards = parallelize(model, mesh, execution, lora=cell.lora, trainable=cell.trainable)
    fill(model, shards, weights)
    here = mesh if cell.split is None else mesh.split(*cell.split)
    inputs = inputs_of(cell, config)
    total = torch.zeros((), dtype=torch.float64)
    per_replica = -(-cell.samples // here.dp.size)
    size = -(-per_replica // cell.micro)
    for first in range(0, per_replica, size):
        start = here.dp.index * per_replica + first
        rows = slice(start, min(start + size, (here.dp.index + 1) * per_replica, cell.samples))
        empty = rows.start >= rows.stop
        if empty:  # an empty slot: it is computed and weighs nothing
            rows = slice(0, 1)
        tokens = split_tokens(rows_of(inputs.tokens, rows), here, cell.pattern)
        loss = run(model, tokens, inputs, rows).sum() / cell.samples
        loss = loss * 0 if empty else loss
        loss.backward()
        total += loss.detach()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=mesh.zero.process_group)
        gradients[name] = gradient
    return total, {shard.name: gradients[shard.name] for shard in shards}


def assemble(gradients: dict[str, Tensor], shards: list[ParameterShard], mesh: Mesh) -> dict[str, Tensor]:
    """Whole gradients from the tp group's parts."""
    everyone = gather_objects([(shard, gradients[shard.name]) for shard in shards], mesh.tp)
    whole = {}
    for parts in zip(*everyone, strict=True):
        shard = parts[0][0]
        full = torch.full(shard.global_shape, torch.nan, dtype=torch.float64)
        for part, values in parts:
            index = tuple(slice(o, o + s) for o, s in zip(part.offset, part.shape, strict=True))
            agree = full[index].isnan().all() or torch.allclose(full[index], values, rtol=1e-12, atol=1e-14)
            full[index] = values if agree else torch.inf  # replicated, and not alike on all ranks of tp
        whole[shard.name] = full
    return whole


def run_cell(cell: Cell, rank: int) -> CellError:
    """A cell on this rank; every rank returns its own comparison."""
    config = IMAGE if cell.image else MODEL
    mesh = build_mesh(cell.mesh, rank, [] if cell.split is None else [cell.split])
    loss, reference, weights = serial(cell, config)
    with torch.device("meta"):
        shards = parallelize(DiT(config, AtenAttention()), mesh, ExecutionConfig(), lora=cell.lora)
    total, gradients = parallel(cell, config, mesh, weights)
    dist.all_reduce(total)
    whole = assemble(gradients, shards, mesh)
    errors = {name: relative(whole[name], reference.get(name)) for name in whole}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return CellError(abs(float(total) - loss) / abs(loss), errors[worst], worst, traffic_of(mesh))


def relative(got: Tensor, reference: Tensor | None) -> float:
    if reference is None:
        return float(got.abs().max())
    return float((got - reference).abs().max() / reference.abs().max().clamp_min(1e-300))


def traffic_of(mesh: Mesh) -> dict[str, dict[str, tuple[int, int]]]:
    """group -> purpose -> (calls, bytes), of the mesh and its splits."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for each in (mesh, *mesh.splits.values()):
        for group in each.groups():
            for purpose, calls in group.traffic.calls.items():
                found.setdefault(group.name, {})[purpose] = (calls, group.traffic.num_bytes[purpose])
    return found


def run_cells(env: Environment, cells: list[Cell]) -> list[CellError]:
    """All cells of one world size, one after the other."""
    dist.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    return [run_cell(cell, env.rank) for cell in cells]


def measured(chosen: list[Cell]) -> dict[Cell, CellError]:
    """The largest error of each cell over its ranks; the ranks of each world size are started once."""
    found: dict[Cell, CellError] = {}
    for world_size in sorted({cell.mesh.world_size for cell in chosen}):
        batch = [cell for cell in chosen if cell.mesh.world_size == world_size]
        every_rank = run_ranks(run_cells, world_size, batch, timeout=400)
        for index, cell in enumerate(batch):
            found[cell] = max((rank[index] for rank in every_rank), key=lambda error: error.gradient)
    return found


def run_mutant(env: Environment, cell: Cell, mutation: str) -> CellError:
    """A cell with a mistake put in."""
    dist.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    mutations.put_in(mutation)
    return run_cell(cell, env.rank)
