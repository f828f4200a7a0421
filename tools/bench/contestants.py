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
from torch import Tensor, nn

from framework.batch import Batch, Condition
from framework.data.loader import Loader
from framework.data.schedule import MicroBatch, Place, Schedule, Slot, Work, cut, share
from framework.diffusion.flow import NUM_TRAIN_TIMESTEPS
from framework.diffusion.timesteps import num_tokens, shift_value
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
from framework.programs.train import Parts, optimizer_step
from framework.recipe import Recipe, bucket_tokens
from framework.shapes import latent_shape
from framework.tokenizer.config import tokenizer_strides

DISTINCT = 4  # steps whose batches are held

Step = Callable[[int], tuple[Tensor, float]]  # number of the step -> the step's mean loss, gradient norm
Draw = Callable[[Batch, int], tuple[Tensor, Tensor, Tensor]]  # batch, step -> x_sigma, target, timesteps


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
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result


class HeldBatches:
    """The micro-batches of DISTINCT steps in memory, used in turn: in the place of the loader."""

    waited = 0.0

    def __init__(self, recipe: Recipe) -> None:
        generator, buckets = torch.Generator().manual_seed(0), recipe.data.buckets
        encoder, strides = build.build_encoders(recipe).text, tokenizer_strides(recipe.tokenizer)
        slots = [Slot(i, i % len(buckets), 0, i, f"clip{i}", f"clip{i}#0.0") for i in range(recipe.data.global_batch)]
        groups = [[slot for slot in slots if slot.bucket == b] for b in range(len(buckets))]
        micros = [
            micro
            for b, members in enumerate(groups)
            for micro in cut(b, share(members, Place(0, 1)), recipe.data.micro_batch)
        ]
        self.work = Work(0, tuple(micros), tuple(len(members) for members in groups))
        self.latents = [latent_shape(bucket.clip, strides) for bucket in buckets]

        def batch(micro: MicroBatch) -> Batch:
            chosen, latent = [slot for slot in micro.slots if slot is not None], self.latents[micro.bucket]
            shape = (len(chosen), recipe.model.in_channels, latent.frames, latent.height, latent.width)
            text, mask = encoder.encode([f"A rabbit looks at clip {slot.uid}." for slot in chosen])
            device = build.this_device()
            return Batch(
                latents=torch.randn(shape, generator=generator).to(device),
                weights=torch.ones(len(chosen), device=device),
                condition=Condition(text.to(device), None if mask is None else mask.to(device)),
                uids=tuple(slot.uid for slot in chosen),
                draws=tuple(slot.draw for slot in chosen),
                positions=tuple(slot.position for slot in chosen),
                bucket=micro.bucket,
                clip=buckets[micro.bucket].clip,
                latent=latent,
            )

        self.by_step = [[batch(micro) for micro in micros] for _ in range(DISTINCT)]

    def batches(self, work: Work) -> Iterator[Batch]:
        return iter(self.by_step[work.step % DISTINCT])


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


class ByHand:
    """What both hand-written loops share: model, examples with their positions, and where the noise comes from."""

    def __init__(self, recipe: Recipe, held: HeldBatches, draw: Draw) -> None:
        self.recipe, self.draw = recipe, draw
        self.patch_size = recipe.model.patch_size
        self.model = build_model(recipe)
        self.optimizer = adamw(list(self.model.named_parameters()), recipe.optimizer)
        by_token = recipe.loss.weight == "per_token"
        sizes = [[b.latents.numel() if by_token else len(b.uids) for b in batches] for batches in held.by_step]
        self.examples = [
            [(batch, *self.places(batch), size / sum(row)) for batch, size in zip(batches, row, strict=True)]
            for batches, row in zip(held.by_step, sizes, strict=True)
        ]

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positions = token_positions(len(batch.uids), batch.latent, self.patch_size, batch.latents.device)
        return positions, frame_index(positions)

    def losses(self, step: int, model: nn.Module) -> Iterator[Tensor]:
        """Each micro-batch's part of the step's mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, step=step)
        for batch, positions, frames, part in self.examples[step % DISTINCT]:
            latents, target, timesteps = self.draw(batch, step)
            patches, text = patchify_input(latents, self.patch_size), batch.condition
            prediction = model(patches, positions, frames, timesteps, text.text, text_mask_bl=text.text_mask)
            yield F.mse_loss(prediction, patchify_output(target, self.patch_size)) * part


def build_model(recipe: Recipe) -> nn.Module:
    """The transformer with the initial weights that our engine gives it."""
    model = DiT(recipe.model, build_attention(recipe.attention))
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


class Noise:
    """The draw of the hand-written loops: the product's keyed one while they are checked, then one generator."""

    def __init__(self, recipe: Recipe) -> None:
        self.keyed = True
        self._flow, self._recipe = build.build_flow(recipe), recipe
        self._generator = torch.Generator(build.this_device()).manual_seed(0)

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.keyed:
            noised = self._flow.noise(batch, step=step)
            return noised.latents, noised.target, noised.timesteps
        latents, patch_size = batch.latents, self._recipe.model.patch_size
        eps = torch.randn(latents.shape, generator=self._generator, device=latents.device)
        u = torch.rand(len(latents), generator=self._generator, device=latents.device)
        k = shift_value(self._recipe.flow.shift, num_tokens(batch.latent, patch_size))
        sigma = k * u / (1 + (k - 1) * u)
        timesteps = (NUM_TRAIN_TIMESTEPS * sigma)[:, None].expand(-1, latents.shape[2] // patch_size[0])
        return torch.lerp(latents, eps, sigma.view(-1, 1, 1, 1, 1)), eps - latents, timesteps


def build_contestants(recipe: Recipe, mesh: Mesh, held: HeldBatches, noise: Noise) -> dict[str, Contestant]:
    """All of them, each built with torch's own F.linear in place."""
    builders: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: build_ours(recipe, mesh, held, with_ema=True),
        "no_ema": lambda: build_ours(recipe, mesh, held, with_ema=False),
        "bare": lambda: build_bare(ByHand(recipe, held, noise)),
        "again": lambda: build_bare(ByHand(recipe, held, noise)),
        "plain": lambda: build_plain(ByHand(recipe, held, noise)),
    }
    built = {}
    for name, builder in builders.items():
        with patch.object(F, "linear", F.linear):
            built[name] = builder()
    return built
