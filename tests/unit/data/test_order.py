"""The order: a bijection that mixes, epochs without loss or repetition, and a mixture that keeps its shares."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from framework.data.order import ROUNDS, Mixture, Order, View, permute
from framework.keys import key

# One test in a million would fail for a perfect permutation; the keys are fixed, so none does so today only.
CHANCE = 1e-6
MASK64 = (1 << 64) - 1


def one_by_one(index: int, size: int, key_: int) -> int:
    """The module's equations for one index, in Python's integers, which don't wrap by themselves."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(ROUNDS):
            mixed = (right + key_ + round_ * 0x9E3779B97F4A7C15) & MASK64
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK64
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        index = left << half | right
        if index < size:
            return index


@pytest.mark.parametrize("key_", [0, 1, key(7, "shards"), 2**64 - 1])
def test_permute_is_a_bijection(key_: int) -> None:
    for size in range(1, 71):
        assert sorted(permute(np.arange(size), size, key_).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [5, 12, 16, 17])
def test_permute_sends_every_pair_everywhere(size: int) -> None:
    """Over many keys, where 0 and 1 go together is uniform over the ordered pairs: chi-square."""
    num_keys = 40 * size * (size - 1)
    pairs = Counter(tuple(permute(np.arange(2), size, k).tolist()) for k in (key(i, "pair") for i in range(num_keys)))
    expected = num_keys / (size * (size - 1))
    statistic = sum((pairs[a, b] - expected) ** 2 / expected for a in range(size) for b in range(size) if a != b)
    assert statistic < stats.chi2.ppf(1 - CHANCE, df=size * (size - 1) - 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_it_is_the_network_in_plain_integers(size: int) -> None:
    for key_ in (0, key(7, "shards"), 2**64 - 1):
        assert permute(np.arange(size), size, key_).tolist() == [one_by_one(i, size, key_) for i in range(size)]


def test_neighbours_are_torn_apart() -> None:
    """Consecutive indices of one large permutation: their images are as often near as by chance."""
    size = 4096
    images = permute(np.arange(size), size, key(3, "window"))
    near = int((np.abs(np.diff(images)) <= 40).sum())
    probability = (2 * 40 * size - 40 * 41) / (size * (size - 1))
    assert stats.binomtest(near, size - 1, probability).pvalue > CHANCE


def view(sizes: list[int], name: str = "0/5x16x16@None") -> View:
    """Shards of these sizes whose samples are numbered from 100."""
    return View(name, np.arange(100, 100 + sum(sizes)), np.cumsum([0, *sizes]))


SIZES = [[1], [3, 3, 2], [5, 0, 1, 7, 2, 0, 4], [10] * 9, [0, 6]]


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_epoch_visits_each_sample_once(sizes: list[int], window: int) -> None:
    total, order = sum(sizes), Order(view(sizes), 5, window)
    for epoch in range(3):
        drawn = [order.at(epoch * total + i) for i in range(total)]
        assert {e for e, _ in drawn} == {epoch}
        assert sorted(sample for _, sample in drawn) == list(range(100, 100 + total))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_draws_stay_within_a_window_of_shards(window: int) -> None:
    """Any run of one window's samples comes from `window` shards; only the last window may have fewer."""
    sizes = [10] * 9
    order = Order(view(sizes), 5, window)
    shards = [(order.at(i)[1] - 100) // 10 for i in range(90)]
    parts = [set(shards[i : i + 10 * window]) for i in range(0, 90, 10 * window)]
    assert [len(part) for part in parts[:-1]] == [window] * (len(parts) - 1)
    assert sorted(shard for part in parts for shard in part) == list(range(9))
    if window > 1:
        runs = sum(a != b for a, b in itertools.pairwise(shards))
        assert runs > 30, "samples of a window's shards are mixed, not one shard after the other"


def test_the_order_depends_on_seed_epoch_and_name_alone() -> None:
    draws = range(40)
    reference = [Order(view([10] * 4), 5, 2).at(i)[1] for i in draws]
    assert [Order(view([10] * 4), 5, 2).at(i)[1] for i in reversed(draws)][::-1] == reference, "random access"
    assert [Order(view([10] * 4), 6, 2).at(i)[1] for i in draws] != reference
    assert [Order(view([10] * 4, "1/5x16x16@None"), 5, 2).at(i)[1] for i in draws] != reference
    assert [Order(view([10] * 4), 5, 2).at(40 + i)[1] for i in draws] != reference


WEIGHTS = [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [5.0, 1.0, 3.0, 0.05], [1e-3, 1.0]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_ten_thousand_slots_hold_the_shares(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    for seed in range(5):
        mixture = Mixture(weights, key(seed, "buckets"))
        for start in (0, 1, 12_345, 65_530, 10**9, 2**40):
            counts = np.bincount(mixture.components(start, start + 10_000), minlength=len(weights))
            assert np.abs(counts / 10_000 - shares).max() < 0.005


@pytest.mark.parametrize("weights", WEIGHTS)
def test_before_is_a_running_count(weights: list[float]) -> None:
    """Also across the blocks of 65,536 that are counted ahead, asked in any order."""
    mixture = Mixture(weights, key(1, "streams"))
    components = [int(c) for c in mixture.components(0, 200_000)]
    for slot in (0, 1, 140_000, 65_535, 65_536, 65_537, 199_999, 131_072, 7):
        naive = Counter(components[:slot])
        assert mixture.before(slot) == [naive[c] for c in range(len(weights))]


def test_components_are_random_access() -> None:
    mixture = Mixture([0.7, 0.2, 0.1], key(1, "streams"))
    whole = mixture.components(0, 3000)
    assert [int(mixture.components(i, i + 1)[0]) for i in range(0, 3000, 37)] == whole[::37].tolist()


def test_two_mixtures_of_other_keys_differ() -> None:
    one, other = (Mixture([1.0, 1.0], key(seed, "buckets")).components(0, 200).tolist() for seed in (0, 1))
    assert one != other


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_tiny_weight_takes_nothing() -> None:
    assert Mixture([1.0, 1e-17], 5).before(1000) == [1000, 0]


def test_a_far_slot_is_counted_at_once() -> None:
    """10^12 slots on, by the closed form; between two far slots the naive count is what lies between."""
    mixture, far = Mixture([0.5, 0.3, 0.2], key(1, "buckets")), 10**12
    between = np.bincount(mixture.components(far, far + 5000), minlength=3)
    assert [b - a for a, b in zip(mixture.before(far), mixture.before(far + 5000), strict=True)] == between.tolist()
    assert sum(mixture.before(far)) == far
