"""DeepSpeed's ZeRO stages 1, 2 and 3 (arXiv 1910.02054) behind the Engine protocol.

This is the one file that touches DeepSpeed's private attributes, so pyproject.toml pins its release and the tests check
that a round trip through `fragments` is exact. What DeepSpeed is told, and why:

* Its "data parallel group" is our zero group, dp x cp, through an `mpu` without any `get_sequence_*` method: told of
  sequence parallelism, its stages disagree on whether gradients are summed or averaged over it (measured: a gradient
  norm off by exactly the degree in stage 2, right in stage 3).
* Gradient accumulation is ours: `gradient_accumulation_steps` is 1, the boundary is set before each backward, and the
  number of micro-batches may differ from step to step.
* Gradients accumulate and travel in float32 also when parameters are bfloat16 (stage 1 is then its BF16_Optimizer).
* The optimizer gets what is trained alone. Frozen weights have no master: they are what forward and backward see, in
  the model's dtype; whole on every rank in stages 1 and 2, where each is owned by one rank of the zero group, and a
  range in stage 3.
* `use_multi_rank_bucket_allreduce: false`: by default stages 1 and 2 all-reduce every bucket, twice the bytes needed.
"""

import heapq
import io
import logging
import math
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from torch import Tensor, nn

from framework.batch import Condition, Score, Tokens
from framework.config import OptimizerConfig
from framework.optim import adamw
from framework.parallel.fragments import Fragment, ParameterShard, is_split, mark_split
from framework.parallel.mesh import Group, Mesh
from framework.parallel.zero.config import PrecisionConfig, ZeroConfig, check_engine
from framework.parallel.zero.engine import StepStats, predict

MOMENTS = ("exp_avg", "exp_avg_sq")


class GroupsForDeepSpeed:
    """The `mpu` object DeepSpeed asks for its groups; on purpose without `get_sequence_*` (see the docstring above)."""

    def __init__(self, mesh: Mesh) -> None:
        self._tp, self._zero = mesh.tp, mesh.zero

    def get_model_parallel_rank(self) -> int:
        return self._tp.index

    def get_model_parallel_group(self) -> torch.distributed.ProcessGroup | None:
        return self._tp.process_group

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_rank(self) -> int:
        return self._zero.index

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup | None:
        return self._zero.process_group

    def get_data_parallel_world_size(self) -> int:
        return self._zero.size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._zero.ranks)


@dataclass(frozen=True)
class Piece:
    """Where DeepSpeed keeps a parameter's range: in the flat fp32 buffer `group`, at `offset`."""

    shard: ParameterShard
    group: int
    offset: int
    start: int
    num_elements: int


@dataclass(frozen=True)
class Frozen:
    """A weight that isn't trained."""

    shard: ParameterShard
    parameter: nn.Parameter


class NormGate:
    """Shows DeepSpeed's optimizer a gradient norm above `limit` as infinite, where it takes the norm: it then skips the
    update and clears the gradients as it does for any norm that isn't finite. All-reduced, the norm has the same bits
    on every rank, and so has the decision.

    above: the norm itself, where it was above the limit.
    """

    def __init__(self, optimizer: Any) -> None:
        self.limit = math.inf
        self.above: float | None = None
        if isinstance(optimizer, BF16_Optimizer):
            self._gradients, self._mpu = optimizer.get_grads_for_norm, optimizer.mpu
            optimizer.get_grads_for_norm = self._judged_gradients
        elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            self._norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = self._judged_norm
        else:
            self._groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = self._judged_groups

    def _is_above(self, norm: Tensor) -> bool:
        value = float(norm)
        self.above = value if self.limit < value < math.inf else None
        return self.above is not None

    def _judged_norm(self) -> Tensor:
        norm: Tensor = self._norm()
        return torch.full_like(norm, math.inf) if self._is_above(norm) else norm

    def _judged_groups(self) -> list[Tensor]:
        norms: list[Tensor] = self._groups()
        return [torch.full_like(norms[0], math.inf)] if self._is_above(combine_grad_norm_groups(norms)) else norms

    def _judged_gradients(self, for_clipping: bool = False) -> Any:
        """BF16_Optimizer takes its norm in a function: with a limit it is computed once more, and where it is above it
        the gradients are shown as infinite.
        """
        found = self._gradients(for_clipping)
        if for_clipping or self.limit == math.inf:
            return found
        gradients, experts = found
        above = self._is_above(get_global_norm_of_tensors(gradients, mpu=self._mpu))
        return ([torch.full_like(gradients[0], math.inf)], experts) if above else found


class DeepSpeedEngine:
    """`Engine` by DeepSpeed."""

    def __init__(self, engine: "deepspeed.DeepSpeedEngine", optimizer: torch.optim.Optimizer, zero: Group) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._zero = zero
        self._gate = NormGate(engine.optimizer)
        self._dtype: torch.dtype = next(engine.module.parameters()).dtype
        self._pieces: list[Piece] = []
        self._frozen: list[Frozen] = []

    def locate(self, shards: list[ParameterShard]) -> None:
        """Find where every shard's range lies. Called once, after construction."""
        by_name = {shard.name: shard for shard in shards}
        stage3 = self._engine.zero_optimization_stage() == 3
        find = self._find_stage3 if stage3 else self._find_stage12
        parameters = list(self._engine.module.named_parameters())
        found = (find(parameter, by_name[name]) for name, parameter in parameters if parameter.requires_grad)
        self._pieces = [piece for piece in found if piece is not None]
        frozen = [Frozen(by_name[name], parameter) for name, parameter in parameters if not parameter.requires_grad]
        if not stage3:
            owners = deal([math.prod(each.shard.shape) for each in frozen], self._zero.size)
            here = [owner == self._zero.index for owner in owners]
            pairs = zip(frozen, here, strict=True)
            frozen = [Frozen(replace(f.shard, owner=f.shard.owner and own), f.parameter) for f, own in pairs]
        self._frozen = frozen

    def __call__(self, tokens: Tokens, condition: Condition) -> Tensor:
        return predict(self._engine, tokens, condition, self._dtype)

    def scored(self, tokens: Tokens, condition: Condition, score: Score) -> Tensor:
        return predict(self._engine, tokens, condition, self._dtype, score)

    def backward(self, loss_sum: Tensor, *, global_count: float, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss_sum * (self._zero.size / global_count))

    def step(self, *, lr: float, limit: float = math.inf) -> StepStats:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._gate.limit, self._gate.above = limit, None
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm()) if self._gate.above is None else self._gate.above
        return StepStats(grad_norm=norm, skipped=bool(self._engine.optimizer.overflow))

    def fragments(self) -> list[Fragment]:
        made = []
        for piece in self._pieces:
            master = self._flat_masters()[piece.group]
            states = {"model": master} | {name: self._moments(piece.group)[name] for name in MOMENTS}
            for state, flat in states.items():
                view = flat.detach().narrow(0, piece.offset, piece.num_elements)
                made.append(Fragment(state, piece.shard, piece.start, view))
        return made + [fragment for each in self._frozen if (fragment := self._frozen_fragment(each)) is not None]

    def _frozen_fragment(self, frozen: Frozen) -> Fragment | None:
        """What this rank holds of a frozen weight."""
        parameter = frozen.parameter
        if self._engine.zero_optimization_stage() < 3:
            return Fragment("model", frozen.shard, 0, parameter.detach().view(-1))
        held: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        start = self._zero.index * held.numel()
        num_elements = max(0, min(held.numel(), parameter.ds_numel - start))  # type: ignore[attr-defined]
        return Fragment("model", frozen.shard, start, held.detach()[:num_elements]) if num_elements else None

    def refresh(self, *, updates: int | None = None) -> None:
        if updates is not None:
            for group in range(len(self._flat_masters())):
                self._moments(group)["step"].fill_(float(updates))
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() < 3:
            optimizer.update_lp_params()
            return
        # Parameters that are gathered already aren't gathered again: release them first (measured: a resume in stage 3
        # otherwise goes on with the initial values of every persistent parameter).
        optimizer._partition_all_parameters()
        for index, low in enumerate(optimizer.fp16_partitioned_groups_flat):
            low.data.copy_(optimizer.fp32_partitioned_groups_flat[index].data)
            optimizer._unflatten_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def gradients(self) -> list[Fragment]:
        if self._engine.zero_optimization_stage() == 3:
            by_name = dict(self._engine.module.named_parameters())
            gradient = self._engine.optimizer.get_local_fp32_grad_for_param
            views = [gradient(by_name[piece.shard.name]).view(-1)[: piece.num_elements] for piece in self._pieces]
        else:
            flats = [self._flat_gradient(group) for group in range(len(self._flat_masters()))]
            views = [flats[piece.group].narrow(0, piece.offset, piece.num_elements) for piece in self._pieces]
        pairs = zip(self._pieces, views, strict=True)
        return [Fragment("grad", piece.shard, piece.start, view.detach()) for piece, view in pairs]

    def destroy(self) -> None:
        self._engine.destroy()

    def _flat_masters(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            flats: list[Tensor] = optimizer.fp32_groups_flat_partition
        elif self._engine.zero_optimization_stage() == 3:
            flats = optimizer.fp32_partitioned_groups_flat
        else:
            flats = optimizer.single_partition_of_fp32_groups
        return flats

    def _flat_gradient(self, group: int) -> Tensor:
        """The reduced gradient of a flat buffer of stages 1 and 2, in the buffer's layout."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            flat: Tensor = optimizer.fp32_groups_gradient_flat_partition[group]
        elif optimizer.cpu_offload:
            flat = optimizer.single_partition_of_fp32_groups[group].grad
        else:
            flat = torch.cat([part.view(-1) for part in optimizer.averaged_gradients[group]])
        return flat

    def _moments(self, group: int) -> dict[str, Tensor]:
        """The optimizer's state of a flat buffer, made before its first step where need be."""
        flat = self._flat_masters()[group]
        state: dict[str, Tensor] = self._optimizer.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=flat.device if flat.is_cuda else "cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(flat, requires_grad=False)
        return state

    @staticmethod
    def _find_stage12(parameter: nn.Parameter, shard: ParameterShard) -> Piece | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Piece(shard, mapping.param_group_index, high.start, low.start, high.numel)

    def _find_stage3(self, parameter: nn.Parameter, shard: ParameterShard) -> Piece | None:
        optimizer = self._engine.optimizer
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = self._zero.index * padded
        num_elements = max(0, min(padded, parameter.ds_numel - start))  # type: ignore[attr-defined]
        return Piece(shard, group, offset, start, num_elements) if num_elements else None


def build_deepspeed(
    model: nn.Module,
    shards: list[ParameterShard],
    mesh: Mesh,
    *,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
) -> DeepSpeedEngine:
    """Give a model on the meta device its partitioned storage and optimizer; its weights are zeros.

    In stage 3 every module is materialised and partitioned by itself, so that no rank ever holds the whole model.
    """
    check_engine(zero, precision)
    quiet()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    config = deepspeed_config(zero, precision, optimizer)
    groups = GroupsForDeepSpeed(mesh)
    dtype: torch.dtype = getattr(torch, precision.parameters)
    for module in model.modules():
        materialise(module, device, dtype)
        if zero.stage == 3 and any(True for _ in module.parameters(recurse=False)):
            holder = nn.Module()
            for name, parameter in module.named_parameters(recurse=False):
                holder.register_parameter(name, parameter)
            # No dtype here: DeepSpeed 0.19 ignores it where fp16 isn't supported; the config's precision decides.
            deepspeed.zero.Init(
                module=holder,
                data_parallel_group=mesh.zero.process_group,
                config_dict_or_path=config,
                mpu=groups,
            )
    torch_optimizer = adamw([(name, p) for name, p in model.named_parameters() if p.requires_grad], optimizer)
    with redirect_stdout(io.StringIO()):  # its BF16_Optimizer prints reports of memory, whatever the level of its log
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=torch_optimizer, config=config, mpu=groups)
    built = DeepSpeedEngine(engine, torch_optimizer, mesh.zero)
    built.locate(shards)
    return built


def deal(sizes: list[int], num_ranks: int) -> list[int]:
    """Whose each of some tensors is: the largest first, each to the rank that has least."""
    loads, owners = [(0, rank) for rank in range(num_ranks)], [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, owners[index] = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[index], owners[index]))
    return owners


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the module's own meta parameters by zeros on the device; buffers aren't touched."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            zeros = torch.zeros(parameter.shape, device=device, dtype=dtype)
            made = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
            if is_split(parameter):
                mark_split(made)
            module.register_parameter(name, made)


def deepspeed_config(zero: ZeroConfig, precision: PrecisionConfig, optimizer: OptimizerConfig) -> dict[str, object]:
    """DeepSpeed's own configuration. It never learns of samples: micro batch 1, no accumulation."""
    half = precision.parameters == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "communication_data_type": "bf16" if precision.of("").reduce == "bfloat16" else "fp32",
        # Offloaded, AdamW is torch's too: one optimizer, the same step. DeepSpeed's own is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        # check_grad_overflow: without it stages 1 and 2 apply a NaN update in bf16 (in fp32 the norm alone is judged).
        "bf16": {"enabled": half, "check_grad_overflow": half},
        "zero_optimization": {
            "stage": zero.stage,
            "use_multi_rank_bucket_allreduce": False,
            # Default off in stages 1 and 2; races with overlap were reported and fixed over several releases.
            "overlap_comm": False,
            "reduce_bucket_size": zero.bucket_size,
            "allgather_bucket_size": zero.bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch,
            "stage3_param_persistence_threshold": zero.persistence,
            "stage3_max_reuse_distance": zero.reuse_distance,
            "offload_optimizer": {"device": "cpu" if zero.offload == "optimizer" else "none"},
        },
    }


def quiet() -> None:
    """Keep DeepSpeed's log to errors, and its CPU backend from compiling.

    On the CPU accelerator, `init_distributed` builds a shared-memory extension with ninja at first use (minutes on two
    cores, while the other ranks wait on a file lock). Gloo does the same work, so the operation is declared absent.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
