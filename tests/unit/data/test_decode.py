"""Decoding against a full decode by PyAV alone, and against numbers worked out by hand."""

import subprocess
import sys
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import ASSET, all_frames, make_clip

from framework.data import decode
from framework.data.decode import decode_clip, frame_stride, num_source_frames, probe, source_offsets
from framework.shapes import ClipShape


@pytest.fixture(scope="module")
def gops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames with a keyframe every 12 and B-frames, so that decoding order isn't the order shown."""
    options = {"g": "12", "bf": "3", "x264-params": "scenecut=0"}
    return make_clip(tmp_path_factory.mktemp("clips") / "gops.mp4", frames=60, options=options)


def test_offsets_by_hand() -> None:
    assert source_offsets(5, frame_stride(24, None)) == [0, 1, 2, 3, 4]
    assert source_offsets(5, frame_stride(30, 15)) == [0, 2, 4, 6, 8]
    assert source_offsets(6, frame_stride(25, 10)) == [0, 3, 5, 8, 10, 13]  # 2.5 and 7.5 go up
    assert source_offsets(5, frame_stride(30, 24)) == [0, 1, 3, 4, 5]  # 1.25 2.5 3.75 5
    assert num_source_frames(5, 30, 24) == 6
    assert num_source_frames(17, 25.0, None) == 17
    assert num_source_frames(17, 25.0, 12.5) == 33
    assert num_source_frames(1, 60.0, 1.0) == 1


def test_asset_is_probed() -> None:
    info = probe(ASSET)
    assert (info.frames, info.height, info.width, info.fps) == (132, 720, 1280, 25.0)


def test_every_start_equals_full_decode(gops: Path) -> None:
    reference = all_frames(gops)
    video = gops.read_bytes()
    for start in range(56):
        clip = decode_clip(video, start=start, clip=ClipShape(5, 48, 64))
        assert np.array_equal(clip, reference[start : start + 5]), start


def test_late_start_decodes_only_from_its_keyframe(gops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = decode._decode
    monkeypatch.setattr(
        decode, "_decode", lambda *a, **k: (decoded.append(frame.pts) or frame for frame in original(*a, **k))
    )
    decode_clip(gops.read_bytes(), start=50, clip=ClipShape(3, 48, 64))
    assert len(decoded) <= 7  # frames 48 to 52, and leading pictures if the encoder made any


def test_pictures_that_nothing_refers_to_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One keyframe and three B-frames of four, of which two or more are no reference: the frames kept are the same."""
    options = {"g": "100", "bf": "3", "x264-params": "scenecut=0:b-adapt=0"}
    path = make_clip(tmp_path / "long.mp4", frames=60, options=options)
    reference, decoded = all_frames(path), []
    original = decode._decode
    monkeypatch.setattr(
        decode, "_decode", lambda *a, **k: (decoded.append(frame.pts) or frame for frame in original(*a, **k))
    )
    for start in range(1, 50):
        clip = decode_clip(path.read_bytes(), start=start, clip=ClipShape(3, 48, 64), stride=4.0)
        assert np.array_equal(clip, reference[start : start + 9 : 4]), start
    assert len(decoded) < 0.7 * sum(start + 9 for start in range(1, 50))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("open.mkv", "libx264", {"g": "10", "bf": "2", "x264-params": "open-gop=1:scenecut=0"}),
        ("vp9.webm", "libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
        ("mpeg4.mov", "mpeg4", {"g": "9", "bf": "1"}),
    ],
)
def test_other_containers_and_codecs(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    path = make_clip(tmp_path / name, frames=40, codec=codec, options=options)
    reference = all_frames(path)
    assert probe(path).frames == len(reference)
    for start in (0, 9, 10, 21, 29, 33):
        clip = decode_clip(path.read_bytes(), start=start, clip=ClipShape(3, 48, 64), stride=2.0)
        assert np.array_equal(clip, reference[start : start + 5 : 2]), start


def test_edit_list_that_hides_frames(gops: Path, tmp_path: Path) -> None:
    """An mp4 cut without re-encoding starts between keyframes: packets that aren't shown aren't counted."""
    path = tmp_path / "cut.mp4"
    with av.open(str(gops)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = 17 * int(1 / (24 * stream.time_base))
        for packet in source.demux(stream):
            if packet.size and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                if packet.pts >= 12 * int(1 / (24 * stream.time_base)) - shift:
                    packet.stream = copy
                    target.mux(packet)
    reference = all_frames(path)
    assert probe(path).frames == len(reference) == 43  # of the 48 packets in the file
    for start in (9, 20, 39):
        clip = decode_clip(path.read_bytes(), start=start, clip=ClipShape(4, 48, 64))
        assert np.array_equal(clip, reference[start : start + 4]), start


def test_resize_is_antialiased_cover_and_centre_crop() -> None:
    """Against torch's antialiased bicubic in float64 on the cropped frame: 1280x720 -> middle 960x720 -> 128x96."""
    with av.open(str(ASSET)) as container:
        frame = next(islice(container.decode(video=0), 3, None)).to_ndarray(format="rgb24")
    clip = decode_clip(ASSET.read_bytes(), start=3, clip=ClipShape(1, 96, 128))[0]
    crop = torch.from_numpy(frame[:, 160:1120].copy()).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(crop, size=(96, 128), mode="bicubic", antialias=True)[0]
    difference = np.abs(clip - expected.clamp(0, 255).permute(1, 2, 0).numpy())
    assert difference[:, 2:-2].max() < 1.6  # two passes, each rounded to 8 bits
    assert difference.max() < 8  # at the sides the filter also sees what the crop leaves out


@pytest.mark.parametrize(
    ("crop", "left", "top"), [(None, 32, 0), ((0.5, 0.5), 32, 0), ((0, 0), 0, 0), ((1, 0.3), 64, 0)]
)
def test_crop_lies_where_it_is_told(tmp_path: Path, crop: tuple[float, float] | None, left: int, top: int) -> None:
    path = make_clip(tmp_path / "a.mp4", frames=2, height=64, width=128)
    clip = decode_clip(path.read_bytes(), start=0, clip=ClipShape(2, 64, 64), crop=crop)
    assert np.array_equal(clip, all_frames(path)[:, top : top + 64, left : left + 64])


def test_crop_of_a_high_picture(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", frames=1, height=96, width=64)
    clip = decode_clip(path.read_bytes(), start=0, clip=ClipShape(1, 64, 64), crop=(0.0, 0.75))
    assert np.array_equal(clip, all_frames(path)[:, 24:88])
    with pytest.raises(ValueError, match=r"a7: the place of a crop must lie in 0 to 1, not \(0, 1.5\)"):
        decode_clip(path.read_bytes(), start=0, clip=ClipShape(1, 64, 64), crop=(0, 1.5), name="a7")


def test_rotation_of_a_phone(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "plain.mp4", frames=4)
    reference = all_frames(path)
    data = path.read_bytes()
    matrix = data.index(b"tkhd") + 4 + 40  # a full box of version 0: 40 bytes before its 3x3 matrix, 16.16 fixed point
    one = 1 << 16
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, one, 0, -one, 0, 0, 0, 0, 1 << 30))
    video = data[:matrix] + turned + data[matrix + 36 :]
    info = probe(video)
    assert (info.height, info.width) == (64, 48)
    clip = decode_clip(video, start=0, clip=ClipShape(4, 64, 48))
    assert np.array_equal(clip, np.rot90(reference, -1, (1, 2)))  # shown a quarter turn clockwise


def test_wide_pixels_are_shown_wide(tmp_path: Path) -> None:
    """Stored 48x64 with pixels twice as wide as high is shown 48x128: a square clip takes the middle 24 columns."""
    path = make_clip(tmp_path / "wide.mp4", frames=1, options={"aspect": "2:1"})
    clip = decode_clip(path.read_bytes(), start=0, clip=ClipShape(1, 48, 48))[0]
    pairs = clip.reshape(48, 24, 2, 3).astype(float).mean(2)
    stretched = all_frames(path)[0]
    errors = {left: np.abs(pairs - stretched[:, left : left + 24]).mean() for left in range(16, 25)}
    assert min(errors, key=errors.__getitem__) == 20
    assert errors[20] < 4


def test_container_that_lies_about_its_frames(tmp_path: Path) -> None:
    """The header of a truncated mp4 still says 30 frames; 20 can be decoded."""
    path = make_clip(tmp_path / "clip.mp4", frames=30, options={"bf": "0"}, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    truncated = data[: positions[20]]
    with av.open(BytesIO(truncated)) as container:
        assert container.streams.video[0].frames == 30
    assert probe(data).frames == 30
    assert probe(truncated).frames == 20


def test_rate_that_is_not_whole(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "ntsc.mp4", frames=6, fps=Fraction(30000, 1001))
    assert probe(path).fps == 30000 / 1001


@pytest.mark.parametrize("damage", ["few bytes", "many bytes", "no moov", "text", "empty"])
def test_broken_is_named(gops: Path, damage: str) -> None:
    """A few bad bytes make FFmpeg paint over a frame and say nothing but a flag; many make it give up."""
    data = gops.read_bytes()
    noise = np.random.default_rng(0).bytes(2000)
    middle = len(data) // 2
    match damage:
        case "few bytes":
            with av.open(str(gops)) as container:
                place = [packet.pos for packet in container.demux(video=0) if packet.is_keyframe][2] + 100
            data = data[:place] + noise[:40] + data[place + 40 :]
        case "many bytes":
            data = data[:middle] + noise + data[middle + 2000 :]
        case "no moov":
            data = data[:middle]
        case "text":
            data = b"not a video at all\n" * 50
        case "empty":
            data = b""
    with pytest.raises(ValueError, match=r"a7 is broken"):
        probe(data, name="a7")
    with pytest.raises(ValueError, match=r"a7 is broken"):
        decode_clip(data, start=0, clip=ClipShape(60, 48, 64), name="a7")


def test_audio_only_is_broken(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        probe(tmp_path / "sound.mp4")


def test_too_few_frames_are_named(gops: Path) -> None:
    with pytest.raises(ValueError, match=r"gops has no frame 60: frames 58 to 62"):
        decode_clip(gops.read_bytes(), start=58, clip=ClipShape(5, 48, 64), name="gops")


def test_decoding_needs_no_torch() -> None:
    code = "import sys, framework.data.decode; assert not {'torch', 'streaming'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
