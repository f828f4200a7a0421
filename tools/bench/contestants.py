"""Training loops that do the same work on one rank, for step.py.

    ours      programs.train.optimizer_step as `cuboid train` runs it, EMA included; its batches come from a list
    no_ema    the same without the EMA's update, which the hand-written loops don't have either
    bare      DeepSpeed's engine driven by hand, with the same configuration
    again     a second one of bare: what again / bare differs from 1 by is what the machine can't resolve
    plain     torch alone: backward, clip_grad_norm_, fused AdamW

All have the same model, initial weights, batches, micro-batches, loss, clipping, learning rates and AdamW. What a
hand-written loop would compute once (positions) it computes once. Shapes: see framework/batch.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast
from unittest.mock import patch

import deepspeed
import torch
import torch.nn.functional as F
from held import DISTINCT, HeldBatches, Noise
from ranks import synchronise
from torch import Tensor, nn

from framework.batch import Batch
from framework.data.loader import Loader
from framework.data.schedule import Schedule
from framework.ema import Ema
from framework.kernels.attention import build_attention
from framework.keys import key
from framework.models.dit import DiT
from framework.models.initialise import init_tensor
from framework.models.patchify import frame_index, patchify_input, patchify_output, token_positions
from framework.optim import adamw, learning_rate
from framework.parallel.mesh import Mesh
from framework.parallel.zero.deepspeed import deepspeed_config
from framework.programs import build
from framework.programs.parts import Parts
from framework.programs.train import optimizer_step
from framework.recipe import Recipe, bucket_tokens

Step = Callable[[int], tuple[Tensor, float]]  # number of the step -> the step's mean loss, gradient norm


@dataclass
class Contestant:
    """A step, what frees its engine, the F.linear that it runs with, and how many steps it has done."""

    step: Step
    close: Callable[[], None]
    linear: Callable[..., Tensor]
    done: int = 0

    def __call__(self) -> tuple[Tensor, float]:
        # Building a stage-3 engine replaces torch's F.linear for the whole process, other models included.
        with patch.object(F, "linear", self.linear):
            result = self.step(self.done)
        self.done += 1
        synchronise()
        return result


class NoEma:
    """No average."""

    def update(self, *, step: int) -> None:
        pass


def build_ours(recipe: Recipe, mesh: Mesh, held: HeldBatches, *, with_ema: bool) -> Contestant:
    """The product's own step."""
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    engine.refresh(updates=0)
    parts = Parts(
        recipe=recipe,
        mesh=mesh,
        meshes=build.bucket_meshes(recipe, mesh),
        engine=engine,
        ema=Ema(engine.fragments(), recipe.ema) if with_ema else cast(Ema, NoEma()),
        flow=build.build_flow(recipe),
        schedule=cast(Schedule, None),
        loader=cast(Loader, held),
        latents=held.latents,
        num_tokens=[bucket_tokens(recipe, index).num_tokens for index in range(len(held.latents))],
    )

    def step(number: int) -> tuple[Tensor, float]:
        work = replace(held.work, step=number)
        loss_sum, stats, _ = optimizer_step(parts, work)
        return loss_sum / parts.global_count(work), stats.grad_norm

    return Contestant(step, engine.destroy, F.linear)


@dataclass(frozen=True)
class Example:
    """A micro-batch with what a hand-written loop computes once: its tokens' places, and its part of the batch."""

    batch: Batch
    positions: Tensor
    frames: Tensor
    part: float


Drawn = tuple[Tensor, Tensor, Tensor]  # x_sigma, target, timesteps
Error = Callable[[nn.Module, Example, Drawn], Tensor]


class ByHand:
    """What hand-written loops share: optimizer, examples with their positions, and where the noise comes from.

    error: how a model's mean squared error on an example is found.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, held: HeldBatches, draw: Noise, error: Error | None = None
    ) -> None:
        self.recipe, self.model, self.draw = recipe, model, draw
        self.error: Error = error or self.patch_error
        self.patch_size = recipe.model.patch_size
        self.optimizer = adamw(list(self.model.named_parameters()), recipe.optimizer)
        by_token = recipe.loss.weight == "per_token"
        sizes = [[b.latents.numel() if by_token else len(b.uids) for b in batches] for batches in held.by_step]
        self.examples = [
            [self.example(batch, size / sum(row)) for batch, size in zip(batches, row, strict=True)]
            for batches, row in zip(held.by_step, sizes, strict=True)
        ]

    def example(self, batch: Batch, part: float) -> Example:
        positions = token_positions(len(batch.uids), batch.latent, self.patch_size, batch.latents.device)
        return Example(batch, positions, frame_index(positions), part)

    def patch_error(self, model: nn.Module, example: Example, drawn: Drawn) -> Tensor:
        """That of our transformer, on patches."""
        (latents, target, timesteps), text = drawn, example.batch.condition
        patches = patchify_input(latents, self.patch_size)
        prediction = model(
            patches, example.positions, example.frames, timesteps, text.text, text_mask_bl=text.text_mask
        )
        return F.mse_loss(prediction, patchify_output(target, self.patch_size))

    def losses(self, step: int, model: nn.Module) -> Iterator[Tensor]:
        """Each micro-batch's part of this rank's mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, step=step)
        for example in self.examples[step % DISTINCT]:
            yield self.error(model, example, self.draw(example.batch, step)) * example.part


def build_model(recipe: Recipe) -> nn.Module:
    """The transformer with the initial weights that our engine gives it."""
    return fill(DiT(recipe.model, build_attention(recipe.attention)), recipe)


def fill(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A model whose parameters have our names, with our initial weights, on this rank's device."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=name))
            parameter.copy_(init_tensor(name, tuple(parameter.shape), generator, recipe.model))
    return model.to(build.this_device())


def build_bare(hand: ByHand) -> Contestant:
    """The loop on DeepSpeed's engine."""
    recipe = hand.recipe
    config = deepspeed_config(recipe.zero, recipe.precision, recipe.optimizer)
    engine, _, _, _ = deepspeed.initialize(model=hand.model, optimizer=hand.optimizer, config=config)

    def step(number: int) -> tuple[Tensor, float]:
        total, last = torch.zeros((), device=build.this_device()), len(hand.examples[0]) - 1
        for index, loss in enumerate(hand.losses(number, engine)):
            engine.set_gradient_accumulation_boundary(index == last)
            engine.backward(loss)
            total += loss.detach()
        engine.step()
        return total, float(engine.get_global_grad_norm())

    return Contestant(step, engine.destroy, F.linear)


def build_plain(hand: ByHand) -> Contestant:
    """The loop on torch."""
    parameters, clip = list(hand.model.parameters()), hand.recipe.optimizer.clip

    def step(number: int) -> tuple[Tensor, float]:
        total = torch.zeros((), device=build.this_device())
        for loss in hand.losses(number, hand.model):
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(parameters, clip if clip else float("inf"))
        hand.optimizer.step()
        hand.optimizer.zero_grad()
        return total, float(norm)

    return Contestant(step, lambda: None, F.linear)


def build_contestants(recipe: Recipe, mesh: Mesh, held: HeldBatches, noise: Noise) -> dict[str, Contestant]:
    """All of one rank."""
    builders: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: build_ours(recipe, mesh, held, with_ema=True),
        "no_ema": lambda: build_ours(recipe, mesh, held, with_ema=False),
        "bare": lambda: build_bare(ByHand(recipe, build_model(recipe), held, noise)),
        "again": lambda: build_bare(ByHand(recipe, build_model(recipe), held, noise)),
        "plain": lambda: build_plain(ByHand(recipe, build_model(recipe), held, noise)),
    }
    return build_each(builders)


def build_each(builders: dict[str, Callable[[], Contestant]]) -> dict[str, Contestant]:
    """Build them, each with torch's own F.linear in place."""
    built = {}
    for name, builder in builders.items():
        with patch.object(F, "linear", F.linear):
            built[name] = builder()
    return built
