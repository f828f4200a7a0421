"""Where bytes that outlive a run are kept: a directory, or a bucket of an object store; and where data are read from.

Names are relative, with slashes, as in a bucket: "step-00000100-0000/manifest.json". Nothing here knows what is stored.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from framework.storage.bucket import Bucket
from framework.storage.directory import Directory

S3_SCHEME = "s3://"
GOOGLE_SCHEME = "gs://"
AZURE_SCHEME = "az://"


class Writer(Protocol):
    """One object being written; it isn't there until `close` returns."""

    def write(self, data: memoryview | bytes) -> None:
        """Append. Raises OSError."""
        ...

    def close(self) -> None:
        """Make it durable. Raises OSError, after which nothing of it counts."""
        ...

    def abort(self) -> None:
        """Leave nothing behind."""
        ...


class Source(Protocol):
    """Objects that are read, by name. Every method may raise OSError, whose message names the object and never a
    credential. The right to list and to get objects is enough.

    url: the place, without credentials.
    """

    url: str

    def read(self, name: str) -> bytes:
        """All of an object. Raises FileNotFoundError."""
        ...

    def read_into(self, name: str, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill `parts`, in order, with the object's bytes from `offset`. Raises OSError when it is shorter."""
        ...

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        """The `size` bytes from `offset` as they come, without a second try.

        Raises PassingError where another try may help, which the caller makes from where it was; FileNotFoundError.
        """
        ...

    def list(self, prefix: str = "") -> dict[str, int]:
        """Name and size in bytes of everything whose name begins with `prefix`."""
        ...

    def check_readable(self) -> None:
        """Raises ValueError with the fix, within 10 s, where this process couldn't read here or nothing is there."""
        ...


class Storage(Source, Protocol):
    """Objects that are written too.

    gap: bytes that are quicker read than left out between two ranges.
    """

    gap: int

    def open_writer(self, name: str) -> Writer:
        """Begin an object."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write an object, whole or not at all; replaces what was there."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write an object unless it is there already: then False. One of several clients at once succeeds."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; absent ones are fine."""
        ...

    def check(self) -> None:
        """Raises ValueError with the fix where this process couldn't write here."""
        ...


def open_storage(url: str) -> Storage:
    """The store at a directory or s3://bucket/prefix. Nothing is read or made yet. Raises ValueError for other URLs."""
    if url.startswith(S3_SCHEME):
        from framework.storage.s3 import S3

        return S3(url)
    if url.startswith((GOOGLE_SCHEME, AZURE_SCHEME)):
        raise ValueError(
            f"{url}: from there data can be read, but checkpoints are kept in a directory or under s3://bucket/prefix"
        )
    if "://" in url:
        raise ValueError(f"{url}: checkpoints are kept in a directory or under s3://bucket/prefix")
    return Directory(url)


def open_source(url: str) -> Source:
    """What can be read at a directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.

    Nothing is read yet. Raises ValueError for other URLs.
    """
    if url.startswith(GOOGLE_SCHEME):
        from framework.storage.gcs import GoogleCloud

        return Bucket(url, GoogleCloud())
    if url.startswith(AZURE_SCHEME):
        from framework.storage.azure import Azure

        return Bucket(url, Azure())
    if "://" in url and not url.startswith(S3_SCHEME):
        scheme = url.partition("://")[0]
        raise ValueError(
            f"data can't be read by {scheme}://: name a directory, s3://bucket/prefix, gs://bucket/prefix or "
            "az://container/prefix"
        )
    return open_storage(url)
