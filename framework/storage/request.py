"""What requests to the servers of every kind of store have in common: patience, a client of the process, ranges.

What a later try can mend is tried again for PATIENCE seconds: refused and broken connections, timeouts, answers that
end too early, 5xx, 429. What it can't is told at once.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 180.0  # seconds for which a server may be away
CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 15.0
# The same before a run starts, for a check of two requests: 10 s at most.
READABLE_PATIENCE = 3.0
READABLE_TIMEOUT = 2.0
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0
PART = 16 << 20  # bytes of one ranged request
THREADS = 4


class StoreError(OSError):
    """A request that failed for good. The message names object and endpoint, and no credential."""


class PassingError(OSError):
    """A request that failed and may work when it is made again. The message says why in a few words, without a name."""


class OfProcess(Generic[T]):
    """Something that each process makes for itself: a fork must not share a client's connections."""

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        self._made: tuple[int, T] | None = None
        self._making = threading.Lock()

    def get(self) -> T:
        """This process's own. Raises what building it raises."""
        with self._making:
            made = self.made()
            if made is None:
                made = self._build()
                self._made = (os.getpid(), made)
            return made

    def made(self) -> T | None:
        """The same, None where it wasn't built yet or couldn't be."""
        made = self._made
        return made[1] if made is not None and made[0] == os.getpid() else None


def persist(
    action: Callable[[], T],
    *,
    seconds: float,
    known: tuple[type[Exception], ...],
    passes: Callable[[Exception], bool],
    explained: Callable[[Exception], OSError],
) -> T:
    """Do `action`, again while that can help, for `seconds`.

    known: what the client's library raises; anything else is a fault of the program and passes through. passes: whether
    another try may help. Raises OSError: `explained`, without the error itself, whose text may hold a secret.
    """
    deadline, pause = time.monotonic() + seconds, FIRST_PAUSE
    while True:
        try:
            return action()
        except StoreError:
            raise
        except known as error:
            if not passes(error) or time.monotonic() + pause > deadline:
                raise explained(error) from None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def read_ranges(place: str, offset: int, parts: Sequence[memoryview], get: Callable[[int, int], bytes]) -> None:
    """Fill `parts`, in order, with an object's bytes from `offset`, several ranges of PART bytes at once.

    place: the object's name in messages. get: (start, stop) -> those bytes, or fewer where the object ends. Raises
    StoreError when it is shorter.
    """
    end = offset + sum(len(part) for part in parts)
    ranges = [(start, min(start + PART, end)) for start in range(offset, end, PART)]

    def whole(span: tuple[int, int]) -> bytes:
        data = get(*span)
        if len(data) != span[1] - span[0]:
            raise StoreError(f"{place} ends at byte {span[0] + len(data)}, more was asked for")
        return data

    with ThreadPoolExecutor(min(THREADS, max(1, len(ranges)))) as pool:
        left = iter([part for part in parts if len(part)])
        part = memoryview(b"")
        for data in pool.map(whole, ranges):
            rest = memoryview(data)
            while rest:
                part = part if len(part) else next(left)
                count = min(len(part), len(rest))
                part[:count] = rest[:count]
                part, rest = part[count:], rest[count:]


def check_by_reading(
    url: str, some: Callable[[], dict[str, int]], read_into: Callable[[str, int, Sequence[memoryview]], None]
) -> None:
    """Raises ValueError where a place can't be listed, where nothing is in it, or where its first byte can't be read.

    some: name and size of a few of the objects below `url`.
    """
    try:
        found = some()
        name = max(found, key=lambda name: found[name], default=None)
        if name is not None and found[name]:
            read_into(name, 0, [memoryview(bytearray(1))])
    except OSError as error:
        raise ValueError(str(error)) from None
    if name is None:
        raise ValueError(f"{url}: nothing is there; is the name right?")


def redacted(endpoint: str) -> str:
    """A URL without what may stand before an @ or after a question mark, where a password or a signature would be."""
    return re.sub(r"[?#].*", "", re.sub(r"//[^/]*@", "//", endpoint))
