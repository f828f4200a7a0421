"""Objects of a bucket that are read and never written, whichever cloud keeps them.

A `Service` makes one request at a time as its client library does; the patience, the prefix and the messages are here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from framework.storage.request import (
    CONNECT_TIMEOUT,
    PART,
    PATIENCE,
    READ_TIMEOUT,
    READABLE_PATIENCE,
    READABLE_TIMEOUT,
    OfProcess,
    PassingError,
    StoreError,
    check_by_reading,
    persist,
    read_ranges,
    redacted,
)

T = TypeVar("T")

SOME = 20  # objects that a check lists


class UnusableError(Exception):
    """No client can be made. The text is the fix, without anything secret."""


@dataclass(frozen=True)
class Fault:
    """What an error of a client library means.

    passes: whether another try may help. absent: the object isn't there; of a listing, the bucket. fix: what it is and
    what to do, without anything secret.
    """

    passes: bool = False
    absent: bool = False
    fix: str = ""


@dataclass(frozen=True)
class Timeouts:
    """Seconds that one try waits: `connect` for a connection, `read` for the next bytes of an answer."""

    connect: float = CONNECT_TIMEOUT
    read: float = READ_TIMEOUT


class Service(Protocol):
    """The client of one bucket, in one process. Each method makes one try and raises what its library raises.

    endpoint: the URL of the server, which may hold a secret.
    """

    endpoint: str

    def get(self, key: str, span: tuple[int, int] | None) -> bytes:
        """The bytes [start, stop) of an object, fewer where it ends before; all of them for None."""
        ...

    def list(self, prefix: str, limit: int | None) -> dict[str, int]:
        """Key and size in bytes of what begins with `prefix`; with `limit`, of one page of about so many."""
        ...


class Cloud(Protocol):
    """One kind of cloud.

    bucket: its word for a bucket. variables: what in the environment leads to the server, for messages.
    """

    bucket: str
    variables: str

    def connect(self, bucket: str, timeouts: Timeouts) -> Service:
        """A client with this process's credentials. Raises UnusableError, or what the library raises."""
        ...

    def known(self) -> tuple[type[Exception], ...]:
        """What the library raises."""
        ...

    def judge(self, error: Exception) -> Fault:
        """What one of those means."""
        ...


class Bucket:
    """`Source` below a prefix of a bucket."""

    def __init__(
        self, url: str, cloud: Cloud, *, patience: float = PATIENCE, read_timeout: float = READ_TIMEOUT
    ) -> None:
        """url: scheme://bucket/prefix. patience, read_timeout: seconds. Raises ValueError without a bucket."""
        scheme, _, path = url.partition("://")
        bucket, _, prefix = path.rstrip("/").partition("/")
        if not bucket or any(mark in path for mark in "@?#"):
            raise ValueError(
                f"a place to read has the form {scheme}://{cloud.bucket}/prefix, with credentials in the environment"
            )
        self.url = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._cloud, self._patience, self._read_timeout = cloud, patience, read_timeout
        timeouts = Timeouts(min(CONNECT_TIMEOUT, read_timeout), read_timeout)

        def connect() -> Service:
            try:
                return cloud.connect(bucket, timeouts)
            except UnusableError as error:
                raise StoreError(f"{self.url}: {error}") from None

        self._service: OfProcess[Service] = OfProcess(connect)

    def read(self, name: str) -> bytes:
        return self._request(name, lambda service: service.get(self._prefix + name, None))

    def read_into(self, name: str, offset: int, parts: Sequence[memoryview]) -> None:
        def get(start: int, stop: int) -> bytes:
            return self._request(name, lambda service: service.get(self._prefix + name, (start, stop)))

        read_ranges(f"{self.url}/{name}", offset, parts, get)

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        for start in range(offset, offset + size, PART):
            stop = min(start + PART, offset + size)
            try:
                data = self._service.get().get(self._prefix + name, (start, stop))
            except self._cloud.known() as error:
                fault = self._cloud.judge(error)
                if not fault.passes:
                    raise self._explained(name, fault) from None
                raise PassingError(fault.fix or type(error).__name__) from None
            yield data
            if len(data) != stop - start:
                raise PassingError(f"it ends at byte {start + len(data)}, more was asked for")

    def list(self, prefix: str = "") -> dict[str, int]:
        return self._list(prefix, None)

    def check_readable(self) -> None:
        quick = Bucket(
            self.url,
            self._cloud,
            patience=min(self._patience, READABLE_PATIENCE),
            read_timeout=min(self._read_timeout, READABLE_TIMEOUT),
        )
        check_by_reading(self.url, lambda: quick._list("", SOME), quick.read_into)

    def _list(self, prefix: str, limit: int | None) -> dict[str, int]:
        try:
            found = self._request("", lambda service: service.list(self._prefix + prefix, limit))
        except FileNotFoundError:
            kind = self._cloud.bucket
            raise StoreError(f"{self.url}: the {kind} doesn't exist: make it, or name another") from None
        return {key.removeprefix(self._prefix): found[key] for key in sorted(found)}

    def _request(self, name: str, action: Callable[[Service], T]) -> T:
        """Run `action` on the client, again while that can help. Raises OSError."""

        def explained(error: Exception) -> OSError:
            return self._explained(name, self._cloud.judge(error))

        return persist(
            lambda: action(self._service.get()),
            seconds=self._patience,
            known=self._cloud.known(),
            passes=lambda error: self._cloud.judge(error).passes,
            explained=explained,
        )

    def _explained(self, name: str, fault: Fault) -> OSError:
        """The error as one message."""
        place = f"{self.url}/{name}".rstrip("/")
        if fault.absent:
            return FileNotFoundError(f"{place} isn't there")
        service = self._service.made()  # none: the fault says why there is no client
        if service is not None:
            place += f" at {redacted(service.endpoint)}"
        if fault.passes:
            return StoreError(
                f"{place}: no answer for {self._patience:g} s ({fault.fix}): is the server there? See "
                f"{self._cloud.variables}"
            )
        return StoreError(f"{place}: {fault.fix}")
