"""FSDP2 (torch's `fully_shard`; arXiv 2304.11277) behind the Engine protocol; no private state is touched.

A rank of N holds rows [r0, r1) of dimension 0 of every parameter, r0 = index * ceil(rows / N): one contiguous range of
its flattening, and so a `Fragment`. These rows are the master weights; AdamW updates them in place. Each block is
gathered in its computing dtype just before it runs, and what is in no block around the whole model.

* `zero.stage: 3` frees a block after its forward and gathers it again for its backward. `2` keeps it until its
  backward is done: one gather less, whole parameters held in between. Either way gradients are reduced at each
  micro-batch, so that none is ever held whole from one to the next.
* `zero.partition: P` below the zero group's N: P neighbours partition, and N / P replicas all-reduce their gradients
  after the step's last micro-batch (hybrid sharding).
* The gradient is the mean over all N ranks, as DeepSpeed's. Its norm is the root of the sum of squares over the
  partition group; over tp, parameters marked `tensor_model_parallel` are summed and replicated ones counted once.
* Frozen weights are partitioned and gathered like the others. They have no gradient, no moments, and no part in the
  optimizer.
* The precision table is kept by grouping: in a block, modules whose row differs from the block's are gathered and
  reduced apart from it. A linear that computes in another dtype than the model's default casts its input, and its
  output back; norms and time embedding do their own upcast (`upcasts`, models/layers.py). So attention, modulation and
  what is added stay in the default's dtypes.
"""

import math
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from framework.batch import Condition, Score, Tokens
from framework.config import OptimizerConfig
from framework.optim import adamw
from framework.parallel.collectives import all_reduce_sum
from framework.parallel.fragments import Fragment, ParameterShard, is_split
from framework.parallel.mesh import Group, Mesh, cut_zero_group
from framework.parallel.zero.config import Precision, PrecisionConfig, ZeroConfig, check_engine
from framework.parallel.zero.engine import StepStats, predict

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """This rank's rows of a parameter. master: they as a plain parameter, over FSDP2's own storage. split: its norm is
    summed over tp.
    """

    shard: ParameterShard
    start: int
    parameter: nn.Parameter
    master: nn.Parameter
    split: bool


@dataclass(frozen=True)
class Groups:
    """partition: ranks that hold one replica together. replicate: those that hold the same part of it."""

    partition: Group
    replicate: Group
    zero: Group
    tp: Group


class Fsdp2Engine:
    """`Engine` by FSDP2."""

    def __init__(
        self, module: FSDPModule, pieces: list[Piece], groups: Groups, zero: ZeroConfig, dtype: torch.dtype
    ) -> None:
        self._module, self._pieces, self._groups, self._dtype = module, pieces, groups, dtype
        self._device = next(self._as_module().parameters()).device
        self._keeps_parameters = zero.stage == 2

    def prepare(self, optimizer: OptimizerConfig) -> None:
        """Make the optimizer and its moments. Called once, after construction."""
        trained = [(piece.shard.name, piece.master) for piece in self._pieces if piece.master.requires_grad]
        self._clip = optimizer.clip
        self._optimizer = adamw(trained, optimizer)
        for _, master in trained:
            state = self._optimizer.state[master]
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=master.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(master, requires_grad=False)

    def __call__(self, tokens: Tokens, condition: Condition) -> Tensor:
        return predict(self._as_module(), tokens, condition, self._dtype)

    def scored(self, tokens: Tokens, condition: Condition, score: Score) -> Tensor:
        return predict(self._as_module(), tokens, condition, self._dtype, score)

    def backward(self, loss_sum: Tensor, *, global_count: float, last: bool) -> None:
        self._module.set_requires_all_reduce(last)
        self._module.set_reshard_after_backward(last or not self._keeps_parameters)
        (loss_sum * (self._groups.zero.size / global_count)).backward()

    def step(self, *, lr: float, limit: float = math.inf) -> StepStats:
        held = self._held_gradients()
        norm = self._gradient_norm(held)
        value = float(norm)
        good = value < math.inf and value <= limit  # False for NaN too
        if good:
            if self._clip and held:
                scale = torch.clamp(self._clip / (norm + 1e-6), max=1.0)
                torch._foreach_mul_([gradient for _, gradient in held], scale)
            for piece, gradient in held:
                piece.master.grad = gradient
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        for piece in self._pieces:
            piece.master.grad = None
        # Also of parameters of which this rank has no row: theirs are views of their group's whole buffer.
        self._as_module().zero_grad()
        return StepStats(grad_norm=value, skipped=not good)

    def fragments(self) -> list[Fragment]:
        made = []
        for piece in self._pieces:
            state = self._optimizer.state[piece.master] if piece.master.requires_grad else {}
            tensors = {"model": piece.master} | {name: state[name] for name in MOMENTS if name in state}
            for name, tensor in tensors.items():
                made.append(Fragment(name, piece.shard, piece.start, tensor.detach().view(-1)))
        return made

    def refresh(self, *, updates: int | None = None) -> None:
        if updates is not None:
            for state in self._optimizer.state.values():
                state["step"].fill_(float(updates))
        # In stage 2 a forward without a backward leaves what it gathered, which is stale now.
        for module in self._as_module().modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gradients(self) -> list[Fragment]:
        return [Fragment("grad", piece.shard, piece.start, g.view(-1)) for piece, g in self._held_gradients()]

    def destroy(self) -> None:
        self._pieces = []
        self._optimizer.state.clear()

    def _as_module(self) -> nn.Module:
        assert isinstance(self._module, nn.Module)
        return self._module

    def _held_gradients(self) -> list[tuple[Piece, Tensor]]:
        """This rank's rows of the reduced gradient, of the parameters that have one."""
        found = [(piece, piece.parameter.grad) for piece in self._pieces]
        return [(piece, local_rows(gradient)) for piece, gradient in found if gradient is not None]

    def _gradient_norm(self, held: list[tuple[Piece, Tensor]]) -> Tensor:
        """The norm of the whole gradient, float64 on the device, the same on every rank."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for split in (True, False):
            gradients = [gradient for piece, gradient in held if piece.split == split]
            if gradients and (split or self._groups.tp.index == 0):
                total += torch.nn.utils.get_total_norm(gradients).double() ** 2
        for group in (self._groups.partition, self._groups.tp):
            if group.size > 1:
                all_reduce_sum(total, group, "grad_norm").wait()
        return total.sqrt()


def build_fsdp2(
    model: nn.Module,
    shards: list[ParameterShard],
    mesh: Mesh,
    *,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
) -> Fsdp2Engine:
    """Give a model on the meta device its partitioned storage and optimizer; its weights are zeros.

    It is partitioned on the meta device, so that no rank ever holds the whole model.
    """
    check_engine(zero, precision)
    # The prediction is a view; nothing writes into it.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPDiT\) returned a view", category=UserWarning)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    partition, replicate = cut_zero_group(mesh, zero.partition_size(mesh.zero.size))
    groups = Groups(partition, replicate, mesh.zero, mesh.tp)
    split = {name for name, p in model.named_parameters() if is_split(p)}
    for name, parameter in model.named_parameters():
        assert parameter.is_meta, f"{name} has storage already"
        parameter.data = parameter.data.to(getattr(torch, precision.of(name).parameter))
    device_mesh = build_device_mesh(groups, device)
    lists = [(name, inner) for name, inner in model.named_children() if isinstance(inner, nn.ModuleList)]
    blocks = [(f"{outer}.{name}", block) for outer, inner in lists for name, block in inner.named_children()]
    for prefix, module in [*blocks, ("", model)]:
        partition_unit(module, prefix, precision, device_mesh, reshard_after_forward=zero.stage == 3)
    model.to_empty(device=device)
    by_name, pieces = {shard.name: shard for shard in shards}, []
    for name, parameter in model.named_parameters():
        rows = local_rows(parameter).zero_()
        if rows.numel():
            shard = replace(by_name[name], owner=by_name[name].owner and replicate.index == 0)
            first = partition.index * -(-parameter.shape[0] // partition.size)
            master = nn.Parameter(rows, requires_grad=parameter.requires_grad)
            pieces.append(Piece(shard, first * rows[0].numel(), parameter, master, name in split))
    assert isinstance(model, FSDPModule)
    engine = Fsdp2Engine(model, pieces, groups, zero, getattr(torch, precision.default.compute))
    engine.prepare(optimizer)
    return engine


def build_device_mesh(groups: Groups, device: torch.device) -> DeviceMesh:
    """The groups as torch's mesh: one axis, or (replicate, shard) where there is more than one replica."""
    partition, replicate = groups.partition, groups.replicate
    assert partition.process_group is not None and replicate.process_group is not None
    if replicate.size == 1:
        return DeviceMesh.from_group(partition.process_group, device.type)
    grid = torch.tensor(groups.zero.ranks).view(replicate.size, partition.size)
    pair, names = [replicate.process_group, partition.process_group], ("replicate", "shard")
    return DeviceMesh.from_group(pair, device.type, mesh=grid, mesh_dim_names=names)


def partition_unit(
    unit: nn.Module, prefix: str, precision: PrecisionConfig, device_mesh: DeviceMesh, *, reshard_after_forward: bool
) -> None:
    """Partition a block, or what the blocks leave of the model: one group for each row of the precision table in it."""
    rows = rows_of_modules(unit, prefix, precision)
    default = precision.default
    elements: Counter[Precision] = Counter()
    for module, row in rows.items():
        elements[row] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if not rows:
        return
    own = rows.get(unit) or elements.most_common(1)[0][0]
    apart: defaultdict[Precision, list[nn.Module]] = defaultdict(list)
    covered: set[nn.Module] = set()  # below a module that is gathered apart, and with it: adapters
    for module, row in rows.items():
        if module in covered:
            continue
        if row.compute != default.compute and module is not unit and not getattr(module, "upcasts", False):
            cast_around(module, getattr(torch, row.compute), getattr(torch, default.compute))
        if row != own:
            below = [inner for inner in module.modules() if inner is not module and inner in rows]
            if any(rows[inner] != row for inner in below):
                raise ValueError(
                    f"precision.table: {prefix}.{module_name(unit, module)} has parameters of its own in {row} and "
                    f"others below it; give all of it one row, or its own parameters the row {own}"
                )
            apart[row].append(module)
            covered.update(below)
    for row, modules in [*apart.items(), (own, [unit])]:
        compute, reduce = getattr(torch, row.compute), getattr(torch, row.reduce)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
        fully_shard(modules, mesh=device_mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)


def cast_around(module: nn.Module, compute: torch.dtype, default: torch.dtype) -> None:
    """Let a module compute in its own dtype: what goes in is cast to it, what comes out to the model's.

    By hooks, as FSDP2 would cast for the first and the last only of the modules that it gathers together.
    """
    module.register_forward_pre_hook(lambda _, args: tuple(x.to(compute) for x in args))
    module.register_forward_hook(lambda _, args, out: out.to(default))


def rows_of_modules(unit: nn.Module, prefix: str, precision: PrecisionConfig) -> dict[nn.Module, Precision]:
    """The row of every module with parameters of its own, but for modules that are partitioned already."""
    rows: dict[nn.Module, Precision] = {}
    taken = {inner for module in unit.modules() if isinstance(module, FSDPModule) for inner in module.modules()}
    for path, module in unit.named_modules():
        names = [".".join(filter(None, (prefix, path, n))) for n, _ in module.named_parameters(recurse=False)]
        found = {name: precision.of(name) for name in names}
        if found and module not in taken:
            first, *_ = found
            other = next((name for name in found if found[name] != found[first]), None)
            assert other is None, f"{first} and {other} have two rows (launch/check.py)"
            rows[module] = found[first]
    return rows


def module_name(unit: nn.Module, module: nn.Module) -> str:
    return next(name for name, inner in unit.named_modules() if inner is module)


@torch.no_grad()
def local_rows(tensor: Tensor) -> Tensor:
    """What this rank holds of a partitioned tensor, sharing its storage."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
