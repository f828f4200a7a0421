"""How long a data file is tried for, and what it is where that was in vain."""

import logging
import sys
import threading
import time

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.1  # seconds between two tries
LONGEST_PAUSE = 5.0
PROGRESS = 8 << 20  # bytes after which earlier trouble is forgotten


class BadShard(OSError):
    """A data file that can't be had whole. The message names its place and says why. damaged: and it won't be."""

    damaged = True


class AwayShard(BadShard):
    """One whose server gave no whole answer for the patience."""

    damaged = False


class Closed(Exception):
    """The cache was closed meanwhile."""


class Patience:
    """How long a file's download is tried again: seconds since the trouble began, less what was made good since."""

    def __init__(self, seconds: float, closed: threading.Event, name: str) -> None:
        self._seconds, self._closed, self._name = seconds, closed, name
        self._begin: float | None = None
        self._done, self._pause = 0, FIRST_PAUSE

    def start(self) -> None:
        """Another process tries already: if it gives up, this one has waited as long."""
        self._begin = self._begin or time.monotonic()

    def spend(self, why: str, done: int | None, *, fix: str) -> None:
        """Wait a little. done: bytes of the file that are there; None where all that came counts for nothing.

        Raises BadShard where there is no time left; Closed.
        """
        now = time.monotonic()
        if self._begin is None or (done is not None and done - self._done >= PROGRESS):
            self._begin, self._done, self._pause = now, done or 0, FIRST_PAUSE
            logger.warning("%s: %s; trying again for %g s", self._name, why, self._seconds)
        if done is None:
            self._done = sys.maxsize
        if now + self._pause > self._begin + self._seconds:
            raise (BadShard if done is None else AwayShard)(
                f"{self._name} can't be had: {why} (tried for {self._seconds:g} s); {fix}"
            )
        if self._closed.wait(self._pause):
            raise Closed
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
