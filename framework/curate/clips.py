"""Units -> samples: decode the segments of a video, run the tokenizer on several at once, embed the captions.

Shapes: `T H W C` uint8 decoded, `B C T H W` float32 in [-1, 1] to the tokenizer, `B c t h w` latents, `L D` texts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from framework.curate.config import EncodeConfig
from framework.curate.reuse import Reuse
from framework.curate.units import Misfit, Unit, segment_starts
from framework.data.decode import decode_clip, frame_stride
from framework.data.index import SampleInfo
from framework.data.shards import LatentSample, ShardDirectory, VideoSample
from framework.shapes import Strides
from framework.text.encoder import TextEncoder
from framework.tokenizer.tokenizer import PixelEncoder, encode_frames


class Encoder(PixelEncoder, Protocol):
    """The part of a tokenizer that encoding ahead of time needs."""

    @property
    def strides(self) -> Strides: ...

    @property
    def version(self) -> str: ...


@dataclass
class _Open:
    """A unit being encoded. latents: of each segment by its uid; complete when each of `uids` has them."""

    unit: Unit
    video: VideoSample
    uids: list[str]
    latents: dict[str, np.ndarray] = field(default_factory=dict)
    texts: tuple[np.ndarray, ...] | None = None
    num_reused: int = 0


class ClipEncoder:
    """Encodes units in their order. broken: units whose video can't be decoded, by name."""

    def __init__(
        self,
        source: ShardDirectory,
        tokenizer: Encoder,
        text: TextEncoder | None,
        reuse: Reuse,
        config: EncodeConfig,
        device: str,
    ) -> None:
        self._source, self._tokenizer, self._text = source, tokenizer, text
        self._reuse, self._config, self._device = reuse, config, device
        self.broken: dict[str, Misfit] = {}
        self._open: list[_Open] = []
        self._waiting: list[tuple[_Open, str, np.ndarray]] = []

    def encode(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, list[LatentSample], int]]:
        """Each unit that could be decoded, its samples, and how many of these were reused.

        Raises ValueError for latents that aren't finite in the stored dtype, and OSError.
        """
        for number, unit in enumerate(units):
            self._decode(unit)
            if number + 1 == len(units) or units[number + 1].bucket != unit.bucket:
                self._flush()
            while self._open and (self._is_broken(self._open[0]) or self._is_complete(self._open[0])):
                opened = self._open.pop(0)
                if not self._is_broken(opened):
                    yield opened.unit, self._samples(opened), opened.num_reused

    def _decode(self, unit: Unit) -> None:
        """Line the segments of a unit up for the tokenizer, which runs whenever there are enough."""
        video = self._source.read(unit.index)
        assert isinstance(video, VideoSample)
        info = video.info
        starts = segment_starts(info, unit.bucket)
        opened = _Open(unit, video, [f"{info.uid}@{start}" for start in starts])
        self._open.append(opened)
        for start, uid in zip(starts, opened.uids, strict=True):
            if found := self._reuse.find(unit, uid):
                sample, same_texts = found
                opened.latents[uid] = sample.latents
                opened.num_reused += 1
                opened.texts = sample.texts if same_texts else opened.texts
                continue
            stride = frame_stride(info.fps, unit.bucket.fps)
            try:
                clip = decode_clip(video.video, start=start, clip=unit.bucket.clip, stride=stride, name=info.uid)
            except ValueError as error:
                self.broken[unit.name] = Misfit(info.uid, "broken", str(error))
                return
            self._waiting.append((opened, uid, clip))
            if len(self._waiting) >= self._config.batch:
                self._flush()

    @torch.inference_mode()
    def _flush(self) -> None:
        """Encode what is waiting, all of one shape."""
        if not self._waiting:
            return
        frames = torch.from_numpy(np.stack([clip for _, _, clip in self._waiting])).to(self._device)
        dtype = getattr(torch, self._config.dtype)
        latents = encode_frames(frames, self._tokenizer).to("cpu", dtype).numpy()
        for (opened, uid, _), each in zip(self._waiting, latents, strict=True):
            if not np.isfinite(each).all():
                raise ValueError(
                    f"the latents of {uid} aren't finite in {self._config.dtype}; encode with dtype=float32"
                )
            opened.latents[uid] = each
        self._waiting.clear()

    def _samples(self, opened: _Open) -> list[LatentSample]:
        video, bucket = opened.video, opened.unit.bucket
        captions, texts = video.captions, opened.texts or ()
        if self._text is not None and not texts:
            texts = tuple(unpadded(self._text, [caption.text for caption in captions], self._config.dtype))
        fps = video.info.fps if bucket.fps is None else bucket.fps
        samples = []
        for uid in opened.uids:
            info = SampleInfo(uid, bucket.frames, bucket.height, bucket.width, fps, video.info.scores)
            latents = np.ascontiguousarray(opened.latents[uid])
            samples.append(LatentSample(info, latents, captions, video.source, video.licence, texts))
        return samples

    def _is_broken(self, opened: _Open) -> bool:
        return opened.unit.name in self.broken

    def _is_complete(self, opened: _Open) -> bool:
        return opened.latents.keys() == set(opened.uids)


def unpadded(encoder: TextEncoder, captions: Sequence[str], dtype: Literal["float16", "float32"]) -> list[np.ndarray]:
    """Each caption's embedding without its padding, `L_i D`. Raises ValueError for those that aren't finite in the
    dtype.
    """
    found = []
    for text_ld in encoder.embed(captions):
        array = text_ld.to("cpu", getattr(torch, dtype)).numpy()
        if not np.isfinite(array).all():
            raise ValueError(f"a caption's embedding isn't finite in {dtype}; encode with dtype=float32")
        found.append(array)
    return found
