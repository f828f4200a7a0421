"""Training loops that do the same work on a mesh of several ranks, for step.py.

    ours        programs.train.optimizer_step on the recipe's mesh and engine, EMA included
    no_ema      the same without the EMA's update, which the others don't have either
    ours_fsdp2  no_ema with FSDP2 as the engine
    titan       our transformer of one device under `fully_shard`, block by block, written as torchtitan's trainer is
    accelerate  diffusers' `WanTransformer3DModel` under accelerate's FSDP2

The peers split the batch over all ranks, as they have neither tp nor cp here; ours splits it as the mesh says. All have
the same initial weights, global batch, loss, clipping, learning rates and AdamW. FSDP2 frees parameters after the
forward in ZeRO stage 3, and keeps them to the backward in stages 1 and 2.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from contestants import ByHand, Contestant, Drawn, Example, build_each, build_model, build_ours, build_plain, fill
from held import HeldBatches, Noise
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from framework.data.schedule import Place
from framework.models.dit import DiT
from framework.parallel.mesh import Mesh
from framework.programs import build
from framework.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_titan(recipe: Recipe, mesh: Mesh, held: HeldBatches, noise: Noise) -> Contestant:
    """torchtitan's loop: `parallelize.py` (apply_fsdp), `train.py` (train_step), `distributed/utils.py` (clipping)."""
    assert mesh.world.process_group is not None
    model = build_model(recipe)
    assert isinstance(model, DiT)
    device_mesh = DeviceMesh.from_group(mesh.world.process_group, build.this_device().type)
    frees = recipe.zero.stage == 3
    for block in model.blocks:
        fully_shard(block, mesh=device_mesh, reshard_after_forward=frees)
    fully_shard(model, mesh=device_mesh, reshard_after_forward=frees)
    hand = ByHand(recipe, model, held, noise)
    parameters, clip = list(model.parameters()), recipe.optimizer.clip

    def step(number: int) -> tuple[Tensor, float]:
        hand.optimizer.zero_grad()
        total = torch.zeros((), device=build.this_device())
        for loss in hand.losses(number, model):
            loss.backward()
            total += loss.detach()
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
        nn.utils.clip_grads_with_norm_(parameters, clip if clip else float("inf"), norm, foreach=True)
        hand.optimizer.step()
        return total / mesh.world.size, float(norm)

    return Contestant(step, lambda: None, F.linear)


def whole(norm: Tensor) -> Tensor:
    """A norm over all ranks."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def latent_error(model: nn.Module, example: Example, drawn: Drawn) -> Tensor:
    """The mean squared error of diffusers' transformer, on latents. Its timesteps are one a sample."""
    latents, target, timesteps = drawn
    (prediction,) = model(latents, timesteps[:, 0], example.batch.condition.text, return_dict=False)
    return F.mse_loss(prediction, target)


def build_accelerator(frees: bool, num_micro: int) -> "Accelerator":
    """accelerate with FSDP2. frees: parameters after the forward.

    Asked for FSDP on the CPU, accelerate 1.15 silently runs DDP (`AcceleratorState.__init__` looks at the plugin on
    accelerators only). Its FSDP2 works there, so it is switched on in the state.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)  # one for each stage
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=frees,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["WanTransformerBlock"],
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), fsdp_plugin=plugin, gradient_accumulation_steps=num_micro
    )
    if not torch.cuda.is_available():
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert accelerator.is_fsdp2
    return accelerator


def build_accelerate(recipe: Recipe, mesh: Mesh, held: HeldBatches, noise: Noise) -> Contestant:
    """The loop of accelerate's documentation around diffusers' model."""
    from diffusers import WanTransformer3DModel

    num_micro = len(held.by_step[0])
    accelerator = build_accelerator(recipe.zero.stage == 3, num_micro)
    hand = ByHand(recipe, fill(WanTransformer3DModel(**asdict(recipe.model)), recipe), held, noise, latent_error)
    model, optimizer = accelerator.prepare(hand.model, hand.optimizer)
    assert any(isinstance(module, FSDPModule) for module in model.modules())
    clip = recipe.optimizer.clip

    def step(number: int) -> tuple[Tensor, float]:
        total, norm = torch.zeros((), device=build.this_device()), torch.zeros(())
        for loss in hand.losses(number, model):
            with accelerator.accumulate(model):
                accelerator.backward(loss * num_micro)  # it divides by the number of micro-batches
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), clip if clip else float("inf"))
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        return total / mesh.world.size, float(whole(norm))

    return Contestant(step, lambda: None, F.linear)


def build_on_mesh(recipe: Recipe, mesh: Mesh, noise: Noise) -> tuple[dict[str, Contestant], list[str]]:
    """All that run on several ranks, and why others don't. A collective."""
    meshes, num_buckets = build.bucket_meshes(recipe, mesh), len(recipe.data.buckets)
    held = HeldBatches(recipe, [Place(each.dp.index, each.dp.size) for each in meshes], masked=False)
    dealt = HeldBatches(recipe, [Place(mesh.rank, mesh.world.size)] * num_buckets, masked=False)
    fsdp2 = replace(recipe, zero=replace(recipe.zero, engine="fsdp2", stage=max(2, recipe.zero.stage)))
    builders: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: build_ours(recipe, mesh, held, with_ema=True),
        "no_ema": lambda: build_ours(recipe, mesh, held, with_ema=False),
        "ours_fsdp2": lambda: build_ours(fsdp2, mesh, held, with_ema=False),
        "titan": lambda: build_titan(recipe, mesh, dealt, noise),
    }
    left_out = [f"{name} isn't installed" for name in ("accelerate", "diffusers") if find_spec(name) is None]
    if not left_out:
        builders["accelerate"] = lambda: build_accelerate(recipe, mesh, dealt, noise)
    return build_each(builders), left_out


def build_alone(recipe: Recipe, held: HeldBatches, noise: Noise) -> Contestant:
    """torch by hand in one process, on the whole batch: what all must agree with."""
    return build_plain(ByHand(recipe, build_model(recipe), held, noise))
