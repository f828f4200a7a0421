"""Rows of shards -> samples -> the batch of a micro-batch.

A row is decoded in two halves, so that processes can work on the videos of coming batches: `begin` takes the row apart
and hands a video's clip to the pool; `finish` waits for the frames, encodes what isn't encoded and puts the samples
together. What a draw decides (where the clip begins, the crop, the caption) is keyed by it.

Shapes: `T H W C` uint8 frames, `c t h w` latents, `L D` text tokens.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from framework.batch import Batch, Condition
from framework.data.buckets import Stream
from framework.data.config import BucketConfig
from framework.data.decode import frame_stride, num_source_frames
from framework.data.schedule import MicroBatch, Slot
from framework.data.shards import Caption, LatentSample, VideoSample
from framework.data.workers import DecodeJob, DecodePool
from framework.keys import key, uniform
from framework.shapes import LatentShape, Strides, latent_shape
from framework.text.encoder import TextEncoder
from framework.text.padding import pad_texts
from framework.tokenizer.tokenizer import Tokenizer, encode_frames


class Encoders(Protocol):
    """What turns pixels and captions into what the transformer reads; each is made when it's first asked for."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def text(self) -> TextEncoder: ...


@dataclass(frozen=True)
class TextShape:
    """Of an embedded caption. length: L. width: D. masked: whether there is a mask."""

    length: int
    width: int
    masked: bool


@dataclass(frozen=True)
class LatentForm:
    """What a recipe's latents are like, without its tokenizer. channels: c."""

    channels: int
    strides: Strides

    def shape(self, bucket: BucketConfig) -> LatentShape:
        """The latent of a bucket."""
        return latent_shape(bucket.clip, self.strides)


@dataclass(frozen=True)
class BatchTensors:
    """What of a batch is read. latents: `B c t h w` float32. weights: `B`. text: `B L D`. text_mask: `B L`, or None."""

    latents: Tensor
    weights: Tensor
    text: Tensor
    text_mask: Tensor | None


@dataclass(frozen=True)
class Begun:
    """A slot's sample on its way. frames: of a video, else its latents are there. text: its embedding, where stored."""

    slot: Slot
    frames: "Future[np.ndarray] | None"
    latents: Tensor | None
    caption: str
    text: Tensor | None


class BatchBuilder:
    """Samples and batches, on the CPU. text: the shape of captions. device: of the encoders. pool: decodes videos."""

    def __init__(
        self,
        streams: Sequence[Stream],
        buckets: Sequence[BucketConfig],
        *,
        encoders: Encoders,
        form: LatentForm,
        text: TextShape,
        dropout: float,
        seed: int,
        device: torch.device,
        pool: DecodePool,
    ) -> None:
        self._streams, self._buckets = streams, buckets
        self._encoders, self._form = encoders, form
        self.text = text
        self._dropout, self._seed, self._device, self._pool = dropout, seed, device, pool

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self._form.channels

    def close(self) -> None:
        """End the decoding processes."""
        self._pool.close()

    def latent_shape(self, bucket: int) -> LatentShape:
        """The latent of a bucket."""
        return self._form.shape(self._buckets[bucket])

    def shape(self, bucket: int) -> tuple[int, int, int, int]:
        """`c t h w` of a bucket."""
        latent = self.latent_shape(bucket)
        return self._form.channels, latent.frames, latent.height, latent.width

    def build(self, micro: MicroBatch, *, step: int) -> Batch:
        """The batch of a micro-batch, its rows read one by one from where they are."""
        begun: list[Begun | None] = []
        for slot in micro.slots:
            sample = None if slot is None else self._streams[slot.stream].shards.read(slot.sample)
            begun.append(None if slot is None or sample is None else self.begin(slot, sample, step=step))
        return self.finish(micro, begun)

    def begin(self, slot: Slot, sample: VideoSample | LatentSample, *, step: int) -> Begun:
        """Begin with a sample of a step."""
        chosen = choose_caption(sample.captions, key(self._seed, "caption", uid=slot.draw, step=step))
        dropped = uniform(key(self._seed, "caption_dropout", uid=slot.draw, step=step)) < self._dropout
        caption = "" if dropped else sample.captions[chosen].text
        if isinstance(sample, VideoSample):
            return Begun(slot, self._pool.submit(self._job(slot, sample, step)), None, caption, None)
        text = None
        if sample.texts:
            stored = self._streams[slot.stream].shards.empty_text if dropped else sample.texts[chosen]
            assert stored is not None, "shards with texts hold the empty one too"
            text = torch.from_numpy(stored).float()
        return Begun(slot, None, torch.from_numpy(sample.latents).float(), caption, text)

    def finish(self, micro: MicroBatch, begun: Sequence[Begun | None]) -> Batch:
        """The batch of a micro-batch; empty slots are zeros of weight zero with the empty caption."""
        zeros = torch.zeros(self.shape(micro.bucket))
        text, mask = self._embed(begun)
        tensors = BatchTensors(
            latents=torch.stack([zeros if each is None else self._latents(each) for each in begun]),
            weights=torch.tensor([0.0 if each is None else 1.0 for each in begun]),
            text=text,
            text_mask=mask,
        )
        lost = sum(slot is not None and each is None for slot, each in zip(micro.slots, begun, strict=True))
        return self.assemble(micro, tensors, lost=lost)

    def assemble(self, micro: MicroBatch, tensors: "BatchTensors", *, lost: int = 0) -> Batch:
        """The batch of a micro-batch from its tensors; everything else of it every rank knows."""
        slots, bucket = micro.slots, self._buckets[micro.bucket]
        return Batch(
            latents=tensors.latents,
            weights=tensors.weights,
            condition=Condition(tensors.text, tensors.text_mask),
            uids=tuple("" if slot is None else slot.uid for slot in slots),
            draws=tuple("" if slot is None else slot.draw for slot in slots),
            positions=tuple(-1 if slot is None else slot.position for slot in slots),
            bucket_samples=micro.bucket_samples,
            bucket=micro.bucket,
            clip=bucket.clip,
            latent=self.latent_shape(micro.bucket),
            lost=lost,
        )

    def blank(self, micro: MicroBatch) -> "BatchTensors":
        """Tensors of a micro-batch to be filled."""
        num, text = len(micro.slots), self.text
        return BatchTensors(
            latents=torch.empty(num, *self.shape(micro.bucket)),
            weights=torch.empty(num),
            text=torch.empty(num, text.length, text.width),
            text_mask=torch.empty(num, text.length, dtype=torch.bool) if text.masked else None,
        )

    def _job(self, slot: Slot, sample: VideoSample, step: int) -> DecodeJob:
        """What is to be decoded of a video."""
        info, bucket = sample.info, self._buckets[slot.bucket]

        def draw(purpose: str) -> float:
            return uniform(key(self._seed, purpose, uid=slot.draw, step=step))

        room = info.frames - num_source_frames(bucket.frames, info.fps, bucket.fps)
        match bucket.segment:
            case "random":
                start = int(draw("segment") * (room + 1))
            case "center":
                start = room // 2
            case "first":
                start = 0
        crop = (draw("crop_x"), draw("crop_y")) if bucket.crop == "random" else None
        return DecodeJob(sample.video, start, bucket.clip, frame_stride(info.fps, bucket.fps), info.uid, crop)

    def _latents(self, begun: Begun) -> Tensor:
        if begun.latents is not None:
            return begun.latents
        assert begun.frames is not None
        frames = torch.from_numpy(begun.frames.result()).to(self._device)
        return encode_frames(frames[None], self._encoders.tokenizer)[0].cpu()

    def _embed(self, begun: Sequence[Begun | None]) -> tuple[Tensor, Tensor | None]:
        """Stored texts as they are; the captions of the others, if there are any, are embedded."""
        missing = [i for i, each in enumerate(begun) if each is not None and each.text is None]
        captions = [each.caption for each in begun if each is not None and each.text is None]
        made = dict(zip(missing, self._encoders.text.embed(captions) if missing else [], strict=True))
        texts = [torch.zeros(1, self.text.width)] * len(begun)
        for i, each in enumerate(begun):
            if each is not None:
                texts[i] = made[i].float().cpu() if each.text is None else each.text
        return pad_texts(texts, self.text.length, masked=self.text.masked)


def choose_caption(captions: Sequence[Caption], key_: int) -> int:
    """Which of the weighted captions."""
    point = uniform(key_) * sum(caption.weight for caption in captions)
    for index, caption in enumerate(captions):
        point -= caption.weight
        if point < 0:
            return index
    return len(captions) - 1
