"""Objects in a bucket of S3, or of a server that speaks it, through boto3.

Endpoint and credentials are botocore's own affair (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, profiles, instance roles). What
a later try can mend is tried again for PATIENCE seconds: refused and broken connections, timeouts, 5xx, SlowDown. What
it can't, such as wrong credentials or a bucket that isn't there, is told at once.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from framework.storage.request import (
    CONNECT_TIMEOUT,
    PART,
    PATIENCE,
    READ_TIMEOUT,
    READABLE_PATIENCE,
    READABLE_TIMEOUT,
    THREADS,
    OfProcess,
    PassingError,
    StoreError,
    check_by_reading,
    persist,
    redacted,
)

T = TypeVar("T")

CHECK_PATIENCE = 20.0  # seconds for which a server may be away before a run starts
PARTS_OF_A_SIZE = 2000  # of the 10,000 that an upload may have; after so many the size of a part is doubled
SOME = 20  # objects that a check of a place to read lists
PIECE = 1 << 20  # bytes read at once
MOST_CONNECTIONS = 64
PASSING: Final = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ThrottlingException"})
FIXES: Final = (
    (("NoSuchBucket",), "the bucket doesn't exist: make it, or name another"),
    (("InvalidAccessKeyId",), "the access key is unknown there: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    (("SignatureDoesNotMatch",), "the secret key is wrong: set AWS_SECRET_ACCESS_KEY"),
    (
        ("AccessDenied", "403"),
        "these credentials may not do that: ask for the right to list and read; to write also to write and delete",
    ),
    (("ExpiredToken",), "the credentials have expired: renew them"),
)


class S3:
    """`Storage` below a prefix of a bucket."""

    gap = 1 << 20

    def __init__(self, url: str, *, patience: float = PATIENCE, read_timeout: float = READ_TIMEOUT) -> None:
        """url: s3://bucket/prefix. Raises ValueError without a bucket."""
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket or "@" in bucket:
            raise ValueError("a store in S3 has the form s3://bucket/prefix, with credentials in the environment")
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._patience, self._read_timeout = patience, read_timeout
        self._client: OfProcess[Any] = OfProcess(partial(build_client, read_timeout))

    def open_writer(self, name: str) -> "S3Writer":
        return S3Writer(self, name)

    def put(self, name: str, data: bytes) -> None:
        self.request(name, lambda client: client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        tries = 0

        def put(client: Any) -> bool:
            nonlocal tries
            tries += 1
            try:
                client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data, IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                if status_of(error) != 412:
                    raise
                return False
            return True

        # A try whose answer was lost may have made it.
        return self.request(name, put) or (tries > 1 and self.read(name) == data)

    def read(self, name: str) -> bytes:
        def get(client: Any) -> bytes:
            body: bytes = client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
            return body

        return self.request(name, get)

    def read_into(self, name: str, offset: int, parts: Sequence[memoryview]) -> None:
        total = sum(len(part) for part in parts)
        starts = range(0, total, PART)

        def get(start: int) -> None:
            views, size = views_of(parts, start, start + PART), min(PART, total - start)

            def ranged(client: Any) -> int:
                return fill(views, self._pieces(client, name, offset + start, size))

            if (done := self.request(name, ranged)) < size:
                raise StoreError(f"{self.url}/{name} ends at byte {offset + start + done}, more was asked for")

        with ThreadPoolExecutor(min(THREADS, max(1, len(starts)))) as pool:
            list(pool.map(get, starts))

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        done = 0
        try:
            for piece in self._pieces(self._client.get(), name, offset, size):
                done += len(piece)
                yield piece
        except (ClientError, BotoCoreError, HTTPError, OSError) as error:
            if not passes(error) and code_of(error) != "InvalidRange":
                raise self._explained(name, error) from None
            raise PassingError(f"{type(error).__name__} {code_of(error)}".strip()) from None
        if done != size:
            raise PassingError(f"{done} bytes came of the {size} from byte {offset}")

    def _pieces(self, client: Any, name: str, offset: int, size: int) -> Iterator[bytes]:
        """A range of an object as it comes; ends early where the object does."""
        span = f"bytes={offset}-{offset + size - 1}"
        answer = client.get_object(Bucket=self._bucket, Key=self._prefix + name, Range=span)
        body = answer["Body"]
        # What has arrived, without waiting for more: so a slow server can be told from one that is away.
        raw = body._raw_stream
        read = getattr(raw, "read1", raw.read)
        left = min(size, answer["ContentLength"])
        try:
            while left and (piece := read(min(PIECE, left))):
                left -= len(piece)
                yield piece
            if left:
                raise OSError(f"the answer ended {left} bytes early")
        finally:
            if left:
                body.close()

    def list(self, prefix: str = "") -> dict[str, int]:
        def pages(client: Any) -> dict[str, int]:
            paginator = client.get_paginator("list_objects_v2")
            found = paginator.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
            items = (item for page in found for item in page.get("Contents", []))
            return {item["Key"].removeprefix(self._prefix): item["Size"] for item in items}

        return dict(sorted(self.request(prefix, pages).items()))

    def delete(self, names: Iterable[str]) -> None:
        for batch in batches([{"Key": self._prefix + name} for name in names], 1000):
            asked = {"Bucket": self._bucket, "Delete": {"Objects": batch, "Quiet": True}}
            answer = self.request("", partial(call, "delete_objects", asked))
            for error in answer.get("Errors", []):
                raise StoreError(f"s3://{self._bucket}/{error['Key']} can't be deleted: {error.get('Message')}")

    def check(self) -> None:
        quick = S3(self.url, patience=min(self._patience, CHECK_PATIENCE), read_timeout=self._read_timeout)
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            quick.list("fence/")
            first, second = (quick.put_if_absent(probe, data) for data in (b"1", b"2"))
            quick.delete([probe])
        except OSError as error:
            raise ValueError(str(error)) from None
        if second or not first:
            raise ValueError(
                f"{self.url}: this server takes no conditional puts (If-None-Match), which the fence needs"
            )

    def check_readable(self) -> None:
        patience, read_timeout = min(self._patience, READABLE_PATIENCE), min(self._read_timeout, READABLE_TIMEOUT)
        quick = S3(self.url, patience=patience, read_timeout=read_timeout)
        asked = {"Bucket": self._bucket, "Prefix": self._prefix, "MaxKeys": SOME}

        def some() -> dict[str, int]:
            items = quick.request("", partial(call, "list_objects_v2", asked)).get("Contents", [])
            return {item["Key"].removeprefix(self._prefix): item["Size"] for item in items}

        check_by_reading(self.url, some, quick.read_into)

    def request(self, name: str, action: Callable[[Any], T]) -> T:
        """Run `action` on the client, again while that can help. Raises OSError."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        return persist(
            lambda: action(self._client.get()),
            seconds=self._patience,
            known=(ClientError, BotoCoreError, HTTPError, OSError, ValueError),
            passes=passes,
            explained=partial(self._explained, name),
        )

    def upload(self, name: str) -> str:
        """Begin an upload in parts; its id."""
        return str(self.request(name, partial(call, "create_multipart_upload", self._place(name)))["UploadId"])

    def upload_part(self, name: str, upload: str, number: int, data: bytes) -> dict[str, object]:
        """One part, numbered from 1; what completes the upload needs to know of it."""
        words = self._place(name) | {"UploadId": upload, "PartNumber": number, "Body": data}
        answer = self.request(name, partial(call, "upload_part", words))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def complete(self, name: str, upload: str, parts: Sequence[dict[str, object]], size: int) -> None:
        """Make an object of its parts."""
        words = self._place(name) | {"UploadId": upload, "MultipartUpload": {"Parts": list(parts)}}
        try:
            self.request(name, partial(call, "complete_multipart_upload", words))
        except FileNotFoundError:  # the answer to an earlier try was lost
            if self.request(name, partial(call, "head_object", self._place(name)))["ContentLength"] != size:
                raise

    def abandon(self, name: str, upload: str) -> None:
        """Throw the parts of an upload away."""
        with suppress(OSError):
            self.request(name, partial(call, "abort_multipart_upload", self._place(name) | {"UploadId": upload}))

    def _place(self, name: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _explained(self, name: str, error: Exception) -> OSError:
        """The error as one message."""
        from botocore.exceptions import BotoCoreError

        if isinstance(error, ValueError) and not isinstance(error, BotoCoreError):
            return StoreError(f"{self.url}/{name}: AWS_ENDPOINT_URL isn't the URL of a server")
        place = f"{self.url}/{name}".rstrip("/")
        code = code_of(error)
        if code in ("NoSuchKey", "NoSuchUpload", "404"):
            return FileNotFoundError(f"{place} isn't there")
        fix = next((fix for codes, fix in FIXES if code in codes), None)
        try:
            endpoint = redacted(self._client.get().meta.endpoint_url)
        except Exception:  # no client can be made: the error itself says why
            endpoint = "none"
        if fix is None:
            fix = f"{type(error).__name__} {code}".strip()
            if "Credentials" in fix:
                fix = "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            elif passes(error):
                fix = f"no answer for {self._patience:g} s ({fix}): is the server there? See AWS_ENDPOINT_URL"
        return StoreError(f"{place} at {endpoint}: {fix}")


class S3Writer:
    """`Writer` of an object: in parts, several at once; small objects whole."""

    def __init__(self, store: S3, name: str) -> None:
        self._store, self._name = store, name
        self._pool = ThreadPoolExecutor(THREADS)
        self._pending: list[Future[dict[str, object]]] = []
        self._upload: str | None = None
        self._part = bytearray()
        self._size = 0

    def write(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        self._size += len(rest)
        while rest:
            size = PART << (len(self._pending) // PARTS_OF_A_SIZE)
            count = min(len(rest), size - len(self._part))
            self._part += rest[:count]
            rest = rest[count:]
            if len(self._part) == size:
                self._send()

    def close(self) -> None:
        try:
            if self._upload is None:
                self._store.put(self._name, bytes(self._part))
            else:
                if self._part:
                    self._send()
                self._store.complete(self._name, self._upload, [f.result() for f in self._pending], self._size)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def abort(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._upload is not None:
            self._store.abandon(self._name, self._upload)

    def _send(self) -> None:
        """Upload the part that is full, on a thread; of those before it at most THREADS are still on their way."""
        if self._upload is None:
            self._upload = self._store.upload(self._name)
        if len(self._pending) >= THREADS:
            self._pending[-THREADS].result()
        number, data = len(self._pending) + 1, bytes(self._part)
        self._pending.append(self._pool.submit(self._store.upload_part, self._name, self._upload, number, data))
        self._part.clear()


def build_client(read_timeout: float) -> Any:
    """A client that makes each request once."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=min(CONNECT_TIMEOUT, read_timeout),
        read_timeout=read_timeout,
        retries={"total_max_attempts": 1},
        max_pool_connections=MOST_CONNECTIONS,
    )
    return boto3.session.Session().client("s3", config=config)


def views_of(parts: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """The bytes [start, stop) of some memories in a row."""
    views = []
    for part in parts:
        views.append(part[max(0, start) : max(0, stop)])
        start, stop = start - len(part), stop - len(part)
    return [view for view in views if len(view)]


def fill(views: Sequence[memoryview], pieces: Iterable[bytes]) -> int:
    """Copy pieces to memories in a row; how many bytes there were."""
    left, done = list(views), 0
    for piece in pieces:
        rest = memoryview(piece)
        done += len(rest)
        while rest:
            count = min(len(left[0]), len(rest))
            left[0][:count], rest = rest[:count], rest[count:]
            left[0] = left[0][count:]
            if not len(left[0]):
                left.pop(0)
    return done


def passes(error: Exception) -> bool:
    """Whether another try may help."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    if isinstance(error, ClientError):
        status = status_of(error)
        return (status >= 500 and status != 501) or status in (409, 429) or code_of(error) in PASSING
    return isinstance(error, (ConnectionError, HTTPClientError, HTTPError, IncompleteReadError, OSError))


def status_of(error: Exception) -> int:
    """The HTTP status of an answer, 0 where there was none."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Exception) -> str:
    """S3's own word for an error."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def call(method: str, words: dict[str, Any], client: Any) -> Any:
    """A request of a client by its name."""
    return getattr(client, method)(**words)


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
