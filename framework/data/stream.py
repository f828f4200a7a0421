"""What the loader reads rows from: shards in a directory, read in place, and in an object store, through the cache.

The loader says in which order it'll visit shards; threads download those of coming visits as far as the cache's quota
goes. Visits are taken, and shards let go, by the thread that asks for rows, so that the order in which shards are held
is that of the visits and nothing waits for a shard behind its own.
"""

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from framework.data.cache import Held, ShardCache
from framework.data.patience import BadShard, Closed
from framework.data.shards import ShardDirectory, read_row
from framework.storage.directory import Directory

MOST_VISITS: Final = 1 << 12  # taken ahead: a few windows of shards; each holds its slots in memory
MOST_HELD: Final = 256  # shards of the cache that are open at a time
MOST_OPEN: Final = 64  # shards of directories that are open at a time
LOOKS: Final = 16  # visits taken ahead for each one made: the way ahead grows while the first rows are read already


@dataclass(frozen=True)
class Visit:
    """Rows that are read together. stream: of the store. positions: within the shard; none reads nothing."""

    stream: int
    shard: int
    positions: tuple[int, ...]


@dataclass(eq=False)
class Lease:
    """A shard of the cache for coming visits. uses: how many. done: whether there is a file or an error."""

    stream: int
    shard: int
    size: int
    uses: int
    held: Held | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.held is not None or self.error is not None


@dataclass
class Ahead:
    """What one `follow` has taken from its visits. waiting: the visit whose shard had no room yet."""

    visits: Iterator[Visit]
    taken: deque[tuple[Visit, Lease | None]] = field(default_factory=deque)
    leases: dict[tuple[int, int], Lease] = field(default_factory=dict)
    waiting: Visit | None = None
    ended: BaseException | None = None
    size: int = 0


class ShardStore:
    """Rows of the shards of `streams`.

    cache: of a process of its own, for one `follow` at a time; not needed where all streams are directories. It is
    closed with the store. threads: downloads at a time. Raises ValueError where the cache is too small.
    """

    def __init__(self, streams: Sequence[ShardDirectory], cache: ShardCache | None, *, threads: int) -> None:
        self._streams, self._cache = streams, cache
        remote = [shards for shards in streams if not is_local(shards)]
        if remote and cache is None:
            raise ValueError(f"{remote[0].url} is read through a cache on this node, and none was given")
        if cache is not None:
            cache.admit(remote)
        self._changed = threading.Condition()
        self._todo: deque[Lease] = deque()
        self._bad: dict[tuple[int, int], BadShard] = {}
        self._open: OrderedDict[tuple[int, int], Held] = OrderedDict()
        self._closed = False
        self._num_threads = threads
        self._threads: list[threading.Thread] = []
        if remote:
            names = [f"download-{number}" for number in range(threads)]
            self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def follow(self, visits: Iterator[Visit]) -> Iterator[tuple[Visit, list[bytes] | BadShard]]:
        """Each visit's rows in order, or why its shard can't be read; ends early when the store is closed.

        visits: may be endless; it is asked for more than are made. Raises what `visits` raises, and OSError where the
        trouble isn't one shard's: no right to read, a full disk.
        """
        ahead = Ahead(visits)
        try:
            while True:
                self._look_ahead(ahead)
                if not ahead.taken:
                    if ahead.ended is None or isinstance(ahead.ended, StopIteration):
                        return
                    raise ahead.ended
                visit, lease = ahead.taken.popleft()
                if not self._wait_for(lease):
                    return
                rows = self._rows(visit, lease)
                if lease is not None:
                    self._let_go(ahead, lease)
                yield visit, rows
        finally:
            self._abandon(ahead)

    def close(self) -> None:
        """End downloads. One that waits for a server that doesn't answer ends with its request, or the process."""
        if self._cache is not None:
            self._cache.close()
        with self._changed:
            self._closed = True
            self._todo.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=0.2 / len(self._threads))

    def _look_ahead(self, ahead: Ahead) -> None:
        """Take coming visits, as far as there is room for their shards."""
        for _ in range(LOOKS):
            if ahead.taken and (
                len(ahead.taken) >= MOST_VISITS or not self._threads
            ):  # without threads: nothing to fetch
                return
            if ahead.waiting is None:
                if ahead.ended is not None:
                    return
                try:
                    ahead.waiting = next(ahead.visits)
                except Exception as error:
                    ahead.ended = error
                    return
            visit, lease = ahead.waiting, None
            if visit.positions and not is_local(self._streams[visit.stream]):
                lease = self._lease(ahead, visit)
                if lease is None:
                    return
            ahead.taken.append((visit, lease))
            ahead.waiting = None

    def _lease(self, ahead: Ahead, visit: Visit) -> Lease | None:
        """The lease of a visit's shard; None while there is no room for it."""
        key = (visit.stream, visit.shard)
        if (lease := ahead.leases.get(key)) is not None:
            lease.uses += 1
            return lease
        assert self._cache is not None
        bad = self._bad.get(key)
        size = 0 if bad else self._streams[visit.stream].files[visit.shard].num_bytes
        coming = sum(not lease.done for lease in ahead.leases.values())
        full = ahead.size + size > self._cache.quota or len(ahead.leases) >= MOST_HELD
        if ahead.leases and (full or coming >= 2 * self._num_threads):
            return None
        lease = ahead.leases[key] = Lease(visit.stream, visit.shard, size, uses=1, error=bad)
        ahead.size += size
        if bad is None:
            with self._changed:
                self._todo.append(lease)
                self._changed.notify_all()
        return lease

    def _wait_for(self, lease: Lease | None) -> bool:
        """Whether the store is still open when the shard has come."""
        with self._changed:
            while not self._closed and lease is not None and not lease.done:
                self._changed.wait()
            return not self._closed

    def _rows(self, visit: Visit, lease: Lease | None) -> list[bytes] | BadShard:
        try:
            if not visit.positions:
                return []
            if lease is None:
                held = self._open_local(visit)
            elif lease.held is not None:
                held = lease.held
            else:
                assert lease.error is not None
                raise lease.error
            return [read_row(held.read, position) for position in visit.positions]
        except BadShard as error:
            self._bad[visit.stream, visit.shard] = error
            return error

    def _open_local(self, visit: Visit) -> Held:
        """A shard of a directory; the one that was used longest ago is closed for it."""
        key = (visit.stream, visit.shard)
        if key not in self._open:
            shards = self._streams[visit.stream]
            path = Path(shards.url) / shards.files[visit.shard].name
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise BadShard(f"{path} can't be read: {error.strerror}") from None
            if len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[key] = Held(descriptor, str(path))
        self._open.move_to_end(key)
        return self._open[key]

    def _let_go(self, ahead: Ahead, lease: Lease) -> None:
        """One visit of a lease is over."""
        lease.uses -= 1
        if not lease.uses:
            del ahead.leases[lease.stream, lease.shard]
            ahead.size -= lease.size
            if lease.held is not None:
                lease.held.close()

    def _abandon(self, ahead: Ahead) -> None:
        """Let go of all that is open; a download under way sees that nobody waits for it."""
        with self._changed:
            for lease in ahead.leases.values():
                lease.uses = 0
                if lease in self._todo:
                    self._todo.remove(lease)
                if lease.held is not None:
                    lease.held.close()
        ahead.leases.clear()
        while self._open:
            self._open.popitem()[1].close()

    def _work(self) -> None:
        """A thread: hold the shards of leases in turn."""
        assert self._cache is not None
        while True:
            with self._changed:
                while not self._todo and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                lease = self._todo.popleft()
            held, error = None, None
            try:
                held = self._cache.hold(self._streams[lease.stream], lease.shard)
            except Closed:
                return
            except BaseException as failure:
                error = failure
            with self._changed:
                if held is not None and (self._closed or not lease.uses):
                    held.close()
                else:
                    lease.held, lease.error = held, error
                self._changed.notify_all()


def is_local(shards: ShardDirectory) -> bool:
    """Whether a directory's shards are read in place."""
    return isinstance(shards.store, Directory)
