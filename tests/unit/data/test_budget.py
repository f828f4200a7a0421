"""How many samples a draw takes: by hand, and the properties that follow."""

import numpy as np
import pytest

from framework.data.budget import batch_sizes, micro_sizes
from framework.data.order import Mixture
from framework.data.splits import choose_split, useful_share
from framework.models.config import ModelConfig, training_cost
from framework.parallel.config import MeshShape
from framework.plan.flops import step_flops


def test_one_bucket_takes_the_global_batch() -> None:
    for reference in (1, 7, 48):
        batches = batch_sizes([3.5], [2.0], reference=reference, spread=8)
        assert (batches.sizes, batches.mean, batches.shares) == ((reference,), reference, (1.0,))


def test_two_buckets_by_hand() -> None:
    """Costs 1 and 4, half of the samples each, 16 on average: C = 16 * 2.5, so 40 and 10; nearest in the grid 32 and 8
    with a mean of 1 / (0.5/32 + 0.5/8) = 12.8, or, nudged, 64 and 16 (25.6) and 32 and 16 (21.3): 12.8 is nearer to 16.
    """
    batches = batch_sizes([1.0, 4.0], [1.0, 1.0], reference=16, spread=8)
    assert batches.sizes == (32, 8)
    assert batches.mean == pytest.approx(12.8)
    assert batches.shares == pytest.approx((0.2, 0.8))
    assert batches.expected(2) == pytest.approx((12.8, 12.8))


def test_sizes_are_bounded_and_deal_out_like_the_reference() -> None:
    costs = list(np.geomspace(1, 3000, 25))
    batches = batch_sizes(costs, [1.0] * 25, reference=64, spread=8)
    assert max(batches.sizes) <= 512 and min(batches.sizes) >= 1
    assert all(size % 64 == 0 or 64 % size == 0 for size in batches.sizes)
    assert list(batches.sizes) == sorted(batches.sizes, reverse=True), "cheaper samples are more"
    assert 64 / 1.42 < batches.mean < 64 * 1.42
    dearest = [cost * size for cost, size in zip(costs, batches.sizes, strict=True) if 1 < size < 512]
    assert max(dearest) / min(dearest) <= 2.01, "what isn't bounded costs the same within the rounding"


def test_samples_keep_the_mixture() -> None:
    """After 10,000 draws each bucket has its share of the samples within 0.5 percentage points."""
    weights = np.random.default_rng(0).uniform(0.5, 3, 25)
    costs = list(np.geomspace(1, 3000, 25))
    batches = batch_sizes(costs, list(weights), reference=64, spread=8)
    for key in (1, 2**63 + 5):
        counts = np.array(Mixture(list(batches.shares), key).before(10_000)) * batches.sizes
        assert np.abs(counts / counts.sum() - weights / weights.sum()).max() < 0.005


def test_micro_batches_hold_as_many_tokens() -> None:
    assert micro_sizes(2, [100, 1000, 333.3]) == (20, 2, 6)


def test_the_cost_is_that_of_the_flops() -> None:
    """a S^2 + b S is the FLOPs of a step, but for what doesn't grow with S."""
    model = ModelConfig(num_layers=3, num_attention_heads=4, attention_head_dim=8, ffn_dim=64, text_dim=32)
    a, b = training_cost(model, text=16)
    flops = [step_flops(model, tokens=s, text=16).total - a * s * s - b * s for s in (0, 100, 5000)]
    assert flops[0] == flops[1] == flops[2]


@pytest.mark.parametrize(
    ("ranks", "size", "tokens", "expected"),
    [
        (64, 64, 1000, (1, 1)),  # a sample a rank
        (64, 512, 1000, (1, 1)),  # eight rows
        (64, 16, 1000, (4, 1)),  # a quarter of the samples at once: four ranks each
        (64, 4, 1000, (16, 1)),
        (96, 32, 1000, (3, 1)),  # 96 = 3 x 32
        (64, 64, 8000, (8, 1)),  # no rank may have more than 1,000 tokens
        (3, 4, 999, (3, 1)),  # 4 on 3 ranks: one at a time by all three wastes nothing
    ],
)
def test_splits_by_hand(ranks: int, size: int, tokens: int, expected: tuple[int, int]) -> None:
    shape = MeshShape(dp=ranks, ring=1, ulysses=1, tp=1)
    assert choose_split(shape, size, tokens=tokens, most=1000) == expected


def test_ulysses_spans_what_the_mesh_gives_it() -> None:
    assert choose_split(MeshShape(dp=4, ring=2, ulysses=8, tp=1), 4, tokens=64000, most=4000) == (2, 8)
    assert choose_split(MeshShape(dp=8, ring=1, ulysses=8, tp=1), 16, tokens=4000, most=4000) == (1, 4)


def test_useful_share_by_hand() -> None:
    assert useful_share(4, 2, size=6, tokens=9) == pytest.approx(6 / 8 * 9 / 10)
