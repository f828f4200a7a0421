"""The dct tokenizer against scipy's DCT, an order worked out by hand, and a real clip."""

import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from scipy.fft import dctn

from framework.shapes import Strides
from framework.tokenizer.config import DctConfig, TokenizerConfig
from framework.tokenizer.dct import analysis_matrix, coefficient_order, prior_std
from framework.tokenizer.tokenizer import Tokenizer, build_tokenizer

ASSET = Path(__file__).parents[2] / "assets" / "bigbuckbunny.mp4"


def build(coefficients: int, scale: float = 1.0, decay: float = 0.0) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(dct=DctConfig(coefficients, scale, decay)))


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_coefficients_are_those_of_scipy() -> None:
    video = noise(1, 3, 9, 16, 24, dtype=torch.float64)
    latents = build(768).encode(video)
    assert latents.shape == (1, 768, 3, 2, 3) and latents.dtype == torch.float64
    # The block of frames 5..8, rows 8..15, columns 16..23; and the first latent frame: frame 0 four times.
    later = video[0, :, 5:9, 8:16, 16:24].numpy()
    start = np.repeat(video[0, :, :1, :8, :8].numpy(), 4, axis=1)
    for block, latent in ((later, latents[0, :, 2, 1, 2]), (start, latents[0, :, 0, 0, 0])):
        red, green, blue = block
        rotated = ((red + green + blue) / 3**0.5, (red - blue) / 2**0.5, (red - 2 * green + blue) / 6**0.5)
        expected = np.stack([dctn(plane, type=2, norm="ortho") for plane in rotated])
        np.testing.assert_allclose(latent.numpy(), [expected[k] for k in coefficient_order()], atol=1e-12)


def test_order_by_hand() -> None:
    order = coefficient_order()
    # Costs 2, 4, 4, 6, 6, 7, 8, 8, 8, 8, 10, 10, 10: (1, 4, 5)[c] (2 + 5 kt) (1 + kh) (1 + kw).
    assert order[:13] == (
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 1, 0),
        (0, 0, 0, 2),
        (0, 0, 2, 0),
        (0, 1, 0, 0),
        (0, 0, 0, 3),
        (0, 0, 1, 1),
        (0, 0, 3, 0),
        (1, 0, 0, 0),
        (0, 0, 0, 4),
        (0, 0, 4, 0),
        (2, 0, 0, 0),
    )
    assert len(set(order)) == 768 and order[-1] == (2, 3, 7, 7)


def test_rows_are_orthonormal() -> None:
    matrix = analysis_matrix(768)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(768, dtype=torch.float64), atol=1e-13, rtol=0)
    assert torch.equal(analysis_matrix(48), matrix[:48])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_all_coefficients_give_the_video_back(dtype: torch.dtype, tolerance: float) -> None:
    video = noise(2, 3, 9, 16, 24, dtype=dtype)
    for decay in (0.0, 1.0):
        tokenizer = build(768, scale=0.7, decay=decay)
        decoded = tokenizer.decode(tokenizer.encode(video))
        torch.testing.assert_close(decoded, video, atol=tolerance * (1 + 9 * decay), rtol=0)


def test_scale_law() -> None:
    std = prior_std()
    # Cost 2 against cost 4 (the first horizontal frequency): 2^(5/4); the mean square of all is 1.
    assert (std[0] / std[1]).item() == pytest.approx(2**1.25)
    assert std.square().mean().item() == pytest.approx(1)
    video = noise(1, 3, 5, 16, 16)
    raw = build(48).encode(video)
    for scale, decay in ((0.5, 0.0), (0.5, 1.0), (2.0, 0.5)):
        tokenizer = build(48, scale, decay)
        torch.testing.assert_close(tokenizer.latent_scale, (scale * std[:48] ** decay).float())
        expected = raw / tokenizer.latent_scale[:, None, None, None]
        torch.testing.assert_close(tokenizer.encode(video), expected, atol=1e-6, rtol=1e-6)
        assert not tokenizer.latent_mean.any()


def test_bfloat16_pixels_give_float32_latents() -> None:
    video = noise(1, 3, 1, 8, 8).bfloat16()
    assert torch.equal(build(48).encode(video), build(48).encode(video.float()))


@pytest.mark.parametrize(("size", "frames", "batch"), [((64, 96), 17, 2), ((8, 8), 9, 1), ((40, 24), 13, 3)])
@pytest.mark.parametrize("coefficients", [1, 48, 96])
def test_piece_by_piece_is_bitwise_the_whole(size: tuple[int, int], frames: int, batch: int, coefficients: int) -> None:
    tokenizer = build(coefficients, 0.5, 1.0)
    video = noise(batch, 3, frames, *size)
    whole = tokenizer.encode(video)
    pieces = [tokenizer.encode(video[:, :, :1])]
    pieces += [tokenizer.encode(video[:, :, i : i + 4], first=False) for i in range(1, frames, 4)]
    assert torch.equal(torch.cat(pieces, dim=2), whole)
    alone = [tokenizer.encode(video[i : i + 1]) for i in range(batch)]
    assert torch.equal(torch.cat(alone), whole)
    decoded = tokenizer.decode(whole)
    assert decoded.shape == video.shape
    parts = [tokenizer.decode(whole[:, :, i : i + 1], first=i == 0) for i in range(whole.shape[2])]
    assert torch.equal(torch.cat(parts, dim=2), decoded)


def test_first_frame_ignores_temporal_coefficients() -> None:
    tokenizer = build(768)
    latents = tokenizer.encode(noise(1, 3, 5, 8, 8))
    temporal = torch.tensor([k[1] > 0 for k in coefficient_order()])
    assert latents[:, temporal, 0].abs().max() < 1e-5
    disturbed = latents.clone()
    disturbed[:, temporal, 0] += 1
    torch.testing.assert_close(tokenizer.decode(disturbed), tokenizer.decode(latents), atol=1e-5, rtol=0)


def test_shapes_and_strides() -> None:
    tokenizer = build(48)
    assert tokenizer.strides == Strides(4, 8, 8, causal=True) and tokenizer.channels == 48
    assert tokenizer.latent_mean.shape == tokenizer.latent_scale.shape == (48,)
    assert tokenizer.encode(noise(1, 3, 1, 8, 16)).shape == (1, 48, 1, 1, 2)
    with pytest.raises(ValueError, match="nearest are 5 and 9"):
        tokenizer.encode(noise(1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match="nearest are 4 and 8"):
        tokenizer.encode(noise(1, 3, 5, 8, 8), first=False)
    with pytest.raises(ValueError, match="nearest are 8 and 16"):
        tokenizer.encode(noise(1, 3, 5, 12, 8))
    with pytest.raises(ValueError, match="1 channels"):
        tokenizer.encode(noise(1, 1, 5, 8, 8))
    with pytest.raises(ValueError, match="coefficients=48"):
        tokenizer.decode(noise(1, 16, 2, 1, 1))


def test_version_changes_with_every_field() -> None:
    config = DctConfig(48, 0.5, 1.0)
    changed = [replace(config, coefficients=32), replace(config, scale=2.0), replace(config, decay=0.5)]
    versions = {build_tokenizer(TokenizerConfig(dct=c)).version for c in [config, *changed]}
    assert len(versions) == 4
    assert build_tokenizer(TokenizerConfig(dct=config)).version == build_tokenizer(TokenizerConfig()).version


def test_round_trip_of_the_real_clip() -> None:
    with av.open(str(ASSET)) as container:
        frames = [f.to_ndarray(format="rgb24") for f, _ in zip(container.decode(video=0), range(17), strict=False)]
    pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
    height, width = pixels.shape[-2:]
    crop = (width - height * 3 // 2) // 2
    pixels = pixels[..., crop : width - crop]
    video = torch.nn.functional.interpolate(pixels, size=(64, 96), mode="area")[None]
    tokenizer = build(48, 0.5, 1.0)
    error = tokenizer.decode(tokenizer.encode(video)).clamp(-1, 1) - video
    psnr = -10 * math.log10(error.square().mean().item() / 4)
    assert psnr >= 28, psnr
