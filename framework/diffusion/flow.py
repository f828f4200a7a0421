"""Flow matching, in Wan's convention (arXiv 2503.20314, section 4.2; rectified flow, arXiv 2209.03003).

    x_sigma = (1 - sigma) x_0 + sigma eps,   eps ~ N(0, 1),   sigma in [0, 1]
    target  v = d x_sigma / d sigma = eps - x_0
    loss    = mean |model(x_sigma, 1000 sigma, condition) - v|^2

The model is told t = 1000 sigma. The loss of a step is  sum_i w_i sum_elements |.|^2 / count,  with

    per_sample    w_i = 1 / elements of clip i      count = clips of a step, on average
    per_token     w_i = 1                           count = elements of a step, on average
    per_step      w_i = 1 / elements of clip i      count = clips of this step

Steps of short clips have more of them than steps of long ones (data/budget.py). With the first two every clip, or every
token, counts the same in whatever step it is; per_step gives every step the same weight, so a clip of a bucket with
small batches more than one of a bucket with large ones. Where all steps are alike, per_step and per_sample are too.

Noise and noise level of a clip are keyed by its draw and the step, so they are the same on every mesh. With
`flow.timesteps.per_frame` each frame of tokens has a level of its own, keyed by the frame too (diffusion forcing, arXiv
2407.01392).

Shapes: `B c t h w` latents, `B S Q` predictions on patches.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from framework.batch import Batch, Noised, Score, Tokens
from framework.diffusion.config import FlowConfig, LossConfig
from framework.diffusion.timesteps import noise_level, num_tokens, shift_value
from framework.keys import key, uniform
from framework.shapes import LatentShape, token_shape

NUM_TRAIN_TIMESTEPS = 1000.0


def keyed_noise(key_: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(key_)
    return torch.randn(shape, generator=generator)


class Flow:
    """The objective of a run."""

    def __init__(self, config: FlowConfig, loss: LossConfig, *, seed: int, patch_size: tuple[int, int, int]) -> None:
        self._config, self._loss, self._seed = config, loss, seed
        self._patch_size = patch_size

    def noise(self, batch: Batch, *, step: int) -> Noised:
        """Noise a training batch."""
        shape = tuple(batch.latents.shape[1:])
        noises = torch.stack([keyed_noise(key(self._seed, "noise", uid=d, step=step), shape) for d in batch.draws])
        if self._config.timesteps.per_frame:
            frames = token_shape(batch.latent, self._patch_size).frames
            sigmas = [self._frame_sigmas(draw, frames, latent=batch.latent, step=step) for draw in batch.draws]
        else:
            width = 1 / batch.bucket_samples
            sigmas = [
                [self._sigma(draw, place / batch.bucket_samples, width, latent=batch.latent, step=step)]
                for draw, place in zip(batch.draws, batch.positions, strict=True)
            ]
        return self.mix(batch, noises, sigmas)

    def mix(self, batch: Batch, noises: Tensor, sigmas: list[list[float]]) -> Noised:
        """x_sigma and its target for given noise `B c t h w` and noise levels, of each sample one or one a frame of
        tokens.

        One is the default: a sample then has one timestep, which broadcasts in the model, and one for each frame is
        looked up by every token, which costs 3 to 4 % of a forward and backward (two CPU cores, width 288).
        """
        device = batch.latents.device
        eps = noises.to(device, non_blocking=True)
        sigma = torch.tensor(sigmas, dtype=torch.float32).to(device, non_blocking=True)
        spread_bt = sigma.repeat_interleave(batch.latent.frames // sigma.shape[1], dim=1)
        sigma_b1t11 = rearrange(spread_bt, "b t -> b 1 t 1 1")
        return Noised(
            latents=(1 - sigma_b1t11) * batch.latents + sigma_b1t11 * eps,
            target=eps - batch.latents,
            timesteps=sigma * NUM_TRAIN_TIMESTEPS,
            weights=batch.weights,
        )

    def losses(self, prediction_bsq: Tensor, tokens: Tokens) -> Tensor:
        """Each sample's weighted squared error, `B`, summed over this rank's valid tokens; their sum, divided by
        `global_count`, is this rank's part of the loss.
        """
        return self.score(tokens)(prediction_bsq, 0)

    def score(self, tokens: Tokens) -> Score:
        """The same as a function of the prediction of some of the rank's tokens, from one on."""

        def losses(prediction_bsq: Tensor, first: int) -> Tensor:
            assert tokens.target is not None
            dtype = torch.promote_types(prediction_bsq.dtype, torch.float32)
            valid = max(0, min(prediction_bsq.shape[1], tokens.layout.num_valid - first))
            target = tokens.target[:, first : first + valid]
            sums = (prediction_bsq[:, :valid].to(dtype) - target.to(dtype)).square().sum(dim=(1, 2)) * tokens.weights
            if self._loss.weight == "per_token":
                return sums
            return sums / (sum(tokens.layout.valid) * prediction_bsq.shape[2])

        return losses

    def global_count(self, counts: Sequence[float], latents: Sequence[LatentShape], channels: int) -> float:
        """What a sum is divided by. counts: samples a bucket over all ranks; latents: the buckets' shapes."""
        if self._loss.weight != "per_token":
            return float(sum(counts))
        elements = (latent.frames * latent.height * latent.width * channels for latent in latents)
        return float(sum(count * n for count, n in zip(counts, elements, strict=True)))

    def sigma_at(self, u: float, latent: LatentShape) -> float:
        """The noise level at quantile u for clips of this shape."""
        k = shift_value(self._config.shift, num_tokens(latent, self._patch_size))
        return noise_level(self._config, u, k)

    def _frame_sigmas(self, draw: str, frames: int, *, latent: LatentShape, step: int) -> list[float]:
        """A level for each frame of tokens."""
        keys = [key(self._seed, "frame_timestep", uid=f"{draw}@{frame}", step=step) for frame in range(frames)]
        return [self.sigma_at(uniform(each), latent) for each in keys]

    def _sigma(self, draw: str, stratum: float, width: float, *, latent: LatentShape, step: int) -> float:
        """stratum, width: the part of (0, 1) that is this sample's where those of a bucket in a step share it out; an
        empty slot has none.
        """
        u = uniform(key(self._seed, "timestep", uid=draw, step=step))
        if self._config.timesteps.stratified and stratum >= 0:
            u = stratum + u * width
        return self.sigma_at(u, latent)
