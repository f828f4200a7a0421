"""The loss on held-out clips, as a number that can be compared across steps, meshes and runs.

Every clip is noised at the same stratified levels, the quantiles (j + 1/2) / n of the training distribution, with noise
keyed by the clip and j. So the value depends on the weights alone: not on the step, the mesh or luck.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.batch import Predictor
from framework.data.buckets import Stream, bucket_views
from framework.data.builder import BatchBuilder
from framework.data.channel import Channel
from framework.data.config import BucketConfig
from framework.data.device import Mover
from framework.data.order import Order
from framework.data.schedule import MicroBatch, Place, Slot, cut, pick
from framework.diffusion.flow import Flow, keyed_noise
from framework.evaluate.config import ValidationConfig
from framework.kernels.config import PatternConfig
from framework.keys import key
from framework.models.patchify import patchify
from framework.parallel.collectives import all_reduce_sum
from framework.parallel.context_parallel.tokens import split_tokens
from framework.parallel.mesh import Mesh
from framework.shapes import LatentShape


@dataclass(frozen=True)
class ValidationLoss:
    """by_sigma[bucket][j]: mean loss of a bucket at its j-th noise level. sigmas likewise. loss: the mean over clips
    and levels.
    """

    loss: float
    buckets: tuple[str, ...]
    sigmas: tuple[tuple[float, ...], ...]
    by_sigma: tuple[tuple[float, ...], ...]


class Validation:
    """The held-out clips of a recipe, dealt to the replicas. meshes: of each bucket."""

    def __init__(
        self,
        config: ValidationConfig,
        streams: list[Stream],
        buckets: list[BucketConfig],
        *,
        builder: BatchBuilder,
        channel: Channel,
        mover: Mover,
        flow: Flow,
        meshes: list[Mesh],
        micro_batch: int,
        seed: int,
        patch_size: tuple[int, int, int],
        pattern: PatternConfig,
    ) -> None:
        self._config, self._builder, self._flow, self._meshes = config, builder, flow, meshes
        self._channel, self._mover = channel, mover
        self._buckets, self._seed, self._patch_size, self._pattern = buckets, seed, patch_size, pattern
        self._slots = held_out_slots(streams, buckets, config.samples, seed)
        places = [Place(mesh.dp.index, mesh.dp.size) for mesh in meshes]
        self._micro = [
            cut(b, pick(slots, places[b]), micro_batch, bucket_samples=len(slots))
            for b, slots in enumerate(self._slots)
        ]

    @torch.no_grad()
    def run(self, predict: Predictor) -> ValidationLoss:
        """Measure the loss of the weights that `predict` holds. A collective over the world."""
        sums = torch.zeros(len(self._buckets), self._config.sigmas, dtype=torch.float64)
        latents: list[LatentShape] = []
        for bucket, micro_batches in enumerate(self._micro):
            for micro in micro_batches:
                sums[bucket] += self._losses(predict, micro)
            latents.append(self._builder.latent_shape(bucket))
        all_reduce_sum(sums, self._meshes[0].control, "validation").wait()
        means = [
            sums[b] / self._flow.global_count((len(slots),), [latents[b]], self._builder.channels)
            for b, slots in enumerate(self._slots)
        ]
        counts = torch.tensor([len(slots) for slots in self._slots], dtype=torch.float64)
        loss = float((torch.stack([m.mean() for m in means]) * counts).sum() / counts.sum())
        return ValidationLoss(
            loss=loss,
            buckets=tuple(bucket.name for bucket in self._buckets),
            sigmas=tuple(tuple(self._sigmas(latent)) for latent in latents),
            by_sigma=tuple(tuple(m.tolist()) for m in means),
        )

    def _sigmas(self, latent: LatentShape) -> list[float]:
        n = self._config.sigmas
        return [self._flow.sigma_at((j + 0.5) / n, latent) for j in range(n)]

    def _losses(self, predict: Predictor, micro: MicroBatch) -> Tensor:
        """Summed losses of a micro-batch at every level, float64 on the CPU."""
        read = self._channel.share(micro, lambda: self._builder.build(micro, step=0))
        batch = self._mover.start(read).arrive()
        shape = tuple(batch.latents.shape[1:])
        sums = []
        for j, sigma in enumerate(self._sigmas(batch.latent)):
            noises = torch.stack([keyed_noise(key(self._seed, "validation", uid=u, step=j), shape) for u in batch.uids])
            noised = self._flow.mix(batch, noises, [[sigma]] * len(batch.uids))
            tokens = split_tokens(patchify(noised, self._patch_size), self._meshes[micro.bucket], self._pattern)
            sums.append(self._flow.losses(predict(tokens, batch.condition), tokens).double().sum())
        return torch.stack(sums).cpu()


def held_out_slots(streams: list[Stream], buckets: list[BucketConfig], samples: int, seed: int) -> list[list[Slot]]:
    """The first `samples` clips of each bucket, in the keyed order of the streams' views."""
    chosen = []
    for bucket, views in enumerate(bucket_views(streams, buckets)):
        slots: list[Slot] = []
        for stream, view in enumerate(views):
            order = Order(view, seed, window=max(1, view.num_shards))
            for draw in range(min(view.num_samples, samples - len(slots))):
                sample = order.at(draw)[1]
                uid = streams[stream].shards.index.uid(sample)
                slots.append(Slot(len(slots), bucket, stream, sample, uid, f"{uid}#validation"))
        chosen.append(slots)
    return chosen
