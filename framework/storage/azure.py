"""Reading from Azure's blob storage, through its own client.

The account comes from AZURE_STORAGE_CONNECTION_STRING, else from AZURE_ACCOUNT_NAME with AZURE_ACCOUNT_ACCESS_KEY, as
mosaicml-streaming names them; without a key from whatever azure-identity finds (a login, the machine's own identity).
The variables are read as the library reads its own settings, by azure-core.
"""

import logging
from typing import Any

from framework.storage.bucket import Fault, Service, Timeouts, UnusableError
from framework.storage.request import PART

CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
ACCOUNT = "AZURE_ACCOUNT_NAME"
KEY = "AZURE_ACCOUNT_ACCESS_KEY"
NO_CREDENTIALS = f"there are no credentials: set {ACCOUNT} and {KEY}, or {CONNECTION}"
WRONG_KEY = f"the key or signature is wrong: set {KEY}, or {CONNECTION}"
FORBIDDEN = "these credentials may not do that: ask for the right to list and read (the role Storage Blob Data Reader)"
# Which of the three it was Azure doesn't say.
REFUSED = f"the account refuses this: is {KEY} right, with the right to list and read, and from this network?"
# Azure's words for errors, with what they mean.
FIXES = (
    (
        ("ContainerNotFound", "ContainerBeingDeleted", "InvalidResourceName"),
        "the container doesn't exist: make it, or name another",
    ),
    (("AuthenticationFailed",), WRONG_KEY),
    (("AuthorizationFailure",), REFUSED),
    (("NoAuthenticationInformation", "PublicAccessNotPermitted"), NO_CREDENTIALS),
    (("AccountIsDisabled",), "the account is disabled: name another"),
    (("InvalidRange",), "the object is shorter than what was asked for"),
    (("BlobArchived",), "the object is archived: rehydrate it"),
)


class Azure:
    """`Cloud` of Azure."""

    bucket = "container"
    variables = f"{ACCOUNT} or {CONNECTION}"

    def connect(self, bucket: str, timeouts: Timeouts) -> Service:
        return AzureContainer(bucket, timeouts)

    def known(self) -> tuple[type[Exception], ...]:
        from azure.core.exceptions import AzureError

        return (AzureError, OSError)

    def judge(self, error: Exception) -> Fault:
        from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, IncompleteReadError

        name = type(error).__name__
        if isinstance(error, HttpResponseError) and not isinstance(error, IncompleteReadError):
            status, code = int(error.status_code or 0), code_of(error)
            fix = next((fix for codes, fix in FIXES if code in codes), None)
            if fix is not None:
                return Fault(fix=fix)
            if not status and isinstance(error, ClientAuthenticationError):  # no request was made
                return Fault(fix=WRONG_KEY if name == "AzureSigningError" else NO_CREDENTIALS)
            if status in (401, 403):
                return Fault(fix=FORBIDDEN)
            passes = status in (0, 408, 429) or (status >= 500 and status != 501)
            return Fault(passes=passes, absent=status == 404, fix=f"status {status} {code}".rstrip())
        # What is left are connections that are refused, time out or break.
        return Fault(passes=True, fix=name)


class AzureContainer:
    """`Service` of one container."""

    def __init__(self, container: str, timeouts: Timeouts) -> None:
        from azure.storage.blob import BlobServiceClient

        words: dict[str, Any] = {
            "connection_timeout": timeouts.connect,
            "read_timeout": timeouts.read,
            "retry_total": 0,
            "max_single_get_size": PART,
            "max_chunk_get_size": PART,
        }
        connection, account = setting(CONNECTION), setting(ACCOUNT)
        if connection:
            try:
                service = BlobServiceClient.from_connection_string(connection, **words)
            except ValueError:
                raise UnusableError(f"{CONNECTION} isn't a connection string: copy it whole from the account") from None
        elif account:
            place = f"https://{account}.blob.core.windows.net"
            service = BlobServiceClient(place, credential=setting(KEY) or find_identity(), **words)
        else:
            raise UnusableError(NO_CREDENTIALS)
        self.endpoint = str(service.url)
        self._container = service.get_container_client(container)

    def get(self, key: str, span: tuple[int, int] | None) -> bytes:
        offset, length = (span[0], span[1] - span[0]) if span else (None, None)
        return self._container.download_blob(key, offset=offset, length=length).readall()

    def list(self, prefix: str, limit: int | None) -> dict[str, int]:
        found = self._container.list_blobs(name_starts_with=prefix, include=["metadata"], results_per_page=limit)
        blobs = found if limit is None else next(found.by_page(), ())
        # An account with a hierarchical namespace lists its folders too.
        return {blob.name: int(blob.size) for blob in blobs if "hdi_isfolder" not in (blob.metadata or {})}


def code_of(error: Exception) -> str:
    """Azure's own word for an error, which the library wraps in an enumeration when it knows it."""
    code = getattr(error, "error_code", None) or ""
    return str(getattr(code, "value", code))


def setting(name: str) -> str:
    """A variable of the environment, empty where it isn't set."""
    from azure.core.settings import PrioritizedSetting

    read: PrioritizedSetting[str, str] = PrioritizedSetting(name.lower(), env_var=name, default="")
    return read()


def find_identity() -> Any:
    """What azure-identity finds when it is first needed."""
    from azure.identity import DefaultAzureCredential

    # It warns at length of each way in which it found none.
    logging.getLogger("azure.identity").setLevel(logging.ERROR)
    return DefaultAzureCredential(retry_total=0)
