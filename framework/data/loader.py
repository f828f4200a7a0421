"""Steps and their batches, prepared ahead.

    schedule -> rows of shards -> samples begun, videos in the pool                    one thread   (reader.py)
             -> samples finished -> batch -> the other ranks of the replica -> device  another one  (channel.py)
             -> the loop

Both threads know the schedule, so they read exactly what the coming steps need. The position belongs to the batch that
was consumed, never to them: a resumed run starts a new loader at its step.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from framework.batch import Batch
from framework.data.channel import Channel
from framework.data.device import Mover, OnItsWay
from framework.data.reader import Pending, Reader
from framework.data.schedule import Schedule, Work

T = TypeVar("T")

LOOK = 0.1  # seconds between two looks at whether the loader was closed
END = 0.5  # seconds for a thread to end; one that waits for another rank ends with the process


class Closed(Exception):
    """The loader was closed meanwhile."""


class Loader:
    """Some steps and their batches, `prefetch` micro-batches ahead.

    waited: seconds that the loop has waited for them. lost: samples that this rank couldn't have.
    """

    def __init__(
        self, reader: Reader, schedule: Schedule, *, channel: Channel, mover: Mover, steps: Iterable[int], prefetch: int
    ) -> None:
        self._reader, self._channel, self._mover = reader, channel, mover
        self._begun: queue.Queue[Work | Pending | BaseException] = queue.Queue(maxsize=prefetch)
        self._done: queue.Queue[Work | OnItsWay | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self.waited, self.lost = 0.0, 0
        self._threads = [
            threading.Thread(target=self._read, args=(schedule, steps), name="data-read", daemon=True),
            threading.Thread(target=self._finish, name="data-finish", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def next_work(self) -> Work:
        """The next step; its batches must be taken before the one after it."""
        work = self._next()
        assert isinstance(work, Work), "the last step's batches weren't all taken"
        return work

    def batches(self, work: Work) -> Iterator[Batch]:
        """The batches of a step, in order."""
        for _ in range(work.num_micro):
            coming = self._next()
            assert isinstance(coming, OnItsWay)
            batch = coming.arrive()
            self.lost += batch.lost
            yield batch

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        self._reader.close()
        for thread in self._threads:
            thread.join(timeout=END)

    def _next(self) -> Work | OnItsWay:
        """The next item; `waited` grows by the seconds that it wasn't there."""
        begin = time.perf_counter()
        item = self._done.get()
        self.waited += time.perf_counter() - begin
        if isinstance(item, BaseException):
            raise item
        return item

    def _read(self, schedule: Schedule, steps: Iterable[int]) -> None:
        """The first thread."""
        try:
            for item in self._reader.steps(schedule, steps, reads=self._channel.reads):
                self._put(self._begun, item)
        except Closed:
            return
        except BaseException as error:
            self._begun.put(error)

    def _finish(self) -> None:
        """The second thread."""
        try:
            self._mover.enter()
            while True:
                item = self._take()
                if isinstance(item, BaseException):
                    raise item
                self._put(self._done, item if isinstance(item, Work) else self._moved(item))
        except Closed:
            return
        except BaseException as error:
            self._done.put(error)

    def _moved(self, pending: Pending) -> OnItsWay:
        return self._mover.start(self._channel.share(pending.micro, lambda: self._reader.finish(pending)))

    def _take(self) -> Work | Pending | BaseException:
        while not self._closed.is_set():
            try:
                return self._begun.get(timeout=LOOK)
            except queue.Empty:
                continue
        raise Closed

    def _put(self, place: queue.Queue[T], item: T) -> None:
        while not self._closed.is_set():
            try:
                return place.put(item, timeout=LOOK)
            except queue.Full:
                continue
        raise Closed
