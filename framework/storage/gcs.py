"""Reading from Google Cloud Storage, through its own client.

Credentials are google-auth's own affair (GOOGLE_APPLICATION_CREDENTIALS, gcloud's login, the machine's account), and so
is the endpoint (STORAGE_EMULATOR_HOST). A server spoken to by plain http is an emulator: it is given no credentials.
"""

import logging
from collections.abc import Mapping
from typing import Any

from framework.storage.bucket import Fault, Service, Timeouts, UnusableError

SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
# Seconds that a try to find the machine's own account waits; google-auth makes three, and 3 s of pauses.
METADATA_TIMEOUT = 1.0
NO_CREDENTIALS = (
    "there are no credentials that can be used: set GOOGLE_APPLICATION_CREDENTIALS to a key's JSON file, or run gcloud "
    "auth application-default login"
)
NO_URL = "STORAGE_EMULATOR_HOST isn't the URL of a server"
REFUSED = "Google refuses these credentials: renew the key that GOOGLE_APPLICATION_CREDENTIALS names, or log in again"
FORBIDDEN = (
    "these credentials may not do that: ask for the right to list and get objects (the role Storage Object Viewer)"
)


class GoogleCloud:
    """`Cloud` of Google."""

    bucket = "bucket"
    variables = "STORAGE_EMULATOR_HOST"

    def connect(self, bucket: str, timeouts: Timeouts) -> Service:
        return GoogleBucket(bucket, timeouts)

    def known(self) -> tuple[type[Exception], ...]:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        from urllib3.exceptions import HTTPError

        # An OSError is also whatever requests raises.
        return (GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse, HTTPError, OSError, ValueError)

    def judge(self, error: Exception) -> Fault:
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        from urllib3.exceptions import HTTPError

        name = type(error).__name__
        match error:
            case GoogleAPICallError() | InvalidResponse():
                answer = getattr(error, "response", None)
                status = int(getattr(error, "code", 0) or getattr(answer, "status_code", 0) or 0)
                return of_status(status)
            case TransportError():
                return Fault(passes=True, fix=name)
            case RefreshError():
                return Fault(passes=bool(error.retryable), fix=REFUSED)
            case DefaultCredentialsError():
                return Fault(fix=NO_CREDENTIALS)
            case ValueError() if not isinstance(error, OSError):
                return Fault(fix=NO_CREDENTIALS)
            case ValueError():  # what requests raises for a URL that is none
                return Fault(fix=NO_URL)
            case DataCorruption() | HTTPError() | OSError():
                return Fault(passes=True, fix=name)
        return Fault(fix=name)


class GoogleBucket:
    """`Service` of one bucket."""

    def __init__(self, bucket: str, timeouts: Timeouts) -> None:
        from google.cloud.storage import Client

        self._timeout, self._name = (timeouts.connect, timeouts.read), bucket
        client = Client.create_anonymous_client()
        self.endpoint = str(client.api_endpoint)
        if not self.endpoint.startswith(("http://", "https://")):
            raise UnusableError(NO_URL)
        if self.endpoint.startswith("https://"):
            client = Client(project="none", credentials=find_credentials())
        self._client: Any = client
        self._bucket = client.bucket(bucket)

    def get(self, key: str, span: tuple[int, int] | None) -> bytes:
        start, end = (span[0], span[1] - 1) if span else (None, None)
        blob = self._bucket.blob(key)
        # Raw: an object that is stored compressed is read as it is stored, as its size says.
        data: bytes = blob.download_as_bytes(start=start, end=end, raw_download=True, timeout=self._timeout, retry=None)
        return data

    def list(self, prefix: str, limit: int | None) -> dict[str, int]:
        found = self._client.list_blobs(
            self._name,
            prefix=prefix,
            max_results=limit,
            fields="items(name,size),nextPageToken",
            timeout=self._timeout,
            retry=None,
        )
        return {blob.name: int(blob.size) for blob in found}


class Brief:
    """A request as google-auth makes it for the machine's own account, which gives up early."""

    def __init__(self) -> None:
        from google.auth.transport.requests import Request

        self._request = Request()

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = METADATA_TIMEOUT,
    ) -> Any:
        return self._request(url, method, body, headers, min(timeout, METADATA_TIMEOUT))


def find_credentials() -> Any:
    """This process's credentials. Raises DefaultCredentialsError where there are none."""
    import google.auth

    # It warns of each try to reach a machine's account, where there is none.
    logging.getLogger("google.auth").setLevel(logging.ERROR)
    brief: Any = Brief()
    return google.auth.default(scopes=[SCOPE], request=brief)[0]


def of_status(status: int) -> Fault:
    """What the status of an answer means."""
    if status == 404:
        return Fault(absent=True)
    if status == 416:
        return Fault(fix="the object is shorter than what was asked for")
    if status in (401, 403):
        return Fault(fix=REFUSED if status == 401 else FORBIDDEN)
    return Fault(passes=status in (408, 429) or (status >= 500 and status != 501), fix=f"status {status}")
