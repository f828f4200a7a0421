"""mp4 files read back by PyAV, contact sheets by Pillow, 8 bits by hand."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from framework.diffusion import video_file
from framework.diffusion.video_file import to_uint8, write_contact_sheet, write_mp4


def smooth_clip(frames: int, height: int, width: int) -> np.ndarray:
    """A coloured wave that moves, `t h w 3` uint8."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 20 + t / 4), np.cos(y / 25 - t / 6), np.sin((x + y) / 30)]
    return (np.stack(waves, axis=-1) * 100 + 128).round().astype(np.uint8)


def read(path: Path) -> tuple[np.ndarray, Fraction]:
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]), rate


@pytest.mark.parametrize(
    ("size", "fps", "rate"),
    [((64, 96), 24, Fraction(24)), ((33, 47), 24000 / 1001, Fraction(24000, 1001)), ((8, 8), 12.5, Fraction(25, 2))],
)
def test_mp4_is_read_back(tmp_path: Path, size: tuple[int, int], fps: float, rate: Fraction) -> None:
    clip = smooth_clip(17, *size)
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, torch.from_numpy(clip), fps)
    decoded, found = read(path)
    height, width = size
    assert decoded.shape == (17, height + height % 2, width + width % 2, 3) and found == rate
    error = decoded[:, :height, :width].astype(float) - clip
    psnr = 10 * np.log10(255**2 / np.mean(error**2))
    assert psnr > 35, psnr
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_one_frame(tmp_path: Path) -> None:
    write_mp4(tmp_path / "still.mp4", smooth_clip(1, 16, 16), 24)
    assert read(tmp_path / "still.mp4")[0].shape == (1, 16, 16, 3)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(path, smooth_clip(5, 16, 16), 24)
    before = path.read_bytes()

    class BrokenFrame:
        @staticmethod
        def from_ndarray(array: np.ndarray, format: str) -> None:
            raise OSError("disk full")

    monkeypatch.setattr(video_file.av, "VideoFrame", BrokenFrame)
    with pytest.raises(OSError, match="disk full"):
        write_mp4(path, smooth_clip(9, 16, 16), 24)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected frames"):
            write_mp4(tmp_path / "clip.mp4", wrong, 24)


def test_contact_sheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    clip = smooth_clip(17, 64, 96)
    # 64 rows are enlarged 2 times to 128; 200 rows stay. Six frames of 17: 0, 3, 6, 10, 13, 16.
    write_contact_sheet(path, [("sample, " * 100, clip), ("clip", torch.from_numpy(smooth_clip(2, 200, 100)))])
    image = np.asarray(Image.open(path))
    assert image.shape == (24 + 128 + 4 + 24 + 200 + 4, 4 + 6 * 192 + 5 * 4 + 4, 3)
    for column, index in enumerate((0, 3, 6, 10, 13, 16)):
        left = 4 + column * 196
        assert np.array_equal(image[24:152:2, left : left + 192 : 2], clip[index])
        assert np.array_equal(image[25:152:2, left + 1 : left + 192 : 2], clip[index])
    # The second row has the two frames there are, and both labels leave ink.
    assert np.array_equal(image[180:380, 108:208], smooth_clip(2, 200, 100)[1])
    assert image[180:380, 212:].max() == 24
    assert image[:24].max() > 200 and image[156:180].max() > 200
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_contact_sheet_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        write_contact_sheet(tmp_path / "sheet.png", [])


def test_eight_bits() -> None:
    # (x + 1) 127.5: -1 -> 0, 1 -> 255, 0 -> 127.5 rounds to even 128, 0.5 -> 191.25; beyond the range is clamped.
    video = torch.tensor([-1.0, 1.0, 0.0, 0.5, -3.0, 3.0]).reshape(1, 3, 2, 1, 1)
    frames = to_uint8(video)
    assert frames.shape == (1, 2, 1, 1, 3) and frames.dtype == torch.uint8
    assert frames.flatten().tolist() == [0, 128, 0, 255, 191, 255]
    every = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16, 1).permute(0, 2, 3, 4, 1)
    pixels = (every.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    assert torch.equal(to_uint8(pixels), every)
