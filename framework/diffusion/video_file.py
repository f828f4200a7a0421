"""Videos out of the project: tensors to 8 bits and back, mp4 files, and contact sheets to look at.

Shapes: b clips, c colours, t h w; frames_thwc is one clip of uint8 RGB frames.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from os import getpid
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Frames = Tensor | np.ndarray

CRF = 16
SHEET_HEIGHT = 128
LABEL_HEIGHT = 24
LABEL_SIZE = 15
GAP = 4
INK = (235, 235, 235)
PAPER = (24, 24, 24)


def to_uint8(video_bcthw: Tensor) -> Tensor:
    """Pixels in [-1, 1] (clamped) to `b t h w c` uint8, rounded to nearest."""
    wide = video_bcthw.to(torch.promote_types(video_bcthw.dtype, torch.float32))
    return rearrange(((wide + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), "b c t h w -> b t h w c")


def write_mp4(path: Path | str, frames_thwc: Frames, fps: float) -> None:
    """One clip as H.264, yuv420p, constant rate factor 16 (visually lossless); it appears complete or not at all.

    The chroma of yuv420p is halved, so an odd height or width gets one more row or column, a copy of the last.
    """
    frames = _checked(frames_thwc)
    pad_height, pad_width = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, pad_height), (0, pad_width), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    with _appearing(Path(path)) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF), "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_contact_sheet(path: Path | str, rows: Sequence[tuple[str, Frames]], columns: int = 6) -> None:
    """A PNG with one row a video: its label, and under it up to `columns` evenly spaced frames, first and last too.

    Frames lower than 128 pixels are enlarged by a whole factor, pixel by pixel. A label that is too long is cut.
    """
    if not rows or columns < 1:
        raise ValueError(f"a contact sheet needs at least one row and one column: {len(rows)} rows, columns={columns}")
    strips = [_strip(_checked(frames), columns) for _, frames in rows]
    width = max(strip.width for strip in strips) + 2 * GAP
    height = sum(strip.height + LABEL_HEIGHT + GAP for strip in strips)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_SIZE)
    top = 0
    for (label, _), strip in zip(rows, strips, strict=True):
        text = " ".join(label.split())
        while draw.textlength(text, font) > width - 2 * GAP:
            text = text.removesuffix("...")[:-1] + "..."
        draw.text((GAP, top + LABEL_HEIGHT // 2), text, INK, font, anchor="lm")
        sheet.paste(strip, (GAP, top + LABEL_HEIGHT))
        top += LABEL_HEIGHT + strip.height + GAP
    with _appearing(Path(path)) as partial:
        sheet.save(partial, format="PNG")


def _strip(frames: np.ndarray, columns: int) -> Image.Image:
    """Evenly spaced frames side by side, enlarged to a readable height."""
    count = min(columns, len(frames))
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    factor = max(1, -(-SHEET_HEIGHT // frames.shape[1]))
    large = chosen.repeat(factor, axis=1).repeat(factor, axis=2)
    spaced = np.pad(large, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=PAPER[0])
    return Image.fromarray(rearrange(spaced, "n h w c -> h (n w) c")[:, :-GAP])


def _checked(frames_thwc: Frames) -> np.ndarray:
    """The frames as an array. Raises ValueError unless they are `t h w 3` uint8 with at least one frame."""
    frames = frames_thwc.detach().cpu().numpy() if isinstance(frames_thwc, Tensor) else frames_thwc
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"expected frames `t h w 3` of uint8, not {frames.shape} of {frames.dtype}")
    return frames


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end; removed where writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
