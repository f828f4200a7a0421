"""Which data a step takes where some were left out: a run that goes back to a checkpoint passes over what broke it.

    data_step(s) = s + the lengths of all windows (at, length) with at <= s

Samples and noise follow the data step; learning rate, average and saves the training step s. Both count from 0.
"""

from collections.abc import Iterator

Windows = tuple[tuple[int, int], ...]


def data_step(windows: Windows, step: int) -> int:
    """The data step of a training step."""
    return step + sum(length for at, length in windows if at <= step)


def data_steps(windows: Windows, steps: range) -> Iterator[int]:
    """The data steps of some training steps, in order."""
    return (data_step(windows, step) for step in steps)


def leave_out(windows: Windows, back: int, end: int) -> Windows:
    """The windows of a run that goes back from `end` steps done to `back`: what it took between them is left out too.

    Windows of the steps between lie within the new one.
    """
    assert back < end
    kept = tuple(window for window in windows if window[0] <= back)
    return (*kept, (back, data_step(windows, end - 1) + 1 - data_step(kept, back)))
