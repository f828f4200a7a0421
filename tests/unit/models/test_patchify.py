"""Patches against torch's conv3d and against indices written out."""

import pytest
import torch
import torch.nn.functional as F

from framework.models.layers import PatchEmbedding
from framework.models.patchify import (
    frame_index,
    patchify_input,
    patchify_output,
    token_positions,
    unpatchify_output,
)
from framework.shapes import LatentShape

PATCH = (2, 1, 3)
LATENT = LatentShape(4, 5, 6)


def test_the_patch_embedding_is_a_conv3d() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=generator)
    embedding = PatchEmbedding(3, 7, PATCH).double()
    with torch.no_grad():
        for value in embedding.parameters():
            value.normal_(generator=generator)
    conv = F.conv3d(latents, embedding.weight, embedding.bias, stride=PATCH)
    tokens = embedding(patchify_input(latents, PATCH))
    torch.testing.assert_close(tokens, conv.flatten(2).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_output_order_is_frame_row_column_channel_and_comes_back() -> None:
    latents = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6)
    patches = patchify_output(latents, PATCH)
    assert patches.shape == (2, 2 * 5 * 2, 2 * 1 * 3 * 3)
    # token (1, 4, 1) of sample 1 covers frames 2-3, row 4, columns 3-5
    expected = [latents[1, c, 2 + f, 4, 3 + w].item() for f in range(2) for w in range(3) for c in range(3)]
    assert patches[1, (1 * 5 + 4) * 2 + 1].tolist() == expected
    assert torch.equal(unpatchify_output(patches, LATENT, PATCH), latents)


def test_positions_count_patches() -> None:
    positions = token_positions(2, LATENT, PATCH, torch.device("cpu"))
    expected = [[t, h, w] for t in range(2) for h in range(5) for w in range(2)]
    assert positions.dtype == torch.int64 and positions.tolist() == [expected, expected]
    assert frame_index(positions).tolist() == [[t for t, _, _ in expected]] * 2


def test_a_patch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="frames 5"):
        token_positions(1, LatentShape(5, 5, 6), PATCH, torch.device("cpu"))
