"""What a person sees: plain lines, and on a terminal a progress bar. Rank 0 alone prints."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def line(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def error(text: str) -> None:
    """One message on standard error."""
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class ProgressReport:
    """Step, loss, tokens/s and time left: a bar on a terminal, otherwise a line every `every` steps."""

    def __init__(self, *, first: int, last: int, every: int, silent: bool) -> None:
        self._first, self._last, self._every, self._silent = first, last, every, silent
        self._second_step: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if not silent and sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.description}"),
                progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=last, completed=first)
            self._bar.start()

    def step(self, step: int, *, loss: float, grad_norm: float, tokens_per_second: float) -> None:
        """Report a finished step, counted from 1."""
        text = f"loss {loss:.4f}  norm {grad_norm:.3f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._silent and (step % self._every == 0 or step in (self._first + 1, self._last)):
            line(f"step {step}/{self._last}  {text}  ETA {self._time_left(step)}")

    def _time_left(self, step: int) -> str:
        """At the mean rate so far; the first step warms up and doesn't count."""
        if self._second_step is None:
            self._second_step = time.monotonic()
            return "?"
        spent = time.monotonic() - self._second_step
        return duration(spent / (step - self._first - 1) * (self._last - step))

    def say(self, text: str) -> None:
        """A line beside the progress."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self._silent:
            line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
