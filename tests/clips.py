"""Small videos made on the spot, for the tests of shards, decoding and curation."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ASSET = Path(__file__).parent / "assets" / "bigbuckbunny.mp4"


def make_clip(
    path: Path,
    *,
    frames: int,
    height: int = 48,
    width: int = 64,
    fps: Fraction | int = 24,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """A moving pattern with noise, different for each seed, written to path; the suffix chooses the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            picture = np.roll(base, (number, 2 * number), (0, 1))[:height, :width]
            picture = picture // 2 + rng.integers(0, 32, picture.shape, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def all_frames(video: Path) -> np.ndarray:
    """Every frame by PyAV alone, `T H W C` uint8."""
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
