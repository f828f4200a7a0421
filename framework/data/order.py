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


def permute(indices: np.ndarray, size: int, key_: int) -> np.ndarray:
    """Where each index goes under the key's permutation of range(size), int64: 0.08 s for a million on one core."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    images = indices.astype(np.uint64)
    outside = np.arange(len(indices))
    while len(outside):
        left, right = images[outside] >> shift, images[outside] & mask
        for round_ in range(ROUNDS):
            mixed = right + np.uint64(key_ + round_ * 0x9E3779B97F4A7C15 & MASK64)
            for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> np.uint64(by))) * np.uint64(factor)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        images[outside] = left << shift | right
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


@dataclass(frozen=True)
class View:
    """The samples of one stream that a bucket uses. name: keys the order. indices: of the samples, in the order of the
    shards; None where it uses all. edges: shard i holds the places edges[i] to edges[i + 1] of them.
    """

    name: str
    indices: np.ndarray | None
    edges: np.ndarray

    @property
    def num_samples(self) -> int:
        return int(self.edges[-1])

    @property
    def num_shards(self) -> int:
        """Shards of which it uses a sample."""
        return int(np.count_nonzero(np.diff(self.edges)))

    def samples(self, places: np.ndarray) -> np.ndarray:
        """The samples at places."""
        return places if self.indices is None else self.indices[places]


@dataclass(frozen=True)
class Epoch:
    """One epoch's order of shards. starts: the first position of each of them, and their end."""

    number: int
    shards: np.ndarray
    starts: np.ndarray


class Order:
    """draw number -> (epoch, sample index), for a view. window: shards whose samples are shuffled together."""

    def __init__(self, view: View, seed: int, window: int) -> None:
        self._view, self._seed, self._window = view, seed, window
        self._sizes = np.diff(view.edges)
        self._shards = np.flatnonzero(self._sizes)
        self._epoch: Epoch | None = None

    def at(self, draw: int) -> tuple[int, int]:
        """Epoch and global sample index of the draw."""
        epochs, samples = self.run(draw, 1)
        return int(epochs[0]), int(samples[0])

    def run(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and global sample indices of the draws from `first`, `count` each."""
        epochs, samples = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            number, position = divmod(first + done, self._view.num_samples)
            found = self._rest_of_window(self._lay_out(number), position, count - done)
            epochs[done : done + len(found)], samples[done : done + len(found)] = number, found
            done += len(found)
        return epochs, samples

    def _rest_of_window(self, epoch: Epoch, position: int, count: int) -> np.ndarray:
        """The samples from a position of an epoch on, at most `count`, up to the end of its window."""
        window = (int(np.searchsorted(epoch.starts, position, side="right")) - 1) // self._window
        first, last = window * self._window, min((window + 1) * self._window, len(epoch.shards))
        begin, end = int(epoch.starts[first]), int(epoch.starts[last])
        key_ = key(self._seed, "window", uid=f"{self._view.name}/{window}", step=epoch.number)
        places = np.arange(position - begin, min(position - begin + count, end - begin))
        inside = begin + permute(places, end - begin, key_)
        shards = np.searchsorted(epoch.starts[first : last + 1], inside, side="right") - 1 + first
        return self._view.samples(self._view.edges[epoch.shards[shards]] + inside - epoch.starts[shards])

    def _lay_out(self, number: int) -> Epoch:
        """The epoch, kept until another one is asked for. Set whole: the loader's thread asks too."""
        epoch = self._epoch
        if epoch is None or epoch.number != number:
            key_ = key(self._seed, "shards", uid=self._view.name, step=number)
            shards = self._shards[permute(np.arange(len(self._shards)), len(self._shards), key_)]
            starts = np.concatenate([[0], np.cumsum(self._sizes[shards])])
            self._epoch = epoch = Epoch(number, shards, starts)
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
