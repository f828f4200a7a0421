"""A decoding process that uses torchcodec, for decode.py: torchcodec's frames, the framework's resize."""

import sys
from dataclasses import dataclass

import numpy as np
from torchcodec.decoders import VideoDecoder

from framework.data import decode, decode_worker
from framework.data.decode import source_offsets
from framework.shapes import ClipShape


@dataclass(frozen=True)
class Frame:
    """What `_resize` needs of PyAV's frame."""

    pixels: np.ndarray
    rotation: int = 0

    def to_ndarray(self, *, format: str) -> np.ndarray:  # PyAV's name
        assert format == "rgb24"
        return self.pixels


def full_frames(video: bytes, *, start: int, frames: int, stride: float) -> np.ndarray:
    """`T H W C` uint8 at the video's own size, by one thread."""
    decoder = VideoDecoder(video, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    indices = [start + offset for offset in source_offsets(frames, stride)]
    return decoder.get_frames_at(indices).data.numpy()


def decode_clip(
    video: bytes, *, start: int, clip: ClipShape, stride: float, name: str, crop: tuple[float, float] | None
) -> np.ndarray:
    """As framework.data.decode's, for upright videos of square pixels."""
    x, y = crop or (0.5, 0.5)
    view = decode._View(clip, x, y)
    pictures = full_frames(video, start=start, frames=clip.frames, stride=stride)
    return np.stack([decode._resize(Frame(picture), view, 1.0) for picture in pictures])


if __name__ == "__main__":
    decode_worker.main(int(sys.argv[1]), decode_clip)
