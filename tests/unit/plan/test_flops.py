"""FLOPs by hand, and against what torch counts while a model runs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from framework.kernels.reference import ReferenceAttention
from framework.models.config import ModelConfig
from framework.models.dit import DiT
from framework.plan.flops import Flops, block_flops, forward_flops, step_flops

TINY = ModelConfig(
    num_attention_heads=2,
    attention_head_dim=6,
    in_channels=3,
    out_channels=5,
    text_dim=7,
    freq_dim=8,
    ffn_dim=20,
    num_layers=3,
)


def test_a_block_by_hand() -> None:
    """Width 12, feed-forward 20, 10 tokens, 4 of text: each linear written out."""
    square, wide = 2 * 10 * 12 * 12, 2 * 10 * 12 * 20
    text = 2 * 4 * 12 * 12
    assert block_flops(TINY, tokens=10, text=4) == Flops(
        linears=4 * square + 2 * square + 2 * wide + 2 * text,
        attention=(2 * 10 * 10 * 12) * 2 + (2 * 10 * 4 * 12) * 2,
    )


def test_the_model_by_hand() -> None:
    """Patches of 1 x 2 x 2: 12 numbers in, 20 out."""
    block = block_flops(TINY, tokens=10, text=4)
    around = 2 * 10 * 12 * (12 + 20) + 2 * 4 * 12 * (7 + 12) + 2 * 1 * 12 * (8 + 12 + 72)
    assert forward_flops(TINY, tokens=10, text=4) == Flops(3 * block.linears + around, 3 * block.attention)
    assert step_flops(TINY, tokens=10, text=4).total == 3 * forward_flops(TINY, tokens=10, text=4).total


def test_pairs_take_the_place_of_the_square() -> None:
    """3 layers of width 12, a multiply-add for q k^T and one for p v."""
    full, some = (step_flops(TINY, tokens=10, text=4, pairs=pairs) for pairs in (100, 37))
    assert full == step_flops(TINY, tokens=10, text=4) and some.linears == full.linears
    assert full.attention - some.attention == 3 * 3 * 2 * 2 * (100 - 37) * 12


def test_wan_14b() -> None:
    """81 frames of 720p are 75,600 tokens, and 19.6 PFLOP."""
    flops = step_flops(ModelConfig(), tokens=75_600, text=512)
    assert 19.5e15 < flops.total < 19.7e15
    assert 0.71 < flops.attention / flops.total < 0.73


def count(config: ModelConfig, *, tokens: int, text: int, image: int, timesteps: int) -> int:
    """What torch counts of a forward."""
    model = DiT(config, ReferenceAttention())
    positions = torch.zeros(1, tokens, 3, dtype=torch.int64)
    inputs = (torch.randn(1, tokens, config.in_patch_dim), positions, positions[..., 0], torch.zeros(1, timesteps))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            *inputs,
            torch.randn(1, text, config.text_dim),
            image_bnd=torch.randn(1, image, config.image_dim) if config.image_dim else None,
        )
    return counter.get_total_flops()


def test_torch_counts_the_same() -> None:
    assert forward_flops(TINY, tokens=10, text=4, timesteps=2).total == count(
        TINY, tokens=10, text=4, image=0, timesteps=2
    )
    with_image = ModelConfig(
        num_attention_heads=2,
        attention_head_dim=6,
        text_dim=7,
        freq_dim=8,
        ffn_dim=20,
        num_layers=2,
        image_dim=9,
        added_kv_proj_dim=12,
    )
    expected = forward_flops(with_image, tokens=11, text=4, image=5).total
    assert expected == count(with_image, tokens=11, text=4, image=5, timesteps=1)
