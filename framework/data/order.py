"""The order of samples: a keyed permutation in two levels, computed by index.

Shards are permuted, then the samples of a window of consecutive permuted shards are permuted among themselves, so that
reading stays near a few shards while neighbours in the order come from many. Nothing is shuffled in memory: each level
is a bijection of integers that is evaluated at one index, so any position of any epoch is found at once and no state is
saved.

The bijection is an eight-round Feistel network over the next even power of two, walked along its cycle until it lands
inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). The round function is
SplitMix64's finaliser (Steele et al., OOPSLA 2014).
"""

import itertools
from dataclasses import dataclass

import numpy as np

from framework.keys import key

MASK64 = (1 << 64) - 1
# Four rounds are biased for a handful of shards: chi-square per degree of freedom 3.8 for 12 of them, 1.0 with eight.
ROUNDS = 8


def mix64(value: int) -> int:
    """SplitMix64's finaliser: 64 bits to 64 well-mixed bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)


def permute(index: int, size: int, key_: int) -> int:
    """Where `index` goes under the key's permutation of range(size)."""
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(ROUNDS):
            left, right = right, left ^ (mix64(right + key_ + round_ * 0x9E3779B97F4A7C15 & MASK64) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class View:
    """The samples of one stream that a bucket uses, by shard. name: keys the order. by_shard: global sample indices."""

    name: str
    by_shard: tuple[np.ndarray, ...]

    @property
    def num_samples(self) -> int:
        return sum(len(indices) for indices in self.by_shard)


@dataclass(frozen=True)
class Epoch:
    """One epoch's order of shards. starts: the first position of each window of them."""

    number: int
    shards: tuple[int, ...]
    starts: np.ndarray


class Order:
    """draw number -> (epoch, sample index), for a view. window: shards whose samples are shuffled together."""

    def __init__(self, view: View, seed: int, window: int) -> None:
        self._view, self._seed, self._window = view, seed, window
        self._shards = tuple(i for i, indices in enumerate(view.by_shard) if len(indices))
        self._num_samples = view.num_samples
        self._epoch: Epoch | None = None

    def at(self, draw: int) -> tuple[int, int]:
        """Epoch and global sample index of the draw."""
        number, position = divmod(draw, self._num_samples)
        epoch = self._lay_out(number)
        window = int(np.searchsorted(epoch.starts, position, side="right")) - 1
        members = epoch.shards[window * self._window : (window + 1) * self._window]
        size = sum(len(self._view.by_shard[shard]) for shard in members)
        key_ = key(self._seed, "window", uid=f"{self._view.name}/{window}", step=number)
        inside = permute(position - int(epoch.starts[window]), size, key_)
        for shard in members:
            indices = self._view.by_shard[shard]
            if inside < len(indices):
                return number, int(indices[inside])
            inside -= len(indices)
        raise AssertionError("a position lies in one of its window's shards")

    def _lay_out(self, number: int) -> Epoch:
        """The epoch, kept until another one is asked for. Set whole: the loader's thread asks too."""
        epoch = self._epoch
        if epoch is None or epoch.number != number:
            shards, key_ = self._shards, key(self._seed, "shards", uid=self._view.name, step=number)
            permuted = tuple(shards[permute(i, len(shards), key_)] for i in range(len(shards)))
            starts = np.cumsum([0, *(len(self._view.by_shard[shard]) for shard in permuted)])
            self._epoch = epoch = Epoch(number, permuted, starts[:-1][:: self._window])
        return epoch


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a i + b) / m) over i in range(n), in O(log m) steps: Euclid's algorithm on lattice points."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total


class Mixture:
    """Which component every slot of an infinite sequence belongs to, by a low-discrepancy sequence.

    Slot n lies at frac(offset + n * golden ratio) in 64-bit integers (Weyl's sequence): any run of n slots holds each
    component within O(log n) of its share. How many of a component lie before a slot has a closed form, so any position
    is found at once.
    """

    GOLDEN = 0x9E3779B97F4A7C15
    CIRCLE = 1 << 64

    def __init__(self, weights: list[float], key_: int) -> None:
        shares = np.cumsum(np.asarray(weights, dtype=np.float64) / sum(weights))
        bounds = np.minimum(shares[:-1] * 2.0**64, np.nextafter(2.0**64, 0))
        self._bounds = bounds.astype(np.uint64)
        self._offset = key_

    def components(self, start: int, stop: int) -> np.ndarray:
        """The components of the slots [start, stop)."""
        slots = np.arange(start, stop, dtype=np.uint64)
        places = slots * np.uint64(self.GOLDEN) + np.uint64(self._offset)
        return np.searchsorted(self._bounds, places, side="right")

    def before(self, slot: int) -> list[int]:
        """How many slots of each component lie before `slot`."""
        below = [self._below(slot, int(bound)) for bound in self._bounds]
        return [b - a for a, b in itertools.pairwise([0, *below, slot])]

    def _below(self, slot: int, bound: int) -> int:
        """How many slots before `slot` lie below the bound: for x = y mod M, [x < B] = floor(y/M) - floor((y-B)/M)."""
        circle, golden = self.CIRCLE, self.GOLDEN
        whole = floor_sum(slot, circle, golden, self._offset)
        return whole - floor_sum(slot, circle, golden, self._offset + circle - bound) + slot
