"""Captions -> videos, with whatever holds the weights: a training engine or a model in one process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.batch import Condition, Noised
from framework.diffusion.first_frame import FirstFrame
from framework.diffusion.flow import NUM_TRAIN_TIMESTEPS, keyed_noise
from framework.diffusion.sampler import Experts, euler
from framework.diffusion.timesteps import num_tokens, shift_value
from framework.diffusion.video_file import to_uint8
from framework.keys import key
from framework.models.patchify import patchify, unpatchify_output
from framework.parallel.context_parallel.tokens import join_tokens, split_tokens
from framework.parallel.mesh import Mesh
from framework.programs.build import Encoders
from framework.recipe import Recipe, sample_bucket
from framework.shapes import ClipShape, LatentShape, latent_shape


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
        """Frames a second of the result: the sampler's, else the bucket's that is sampled, else 24."""
        return self.recipe.sampler.fps or sample_bucket(self.recipe).fps or 24.0

    def __call__(
        self, models: Experts, prompts: Sequence[str], *, seed: int, first: FirstFrame | None = None
    ) -> Tensor:
        """One video a prompt: `B T H W C` uint8 on the CPU. first: of all of them."""
        return to_uint8(self.encoders.tokenizer.decode(self.latents(models, prompts, seed=seed, first=first).cpu()))

    @torch.no_grad()
    def latents(self, models: Experts, prompts: Sequence[str], *, seed: int, first: FirstFrame | None = None) -> Tensor:
        """Normalised latents `B c t h w`. The noise is keyed by (seed, prompt). Raises ValueError for a first frame
        that doesn't suit the model.
        """
        self.check_first(first)
        model, latent, config = self.recipe.model, self._latent, self.recipe.sampler

        def velocity(condition: Condition, latents: Tensor, sigma: float) -> Tensor:
            timesteps = torch.full((len(prompts), 1), sigma * NUM_TRAIN_TIMESTEPS, device=self.device)
            ones = torch.ones(len(prompts), device=self.device)
            inputs = latents if first is None else first.beside(latents)
            patches = patchify(Noised(inputs, latents, timesteps, ones), model.patch_size)
            tokens = split_tokens(patches, self.mesh, self.recipe.attention.pattern)
            prediction = join_tokens(models.at(sigma)(tokens, condition), tokens.layout)
            return unpatchify_output(prediction, latent, model.patch_size).to(latents.dtype)

        given = self._condition(prompts, first)
        against = self._condition([config.negative] * len(prompts), first)
        return euler(
            self.noise(prompts, seed=seed).to(self.device),
            lambda x, sigma: velocity(given, x, sigma),
            lambda x, sigma: velocity(against, x, sigma),
            config,
            k=shift_value(self.recipe.flow.shift, num_tokens(latent, model.patch_size)),
            guidance=lambda sigma: models.guidance(sigma, config),
        )

    def noise(self, prompts: Sequence[str], *, seed: int) -> Tensor:
        """What sampling starts from, `B c t h w` on the CPU."""
        shape = (self.encoders.tokenizer.channels, self._latent.frames, self._latent.height, self._latent.width)
        return torch.stack([keyed_noise(key(seed, "sample", uid=prompt), shape) for prompt in prompts])

    @property
    def _latent(self) -> LatentShape:
        return latent_shape(self.clip, self.encoders.tokenizer.strides)

    def check_first(self, first: FirstFrame | None) -> None:
        """Raises ValueError for a first frame that the model can't read, or lacks."""
        model, channels = self.recipe.model, self.encoders.tokenizer.channels
        given = channels if first is None else channels + len(first.channels)
        tokens = first is not None and first.tokens is not None
        if (given, tokens) != (model.in_channels, model.image_dim is not None):
            raise ValueError(
                f"the model reads {model.in_channels} channels with{'out' if model.image_dim is None else ''} image "
                f"tokens, and there are {given} with{'' if tokens else 'out'} them: "
                + ("it makes videos of an image, give one" if first is None else "this model takes no such image")
            )

    def _condition(self, prompts: Sequence[str], first: FirstFrame | None) -> Condition:
        text, mask = self.encoders.text.encode(prompts)
        image = None if first is None else first.tokens_of(len(prompts), self.device)
        return Condition(text.to(self.device), None if mask is None else mask.to(self.device), image)
