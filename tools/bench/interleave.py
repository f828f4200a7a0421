"""Compare the speed of several contestants on a machine that others use too.

One block = `num_steps` steps of one contestant. One repeat = a block of each, so that a slow minute slows all of them:
many short repeats are worth more than few long ones. The order within a repeat follows a Williams design (Williams
1949): over n repeats each contestant stands once at every place, and for even n once behind each other one, so that
what a contestant leaves in the caches troubles all alike.

Two clocks: wall time, and the CPU time of the process over all its threads, which leaves out most of what other
processes take, though neither their use of caches and memory nor the spinning of OpenMP's threads while they wait for
one that was taken off its core: on a busy machine, use one thread.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Clock = Literal["wall", "cpu"]
Timer = Callable[
    [Callable[[], None], int], tuple[float, float]
]  # a step, how many of it -> seconds a step, wall and CPU
CLOCKS: tuple[Clock, Clock] = ("wall", "cpu")


@dataclass(frozen=True)
class Timing:
    """Seconds a step, one value a repeat, by both clocks."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def median(self, clock: Clock) -> float:
        return statistics.median(getattr(self, clock))

    def minimum(self, clock: Clock) -> float:
        return min(getattr(self, clock))


@dataclass(frozen=True)
class Ratio:
    """One contestant against another, each number 1 where they are equally fast.

    medians and minima: their quotient. paired: the median of the quotients within a repeat. low and high: the quartiles
    of those.
    """

    medians: float
    minima: float
    paired: float
    low: float
    high: float


def ratio(above: Timing, below: Timing, clock: Clock) -> Ratio:
    """above / below."""
    pairs = [a / b for a, b in zip(getattr(above, clock), getattr(below, clock), strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    return Ratio(
        medians=above.median(clock) / below.median(clock),
        minima=above.minimum(clock) / below.minimum(clock),
        paired=statistics.median(pairs),
        low=low,
        high=high,
    )


def orders(names: Sequence[str]) -> Iterator[list[str]]:
    """The order of each repeat, without end."""
    count = len(names)
    base = [0, *((i + 1) // 2 if i % 2 else count - i // 2 for i in range(1, count))]
    repeat = 0
    while True:
        yield [names[(place + repeat) % count] for place in base]
        repeat += 1


def time_block(step: Callable[[], None], num_steps: int) -> tuple[float, float]:
    """Seconds a step by the two clocks: the timer of one process."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - wall) / num_steps, (time.process_time() - cpu) / num_steps


def interleave(
    steps: Mapping[str, Callable[[], None]],
    *,
    num_repeats: int,
    num_steps: int,
    warmup: int,
    timer: Timer = time_block,
) -> dict[str, Timing]:
    """Time every contestant's step. warmup: untimed steps of each before the first repeat."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warmup):
            step()
    with no_collection():
        for _, order in zip(range(num_repeats), orders(list(steps)), strict=False):
            for name in order:
                samples[name].append(timer(steps[name], num_steps))
            gc.collect()
    return {name: Timing(*zip(*pairs, strict=True)) for name, pairs in samples.items()}


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector off for all, as the training loop has it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_lines(timings: Mapping[str, Timing], title: str) -> Iterator[str]:
    """Milliseconds of each contestant, as text."""
    yield f"{title:18}" + "".join(f"{clock + ' ' + what:>14}" for clock in CLOCKS for what in ("median", "min"))
    for name, timing in timings.items():
        numbers = (1e3 * n for clock in CLOCKS for n in (timing.median(clock), timing.minimum(clock)))
        yield f"{name:18}" + "".join(f"{number:14.2f}" for number in numbers)


def ratio_lines(timings: Mapping[str, Timing], pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The quotients above / below, as text."""
    yield f"{'ratio':26}{'clock':>6}{'medians':>10}{'mins':>10}{'paired':>10}   quartiles of the pairs"
    for above, below in pairs:
        for clock in CLOCKS:
            r = ratio(timings[above], timings[below], clock)
            yield (
                f"{above + ' / ' + below:26}{clock:>6}{r.medians:10.4f}{r.minima:10.4f}{r.paired:10.4f}"
                f"   {r.low:.4f} to {r.high:.4f}"
            )
