"""The video tokenizer without weights: a colour rotation times a spacetime DCT, cut to its first N coefficients.

A block of 4 frames x 8 x 8 pixels x 3 colours is a vector of 768 numbers. Its coefficients are

    raw = M x,   M = rows of  C (x) D4 (x) D8 (x) D8                     M is N x 768 with orthonormal rows

where D_n is the orthonormal DCT-II, D[k, i] = sqrt(2 / n) cos(pi (2 i + 1) k / (2 n)), row 0 divided by sqrt(2)
(Ahmed, Natarajan and Rao, 1974), and C rotates red, green, blue into luma (1, 1, 1), red-blue (1, 0, -1) and
green-magenta (1, -2, 1), each of length 1. Decoding is M^T: the orthogonal projection on the coefficients that are
kept.

**Order.** Coefficients are sorted by a separable prior of their size: amplitudes of natural images fall as 1 /
frequency (Field, 1987), here along each axis,

    cost(c, kt, kh, kw) = (1, 4, 5)[c] * (2 + 5 kt) * (1 + kh) * (1 + kw)           ascending; ties by (c, kt, kh, kw)

in integers, so that the order is the same on every machine; the first N are kept. It starts with luma: DC, kw = 1,
kh = 1, kw = 2, kh = 2, kt = 1. Measured over three clips, 64x96 to 256x448 and N = 32, 48, 96: 32.4 dB in the mean,
where the order of those clips' own variances gives 32.9, the isotropic 1 / (1 + kt^2 + kh^2 + kw^2) 31.3 and AR(1)
32.2.

**Scale.** The prior standard deviation is prior_std = a * cost^(-5/4) (least squares on the first 96 gives 1.29),
with `a` such that the mean square over all 768 is 1. M is orthonormal, so pixels whose rms is r have coefficients of
about r * prior_std, and

    latent_scale = scale * prior_std^decay,  latent_mean = 0

gives latents of about unit size for scale = r and decay = 1 (whitened by the prior; 0.9 to 1.0 measured on the asset
with scale 0.5 and N = 32 to 48), and one uniform scale for decay = 0.

**Time.** 1 + 4k frames give 1 + k latent frames. The first frame is coded as four equal ones, and decoded as the mean
of the four: the kt > 0 coefficients of the first latent frame are zero (up to rounding) and can't change what is
decoded. No block sees another, so a clip can be coded piece by piece. Each latent frame of each clip is its own
product of one fixed size, since a matrix product of another size rounds differently: piece by piece is then bitwise
the whole.

Shapes: b clips, c coefficients (N), t h w latent frames, rows, columns; a block is (colour, 4, 8, 8), 768 numbers.
"""

import math
from dataclasses import replace
from itertools import product

import torch
from einops import rearrange, repeat
from torch import Tensor

from framework.shapes import ClipShape, latent_shape
from framework.tokenizer.config import DctConfig, TokenizerConfig, tokenizer_strides, tokenizer_version

BLOCK = (3, 4, 8, 8)
BLOCK_SIZE = math.prod(BLOCK)
COLOUR_COST = (1, 4, 5)
TIME_COST = (2, 5)
COST_EXPONENT = -1.25
Coefficient = tuple[int, int, int, int]


def cost(coefficient: Coefficient) -> int:
    """The prior cost of the coefficient (colour, kt, kh, kw): what it is sorted by, and a falling power of its size."""
    colour, kt, kh, kw = coefficient
    return COLOUR_COST[colour] * (TIME_COST[0] + TIME_COST[1] * kt) * (1 + kh) * (1 + kw)


def coefficient_order() -> tuple[Coefficient, ...]:
    """All 768 coefficients (colour, kt, kh, kw) in the order in which they are kept."""
    colours, times, rows, columns = map(range, BLOCK)
    return tuple(
        sorted(product(colours, times, rows, columns), key=lambda coefficient: (cost(coefficient), coefficient))
    )


def prior_std() -> Tensor:
    """Prior standard deviation of all 768 coefficients in their order, `768` float64, mean square 1."""
    amplitude = torch.tensor([cost(k) for k in coefficient_order()], dtype=torch.float64) ** COST_EXPONENT
    return amplitude / amplitude.square().mean().sqrt()


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, `size size` float64: rows are frequencies."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * size) * torch.outer(k, 2 * k + 1)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def analysis_matrix(coefficients: int) -> Tensor:
    """M: the first `coefficients` rows of the block transform, `N 768` float64; columns are (colour, t, h, w)."""
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colour = colour / colour.norm(dim=1, keepdim=True)
    time, space = dct_matrix(BLOCK[1]), dct_matrix(BLOCK[2])
    rows = [
        torch.einsum("c,t,h,w->cthw", colour[c], time[kt], space[kh], space[kw]).flatten()
        for c, kt, kh, kw in coefficient_order()[:coefficients]
    ]
    return torch.stack(rows)


class DctTokenizer:
    """The Tokenizer of this file (see the module's docstring). Runs in float32, or in float64 for float64 input."""

    def __init__(self, config: DctConfig) -> None:
        tokenizer = TokenizerConfig(name="dct", dct=config)
        self.strides = tokenizer_strides(tokenizer)
        self.channels = config.coefficients
        self.version = tokenizer_version(tokenizer)
        self.latent_mean = torch.zeros(config.coefficients)
        scale = config.scale * prior_std()[: config.coefficients] ** config.decay
        # Rounded once: float64 runs divide by the same numbers that a float32 run divides by and that shards record.
        self.latent_scale = scale.to(torch.float32)
        self._matrix = analysis_matrix(config.coefficients)

    def encode(self, video_bcthw: Tensor, *, first: bool = True) -> Tensor:
        """Pixels `b 3 T H W` in [-1, 1] to latents `b c t h w`; T = 1 + 4k, or 4k with first=False."""
        batch, colours, frames, height, width = video_bcthw.shape
        if colours != BLOCK[0]:
            raise ValueError(f"the video has {colours} channels; the dct tokenizer takes {BLOCK[0]} (red, green, blue)")
        latent = latent_shape(ClipShape(frames, height, width), replace(self.strides, causal=first))
        matrix, mean, scale = self._constants(video_bcthw)
        video = video_bcthw.to(matrix.dtype)
        if first:
            four = repeat(video[:, :, :1], "b c 1 h w -> b c four h w", four=BLOCK[1])
            video = torch.cat([four, video[:, :, 1:]], dim=2)
        blocks = rearrange(
            video, "b c (t bt) (h bh) (w bw) -> (b t) (c bt bh bw) (h w)", bt=BLOCK[1], bh=BLOCK[2], bw=BLOCK[3]
        ).contiguous()
        raw = torch.stack([(matrix @ block - mean) / scale for block in blocks])
        return rearrange(raw, "(b t) c (h w) -> b c t h w", b=batch, t=latent.frames, h=latent.height, w=latent.width)

    def decode(self, latents_bcthw: Tensor, *, first: bool = True) -> Tensor:
        """Latents `b c t h w` to pixels `b 3 T H W`, not clamped; T = 1 + 4(t - 1), or 4t with first=False."""
        batch, channels, _, height, _ = latents_bcthw.shape
        if channels != self.channels:
            raise ValueError(f"the latents have {channels} channels; this tokenizer keeps coefficients={self.channels}")
        matrix, mean, scale = self._constants(latents_bcthw)
        latents = rearrange(latents_bcthw.to(matrix.dtype), "b c t h w -> (b t) c (h w)").contiguous()
        blocks = torch.stack([matrix.T @ (latent * scale + mean) for latent in latents])
        video = rearrange(
            blocks,
            "(b t) (c bt bh bw) (h w) -> b c (t bt) (h bh) (w bw)",
            b=batch,
            h=height,
            c=BLOCK[0],
            bt=BLOCK[1],
            bh=BLOCK[2],
        )
        if first:
            video = torch.cat([video[:, :, : BLOCK[1]].mean(dim=2, keepdim=True), video[:, :, BLOCK[1] :]], dim=2)
        return video

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M `N 768`, mean and scale `N 1` on the device of `like`, in its dtype or float32, whichever is wider."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        mean, scale = (rearrange(v.to(like.device, dtype), "c -> c 1") for v in (self.latent_mean, self.latent_scale))
        return self._matrix.to(like.device, dtype), mean, scale
