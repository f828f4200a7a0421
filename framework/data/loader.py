"""Samples -> batches on the device, prepared ahead by one thread.

The thread knows the schedule, so it reads exactly what the coming steps need. The position belongs to the batch that
was consumed, never to the thread: a resumed run starts a new loader at its step.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from framework.batch import Batch, Condition, Sample
from framework.data.buckets import Stream
from framework.data.config import BucketConfig
from framework.data.decode import decode_clip, frame_stride, num_source_frames
from framework.data.schedule import MicroBatch, Schedule, Slot, Work
from framework.data.shards import Caption, LatentSample
from framework.keys import key, uniform
from framework.shapes import LatentShape, latent_shape
from framework.text.encoder import TextEncoder
from framework.tokenizer.tokenizer import Tokenizer


class BatchBuilder:
    """Reads, decodes and encodes the slots of a micro-batch."""

    def __init__(
        self,
        streams: Sequence[Stream],
        buckets: Sequence[BucketConfig],
        *,
        tokenizer: Tokenizer,
        text: TextEncoder,
        dropout: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self._streams, self._buckets = streams, buckets
        self._tokenizer, self._text = tokenizer, text
        self._dropout, self._seed, self._device = dropout, seed, device

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self._tokenizer.channels

    def latent_shape(self, bucket: int) -> LatentShape:
        """The latent of a bucket."""
        return latent_shape(self._buckets[bucket].clip, self._tokenizer.strides)

    def build(self, micro: MicroBatch, *, step: int) -> Batch:
        """The batch of a micro-batch; empty slots are zeros of weight zero with the empty caption."""
        bucket = self._buckets[micro.bucket]
        latent = self.latent_shape(micro.bucket)
        shape = (self._tokenizer.channels, latent.frames, latent.height, latent.width)
        empty = Sample(uid="", draw="", latents=torch.zeros(shape), caption="", weight=0.0)
        samples = [empty if slot is None else self._sample(slot, bucket, step) for slot in micro.slots]
        text, mask = self._text.encode([sample.caption for sample in samples])
        condition = Condition(self._move(text), None if mask is None else self._move(mask))
        return Batch(
            latents=self._move(torch.stack([sample.latents for sample in samples])),
            weights=self._move(torch.tensor([sample.weight for sample in samples])),
            condition=condition,
            uids=tuple(sample.uid for sample in samples),
            draws=tuple(sample.draw for sample in samples),
            positions=tuple(-1 if slot is None else slot.position for slot in micro.slots),
            step_samples=micro.step_samples,
            bucket=micro.bucket,
            clip=bucket.clip,
            latent=latent,
        )

    def _sample(self, slot: Slot, bucket: BucketConfig, step: int) -> Sample:
        record = self._streams[slot.stream].shards.read(slot.sample)
        if isinstance(record, LatentSample):
            latents = torch.from_numpy(record.latents).float()
        else:
            needed = num_source_frames(bucket.frames, record.info.fps, bucket.fps)
            room = record.info.frames - needed + 1
            start = int(uniform(key(self._seed, "segment", uid=slot.draw, step=step)) * room)
            stride = frame_stride(record.info.fps, bucket.fps)
            frames = decode_clip(record.video, start=start, clip=bucket.clip, stride=stride, name=record.info.uid)
            latents = encode_frames(torch.from_numpy(frames), self._tokenizer)
        caption = choose_caption(record.captions, key(self._seed, "caption", uid=slot.draw, step=step))
        if uniform(key(self._seed, "caption_dropout", uid=slot.draw, step=step)) < self._dropout:
            caption = ""
        return Sample(slot.uid, slot.draw, latents, caption, 1.0)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


class Encoder(Protocol):
    """The part of a tokenizer that encoding needs."""

    def encode(self, video: Tensor) -> Tensor:
        """`B C T H W` float32 in [-1, 1] -> `B c t h w`."""
        ...


def encode_frames(frames_thwc: Tensor, tokenizer: Encoder) -> Tensor:
    """`T H W C` uint8 -> normalised latents `c t h w` float32."""
    video = rearrange(frames_thwc, "T H W C -> 1 C T H W").to(torch.float32) / 127.5 - 1
    return tokenizer.encode(video).squeeze(0)


def choose_caption(captions: Sequence[Caption], key_: int) -> str:
    """One of the weighted captions."""
    point = uniform(key_) * sum(caption.weight for caption in captions)
    for caption in captions:
        point -= caption.weight
        if point < 0:
            return caption.text
    return captions[-1].text


class Loader:
    """Steps and their batches from `start`, prepared `prefetch` micro-batches ahead by one thread."""

    def __init__(self, builder: BatchBuilder, schedule: Schedule, *, start: int, stop: int, prefetch: int) -> None:
        self._builder, self._schedule = builder, schedule
        self._queue: queue.Queue[Work | Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(target=self._run, args=(start, stop), name="loader", daemon=True)
        self._thread.start()

    def next_work(self) -> Work:
        """The next step; its batches must be taken before the one after it."""
        work = self._get()
        assert isinstance(work, Work), "the last step's batches weren't all taken"
        return work

    def batches(self, work: Work) -> Iterator[Batch]:
        """The batches of a step, in order."""
        for _ in range(work.num_micro):
            batch = self._get()
            assert isinstance(batch, Batch)
            yield batch

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join(timeout=10)

    def _get(self) -> Work | Batch:
        """The next item; `waited` grows by the seconds that it wasn't there."""
        begin = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - begin
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self, start: int, stop: int) -> None:
        try:
            for step in range(start, stop):
                work = self._schedule[step]
                self._put(work)
                for micro in work.micro_batches:
                    self._put(self._builder.build(micro, step=step))
        except BaseException as error:
            self._put(error)

    def _put(self, item: Work | Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise SystemExit
