"""Sources without a server: URLs, credentials that are missing or refused, tries, ranges, and the client of a fork."""

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.storage import request
from framework.storage.bucket import Bucket
from framework.storage.directory import Directory
from framework.storage.gcs import of_status
from framework.storage.request import OfProcess, StoreError, persist, read_ranges, redacted
from framework.storage.s3 import S3
from framework.storage.storage import open_source, open_storage

pytestmark = pytest.mark.alone  # waits are timed

AZURE = ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_ACCOUNT_NAME", "AZURE_ACCOUNT_ACCESS_KEY")


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*AZURE, "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))


def test_urls() -> None:
    assert isinstance(open_source("s3://b/x"), S3)
    assert isinstance(open_source("some/directory"), Directory)
    for url in ("gs://b", "gs://b/x/y/", "az://c/x"):
        source = open_source(url)
        assert isinstance(source, Bucket) and source.url == url.rstrip("/")
        with pytest.raises(ValueError, match=r"can be read, but checkpoints are kept .* s3://bucket/prefix"):
            open_storage(url)
    for url in ("gs://", "az:///x", "az://key:hunter2@account/x", "az://c/x?sig=hunter2"):
        with pytest.raises(ValueError, match=r"://(bucket|container)/prefix, with credentials in") as refusal:
            open_source(url)
        assert "hunter2" not in str(refusal.value)
    for url in ("https://me:hunter2@host/x", "abfs://c/x", "azure://c/x"):
        with pytest.raises(ValueError, match="name a directory, s3://") as refusal:
            open_source(url)
        assert "hunter2" not in str(refusal.value)


def refused(url: str, part: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match=part) as refusal:
        open_source(url).check_readable()
    text = str(refusal.value)
    assert time.monotonic() - begin < 10
    assert text.startswith(url) and "\n" not in text and "hunter2" not in text


def test_no_credentials() -> None:
    refused("gs://b/x", "no credentials .* GOOGLE_APPLICATION_CREDENTIALS")
    refused("az://c/x", "no credentials: set AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY")


@pytest.mark.parametrize("text", ["", "hunter2", '{"type": "service_account", "private_key": "hunter2"}', None])
def test_a_key_of_google_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "key.json").write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    refused("gs://b/x", "no credentials that can be used")


@pytest.fixture
def token_server() -> Iterator[str]:
    """It gives no token, as Google's does for a key that was deleted."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(400)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"error": "invalid_grant", "error_description": "Invalid JWT hunter2"}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/token"
        server.shutdown()


def test_a_key_that_google_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token_server: str) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "a@hunter2", "private_key": key.decode()}
    (tmp_path / "key.json").write_text(json.dumps(account | {"token_uri": token_server, "private_key_id": "1"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    refused("gs://b/x", "Google refuses these credentials: renew the key")


def test_endpoints_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("nonsense", "http://", "http://a:b:c"):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", text)
        refused("gs://b/x", "STORAGE_EMULATOR_HOST isn't the URL of a server")


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"AZURE_STORAGE_CONNECTION_STRING": "hunter2"}, "STRING isn't a connection string"),
        ({"AZURE_ACCOUNT_NAME": "a", "AZURE_ACCOUNT_ACCESS_KEY": "hunter2"}, "the key or signature is wrong"),
    ],
)
def test_accounts_of_azure_that_are_none(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], part: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused("az://c/x", part)


def test_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of patience has the pauses 0.2 and 0.4; a third, of 0.8, would end after it."""
    now, pauses, tried = [100.0], [], []
    monkeypatch.setattr(request.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(request.time, "sleep", lambda pause: (pauses.append(pause), now.__setitem__(0, now[0] + pause)))

    def fail() -> None:
        tried.append(1)
        raise TimeoutError("hunter2")

    def explained(error: Exception) -> OSError:
        return StoreError("explained")

    with pytest.raises(StoreError, match="explained") as refusal:
        persist(fail, seconds=1, known=(OSError,), passes=lambda error: True, explained=explained)
    assert pauses == [0.2, 0.4] and len(tried) == 3 and refusal.value.__suppress_context__
    with pytest.raises(StoreError, match="explained"):
        persist(fail, seconds=1, known=(OSError,), passes=lambda error: False, explained=explained)
    assert len(tried) == 4
    with pytest.raises(TimeoutError):  # not the library's: a fault of the program
        persist(fail, seconds=1, known=(ValueError,), passes=lambda error: True, explained=explained)
    assert len(tried) == 5


def test_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "PART", 4)
    data, asked = bytes(range(20)), []

    def get(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    parts = [memoryview(bytearray(n)) for n in (1, 0, 9, 3)]
    read_ranges("place", 5, parts, get)
    assert b"".join(parts) == data[5:18] and sorted(asked) == [(5, 9), (9, 13), (13, 17), (17, 18)]
    with pytest.raises(StoreError, match="place ends at byte 20, more was asked for"):
        read_ranges("place", 15, [memoryview(bytearray(6))], get)


def test_a_fork_has_its_own_client() -> None:
    own = OfProcess(os.getpid)
    assert own.get() == own.get() == os.getpid()
    child = os.fork()
    if child == 0:
        os._exit(0 if own.get() == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_may_be_secret_in_an_endpoint() -> None:
    assert redacted("https://a.blob.core.windows.net/?sv=1&sig=x@y/z") == "https://a.blob.core.windows.net/"
    assert redacted("http://me:pass@word@host:1/x") == "http://host:1/x"


def test_statuses_of_google() -> None:
    assert [status for status in range(400, 600) if of_status(status).passes] == [
        *(408, 429, 500),
        *range(502, 600),
    ]
