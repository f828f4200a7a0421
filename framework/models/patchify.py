"""Latents to tokens and back: a pure rearrangement, and where each token comes from.

One token is a cuboid of `pt x ph x pw` latent pixels. Tokens run over frames, then rows, then columns. The model reads
a patch in the order of a conv3d weight, so that the patch embedding is a linear with that weight, and predicts it in
another order, Wan's unpatchify (Wan2.1 `wan/modules/model.py`):

    input order     (c pt ph pw)
    output order    (pt ph pw c)

Targets are compared on patches, in output order, and never put together again; only sampling does that.

Shapes: `B` samples, `c` channels, `t h w` latent frames, rows, columns, `S = t/pt * h/ph * w/pw` tokens,
`P = c pt ph pw`.
"""

import torch
from einops import rearrange
from torch import Tensor

from framework.batch import Noised, TokenLayout, Tokens
from framework.kernels.config import PatternConfig
from framework.kernels.pattern import TokenPattern
from framework.parallel.mesh import lone_mesh
from framework.shapes import LatentShape, token_shape


def patchify_input(latents_bcthw: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """`B c t h w` -> `B S P` in input order: what the model reads."""
    pt, ph, pw = patch_size
    return rearrange(latents_bcthw, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def patchify_output(latents_bcthw: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """`B c t h w` -> `B S P` in output order: what a prediction is compared with."""
    pt, ph, pw = patch_size
    return rearrange(latents_bcthw, "b c (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify_output(patches_bsp: Tensor, latent: LatentShape, patch_size: tuple[int, int, int]) -> Tensor:
    """`B S P` in output order -> `B c t h w`."""
    grid = token_shape(latent, patch_size)
    pt, ph, pw = patch_size
    return rearrange(
        patches_bsp,
        "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
        t=grid.frames,
        h=grid.height,
        w=grid.width,
        pt=pt,
        ph=ph,
        pw=pw,
    )


def token_positions(batch: int, latent: LatentShape, patch_size: tuple[int, int, int], device: torch.device) -> Tensor:
    """Each token's (frame, row, column), counted in patches: `B S 3`, int64, one grid seen B times without a copy."""
    grid = token_shape(latent, patch_size)
    axes = (torch.arange(length, device=device) for length in (grid.frames, grid.height, grid.width))
    grid_thw3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return rearrange(grid_thw3, "t h w three -> (t h w) three").expand(batch, -1, -1)


def frame_index(positions_bs3: Tensor) -> Tensor:
    """Each token's column in the timesteps `B t/pt`: `B S`, int64. One timestep belongs to one frame of patches."""
    return positions_bs3[..., 0]


def patchify(noised: Noised, patch_size: tuple[int, int, int]) -> Tokens:
    """A noised batch as the tokens of one device: all of them, none padded, all of which attend to each other.
    `split_tokens` deals them to ranks and says which do.
    """
    batch, _, frames, height, width = noised.latents.shape
    latent = LatentShape(frames, height, width)
    grid = token_shape(latent, patch_size)
    positions = token_positions(batch, latent, patch_size, noised.latents.device)
    return Tokens(
        patches=patchify_input(noised.latents, patch_size),
        target=patchify_output(noised.target, patch_size),
        positions=positions,
        frame_index=frame_index(positions),
        timesteps=noised.timesteps,
        weights=noised.weights,
        layout=TokenLayout(
            valid=(positions.shape[1],),
            index=0,
            mesh=lone_mesh(),
            pattern=TokenPattern(PatternConfig(), grid.height * grid.width),
        ),
    )
