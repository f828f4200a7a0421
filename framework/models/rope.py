"""Rotary positions in three axes, computed from integer positions.

Neighbouring channels are pairs, and pair j of an axis with n channels turns by the angle (RoFormer, arXiv 2104.09864,
equation 15; the split of the axes is Wan's)

    position * 10000^(-2j/n),      n = 2*(d//6) for rows and for columns, the rest of d for frames

so that q . k depends on the difference of two positions only. For clips longer than the weights were trained on the
frequencies of frames can be scaled (`RopeConfig`): by s = `factor`, with L trained frames,

    interpolation    all of them / s  (arXiv 2306.15595)
    ntk              the base 10000 becomes 10000 s^(n/(n-2)): the highest stays, the lowest is divided by s
    riflex           the pair k whose period 2 pi / frequency is the first to cover L gets the period L s, so that no
                     frame comes twice in it; the others stay (arXiv 2502.15894, equation 8)

Rows and columns are never scaled.

A pair is a complex number and the rotation one complex
product, which saves nothing of x for the backward (measured on 1500 tokens x 8 heads x 32, one CPU core: 0.47 ms
forward and backward, against 3.1 ms for the same in real arithmetic).

Angles are float64 and rounded once, as in diffusers: at position 1000 a float32 angle is wrong by 6e-5.
Positions are an input, so that tokens can be split among ranks in any way.

Shapes: `B` samples, `S` tokens, `H` heads, `d` channels of a head, `k = d/2` pairs.
"""

import math

import torch
from torch import Tensor

from framework.models.config import NO_SCALING, THETA, RopeConfig, axis_channels, covering_pair


def build_rotation(
    positions_bs3: Tensor, head_dim: int, dtype: torch.dtype, rope: RopeConfig = NO_SCALING, *, patch_frames: int = 1
) -> Tensor:
    """exp(i angle) of every token and pair: complex `B S 1 k`, of the precision of `dtype` (float32 or float64).

    patch_frames: latent frames of a token.
    """
    time, space, _ = axis_channels(head_dim)
    device = positions_bs3.device
    rows = columns = frequencies_of(space, THETA, device)
    per_axis = (time_frequencies(time, rope, patch_frames, device), rows, columns)
    angles_bsk = torch.cat([positions_bs3[..., axis, None] * each for axis, each in enumerate(per_axis)], dim=-1)
    return torch.complex(angles_bsk.cos().to(dtype), angles_bsk.sin().to(dtype)).unsqueeze(2)


def frequencies_of(channels: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    """base^(-2j/n) of an axis with n channels: `n/2` float64."""
    return 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)


def time_frequencies(
    channels: int, rope: RopeConfig, patch_frames: int = 1, device: torch.device | str = "cpu"
) -> Tensor:
    """Of the axis of frames, scaled: `n/2` float64, in radians a token."""
    plain = frequencies_of(channels, THETA, device)
    match rope.time:
        case "none":
            return plain
        case "interpolation":
            return plain / rope.factor
        case "ntk":
            return frequencies_of(channels, THETA * rope.factor ** (channels / (channels - 2)), device)
        case "riflex":
            trained = rope.trained_frames / patch_frames
            pair = covering_pair(channels, trained)
            assert pair is not None, "check_rope"
            slowed = torch.arange(channels // 2, device=device) == pair
            # A factor so small that the period is long enough already leaves it: it is never shortened.
            return torch.where(slowed, plain.clamp(max=2 * math.pi / (trained * rope.factor)), plain)


def rotate(x_bshd: Tensor, rotation_bs1k: Tensor) -> Tensor:
    """x with each pair of channels turned; computed in the rotation's precision, returned in x's dtype."""
    pairs_bshk2 = x_bshd.to(rotation_bs1k.real.dtype).unflatten(-1, (-1, 2))
    turned_bshk = torch.view_as_complex(pairs_bshk2) * rotation_bs1k
    return torch.view_as_real(turned_bshk).flatten(-2).to(x_bshd.dtype)
