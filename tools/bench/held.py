"""What every contestant of step.py works on: the same batches, and where its noise comes from."""

from collections.abc import Iterator

import torch
from torch import Tensor

from framework.batch import Batch, Condition
from framework.data.schedule import MicroBatch, Place, Slot, Work, cut, pick
from framework.diffusion.flow import NUM_TRAIN_TIMESTEPS
from framework.diffusion.timesteps import num_tokens, shift_value
from framework.keys import key
from framework.programs import build
from framework.recipe import Recipe
from framework.shapes import latent_shape
from framework.tokenizer.config import tokenizer_strides

DISTINCT = 4  # steps whose batches are held


class HeldBatches:
    """The micro-batches of DISTINCT steps in memory, used in turn: in the place of the loader.

    places: this rank's among the replicas, one for each bucket. masked: captions are padded and masked, as the product
    has them; otherwise padding is attended to, since diffusers' model knows no mask. A sample is the same whatever rank
    holds it.
    """

    waited = 0.0

    def __init__(self, recipe: Recipe, places: list[Place], *, masked: bool) -> None:
        buckets, self._recipe, self._masked = recipe.data.buckets, recipe, masked
        self._encoder, strides = build.Encoders(recipe).text, tokenizer_strides(recipe.tokenizer)
        slots = [Slot(i, i % len(buckets), 0, i, f"clip{i}", f"clip{i}#0.0") for i in range(recipe.data.global_batch)]
        groups = [[slot for slot in slots if slot.bucket == b] for b in range(len(buckets))]
        size = recipe.data.micro_batch
        micros = [
            micro
            for b, members in enumerate(groups)
            for micro in cut(b, pick(members, places[b]), size, bucket_samples=len(slots))
        ]
        self.work = Work(0, tuple(micros), tuple(len(members) for members in groups))
        self.latents = [latent_shape(bucket.clip, strides) for bucket in buckets]
        self.by_step = [[self._batch(micro, step) for micro in micros] for step in range(DISTINCT)]

    def batches(self, work: Work) -> Iterator[Batch]:
        return iter(self.by_step[work.step % DISTINCT])

    def _batch(self, micro: MicroBatch, step: int) -> Batch:
        chosen, latent = [slot for slot in micro.slots if slot is not None], self.latents[micro.bucket]
        assert len(chosen) == len(micro.slots), "the ranks must divide the batch: an empty slot is work for nothing"
        shape = (self._recipe.model.in_channels, latent.frames, latent.height, latent.width)
        text, mask = self._encoder.encode([f"A rabbit looks at clip {slot.uid}." for slot in chosen])
        device = build.this_device()
        return Batch(
            latents=torch.stack([held_latents(shape, slot.uid, step) for slot in chosen]).to(device),
            weights=torch.ones(len(chosen), device=device),
            condition=Condition(text.to(device), mask.to(device) if self._masked and mask is not None else None),
            uids=tuple(slot.uid for slot in chosen),
            draws=tuple(slot.draw for slot in chosen),
            positions=tuple(slot.position for slot in chosen),
            bucket_samples=micro.bucket_samples,
            bucket=micro.bucket,
            clip=self._recipe.data.buckets[micro.bucket].clip,
            latent=latent,
        )


def held_latents(shape: tuple[int, ...], uid: str, step: int) -> Tensor:
    """A sample's latents `c t h w`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(key(0, "bench", uid=uid, step=step)))


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
        timesteps = (NUM_TRAIN_TIMESTEPS * sigma)[:, None]
        return torch.lerp(latents, eps, sigma.view(-1, 1, 1, 1, 1)), eps - latents, timesteps
