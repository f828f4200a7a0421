"""Images as videos of one frame, against Pillow."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from framework.data.decode import VideoInfo, decode_clip, probe
from framework.shapes import ClipShape


def picture() -> Image.Image:
    """48x64, smooth, so that filters of chroma agree; no symmetry."""
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([4 * x, 5 * y, 100 + x + y], -1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "file_format", "options", "tolerance"),
    [
        ("RGB", "JPEG", {"quality": 95}, 6),
        ("RGB", "JPEG", {"quality": 95, "progressive": True}, 6),
        ("L", "JPEG", {"quality": 95}, 1),
        ("RGB", "PNG", {}, 0),
        ("RGBA", "PNG", {}, 0),
        ("L", "PNG", {}, 0),
        ("P", "PNG", {}, 0),
        ("RGB", "WEBP", {"quality": 95}, 8),
        ("RGB", "WEBP", {"lossless": True}, 0),
        ("RGBA", "WEBP", {"lossless": True}, 0),
    ],
)
def test_image_is_a_video_of_one_frame(mode: str, file_format: str, options: dict[str, Any], tolerance: int) -> None:
    data = encoded(picture().convert(mode), file_format, **options)
    assert probe(data) == VideoInfo(1, 48, 64, 25.0)
    expected = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    clip = decode_clip(data, start=0, clip=ClipShape(1, 48, 64))
    assert clip.shape == (1, 48, 64, 3)
    assert np.abs(clip[0] - expected).max() <= tolerance
    small = np.asarray(Image.fromarray(clip[0]).resize((16, 16), Image.Resampling.BICUBIC, box=(16, 0, 64, 48)))
    assert np.array_equal(decode_clip(data, start=0, clip=ClipShape(1, 16, 16), crop=(1, 0))[0], small)
    with pytest.raises(ValueError, match="a7 has no frame 1: frames 0 to 2"):
        decode_clip(data, start=0, clip=ClipShape(3, 48, 64), name="a7")
    with pytest.raises(ValueError, match="a7 has no frame 1: frames 1 to 1"):
        decode_clip(data, start=1, clip=ClipShape(1, 48, 64), name="a7")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_honoured(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(picture(), file_format, quality=95, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data)))).astype(int)
    info = probe(data)
    assert (info.height, info.width) == expected.shape[:2]
    clip = decode_clip(data, start=0, clip=ClipShape(1, info.height, info.width))
    assert np.abs(clip[0] - expected).max() <= 8


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [2, 4, 5, 7])
def test_exif_mirroring_is_refused(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(picture(), file_format, exif=exif)
    with pytest.raises(ValueError, match="a7 is broken: its EXIF orientation mirrors it"):
        probe(data, name="a7")
    with pytest.raises(ValueError, match="a7 is broken: its EXIF orientation mirrors it"):
        decode_clip(data, start=0, clip=ClipShape(1, 48, 64), name="a7")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize(
    ("file_format", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_truncated_image_is_named(file_format: str, options: dict[str, Any], share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    thumbnail = {"exif": b"Exif\0\0" + encoded(picture(), "JPEG")} if file_format == "JPEG" else {}
    data = encoded(Image.fromarray(noise), file_format, **options, **thumbnail)
    assert probe(data).frames == 1
    with pytest.raises(ValueError, match="a7 is broken"):
        probe(data[: int(share * len(data))], name="a7")
    with pytest.raises(ValueError, match="a7 is broken"):
        decode_clip(data[: int(share * len(data))], start=0, clip=ClipShape(1, 48, 64), name="a7")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of sizes and EXIF
def test_damaged_headers_raise_nothing_else(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data, draw, refused = encoded(picture(), file_format, exif=exif), np.random.default_rng(0), 0
    for _ in range(600):
        damaged = bytearray(data)
        for place in draw.integers(0, 160, draw.integers(1, 6)):
            damaged[place] = draw.integers(256)
        try:
            assert probe(bytes(damaged)).frames == 1
        except ValueError:
            refused += 1
    assert 20 < refused < 590
