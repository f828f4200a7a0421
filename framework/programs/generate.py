"""Captions -> videos, with whatever holds the weights: a training engine or a model in one process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.batch import Condition, Noised, Predictor
from framework.diffusion.flow import NUM_TRAIN_TIMESTEPS, keyed_noise
from framework.diffusion.sampler import euler
from framework.diffusion.timesteps import num_tokens, shift_value
from framework.diffusion.video_file import to_uint8
from framework.keys import key
from framework.models.patchify import patchify, unpatchify_output
from framework.parallel.context_parallel.tokens import join_tokens, split_tokens
from framework.parallel.mesh import Mesh
from framework.programs.build import Encoders
from framework.recipe import Recipe
from framework.shapes import ClipShape, latent_shape


@dataclass(frozen=True)
class Generator:
    """Samples videos in one shape, each on the ranks of a replica of `mesh`."""

    recipe: Recipe
    encoders: Encoders
    clip: ClipShape
    device: torch.device
    mesh: Mesh

    @property
    def fps(self) -> float:
        """Frames a second of the result: the sampler's, else the first bucket's, else 24."""
        return self.recipe.sampler.fps or self.recipe.data.buckets[0].fps or 24.0

    @torch.no_grad()
    def __call__(self, predict: Predictor, prompts: Sequence[str], *, seed: int) -> Tensor:
        """One video a prompt: `B T H W C` uint8 on the CPU. The noise is keyed by (seed, prompt)."""
        tokenizer, model = self.encoders.tokenizer, self.recipe.model
        latent = latent_shape(self.clip, tokenizer.strides)
        shape = (tokenizer.channels, latent.frames, latent.height, latent.width)
        noise = torch.stack([keyed_noise(key(seed, "sample", uid=prompt), shape) for prompt in prompts])

        def velocity(condition: Condition, latents: Tensor, sigma: float) -> Tensor:
            timesteps = torch.full((len(prompts), 1), sigma * NUM_TRAIN_TIMESTEPS, device=self.device)
            ones = torch.ones(len(prompts), device=self.device)
            tokens = split_tokens(patchify(Noised(latents, latents, timesteps, ones), model.patch_size), self.mesh)
            prediction = join_tokens(predict(tokens, condition), tokens.layout)
            return unpatchify_output(prediction, latent, model.patch_size).to(latents.dtype)

        given, empty = self._condition(prompts), self._condition([""] * len(prompts))
        latents = euler(
            noise.to(self.device),
            lambda x, sigma: velocity(given, x, sigma),
            lambda x, sigma: velocity(empty, x, sigma),
            self.recipe.sampler,
            k=shift_value(self.recipe.flow.shift, num_tokens(latent, model.patch_size)),
        )
        return to_uint8(tokenizer.decode(latents.cpu()))

    def _condition(self, prompts: Sequence[str]) -> Condition:
        text, mask = self.encoders.text.encode(prompts)
        return Condition(text.to(self.device), None if mask is None else mask.to(self.device))
