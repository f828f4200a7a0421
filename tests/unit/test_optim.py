"""The learning-rate curve by numbers worked out by hand, and AdamW by its equations."""

import math

import pytest
import torch
from torch import nn

from framework.config import OptimizerConfig, decays
from framework.optim import adamw, learning_rate

CURVE = {"lr": 8.0, "warmup": 4, "decay_steps": 12, "final": 0.25}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # step    0    1    2    3    4    6                  8    10                 12   13   1000
        ("constant", [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]),
        ("linear", [2.0, 4.0, 6.0, 8.0, 8.0, 6.5, 5.0, 3.5, 2.0, 2.0, 2.0]),
        ("cosine", [2.0, 4.0, 6.0, 8.0, 8.0, 5 + 3 / math.sqrt(2), 5.0, 5 - 3 / math.sqrt(2), 2.0, 2.0, 2.0]),
    ],
)
def test_the_curve_by_hand(schedule: str, rates: list[float]) -> None:
    """Down from 8 to 8 * 0.25 = 2 over the 8 steps after the warm-up; half way at 5, a quarter at 5 + 3 cos(45 deg)."""
    config = OptimizerConfig(schedule=schedule, **CURVE)  # type: ignore[arg-type]
    found = [learning_rate(config, step=step) for step in (0, 1, 2, 3, 4, 6, 8, 10, 12, 13, 1000)]
    assert found == pytest.approx(rates, rel=1e-12)


def test_no_warmup_starts_at_the_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=3.0), step=0) == 3.0
    config = OptimizerConfig(lr=3.0, schedule="linear", decay_steps=3)
    assert [learning_rate(config, step=step) for step in range(4)] == pytest.approx([3.0, 2.0, 1.0, 0.0])


def test_a_warmup_longer_than_the_decay_ends_at_the_final_rate() -> None:
    config = OptimizerConfig(lr=3.0, warmup=5, schedule="cosine", decay_steps=3, final=0.5)
    assert learning_rate(config, step=4) == 3.0
    assert learning_rate(config, step=8) == 1.5


@pytest.mark.parametrize(
    ("name", "num_dims", "decayed"),
    [
        ("blocks.0.attn1.to_q.weight", 2, True),
        ("patch_embedding.weight", 5, True),
        ("blocks.0.attn1.to_q.bias", 1, False),
        ("blocks.0.norm2.weight", 1, False),
        ("blocks.0.scale_shift_table", 3, False),
        ("scale_shift_table", 3, False),
    ],
)
def test_what_decays(name: str, num_dims: int, decayed: bool) -> None:
    assert decays(name, num_dims) is decayed


def test_groups_go_by_the_shape_before_partitioning() -> None:
    """ZeRO stage 3 leaves an empty 1-D tensor with the true shape in `ds_shape`."""
    partitioned = nn.Parameter(torch.zeros(0))
    partitioned.ds_shape = torch.Size((3, 4))  # type: ignore[attr-defined]
    whole, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    optimizer = adamw([("a.weight", partitioned), ("a.bias", bias), ("b.weight", whole)], OptimizerConfig())
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(partitioned), id(whole)],
        [id(bias)],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_three_steps_are_adamws_equations() -> None:
    """w <- w - lr (wd w + m^ / (sqrt(v^) + eps)) in Python floats; torch's fused kernel keeps 10 of their digits."""
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.6), eps=1e-3, weight_decay=0.5)
    weight, bias = nn.Parameter(torch.tensor([[2.0]]).double()), nn.Parameter(torch.tensor([2.0]).double())
    optimizer = adamw([("weight", weight), ("bias", bias)], config)
    state = {0.5: [2.0, 0.0, 0.0], 0.0: [2.0, 0.0, 0.0]}
    for step, gradient in enumerate((1.0, -3.0, 0.2), start=1):
        weight.grad, bias.grad = torch.tensor([[gradient]]).double(), torch.tensor([gradient]).double()
        optimizer.step()
        for decay, (w, m, v) in state.items():
            m, v = 0.8 * m + 0.2 * gradient, 0.6 * v + 0.4 * gradient**2
            change = (m / (1 - 0.8**step)) / (math.sqrt(v / (1 - 0.6**step)) + 1e-3)
            state[decay] = [w - 0.1 * (decay * w + change), m, v]
    assert (weight.item(), bias.item()) == pytest.approx((state[0.5][0], state[0.0][0]), rel=1e-9)
