"""Clients for object stores (Amazon S3, Google Cloud Storage, Azure Blob Storage), and classes for their errors.

Each process has one obstore client and one pyarrow filesystem for each bucket. Only `storage` uses this module.
"""

import contextlib
import errno
import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import pyarrow.fs
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from cnnray.errors import BadInputError, CnnrayError, PermanentError, TransientError

Result = TypeVar("Result")

_SERVICES = {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure"}
QUICK_SECONDS = 4.0
"""Longest time that a request of a quick client takes."""
_RETRIES = 5
_OPTIONS: dict[str, Any] = {
    # `read_timeout` is for each read; `timeout` is for a whole request, however large its body.
    "client_options": {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h", "allow_http": True},
    "retry_config": {"max_retries": _RETRIES, "retry_timeout": timedelta(minutes=2)},
}
_QUICK_OPTIONS: dict[str, Any] = {
    "client_options": {"connect_timeout": "2s", "timeout": f"{QUICK_SECONDS:g}s", "allow_http": True},
    "retry_config": {"max_retries": 0},
}
_TRANSIENT_ERRNOS = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN, errno.ECONNRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip
_BAD_FILE_ERRNOS = {errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EFBIG}
_DENIED = {"403", "AccessDenied"}
_BAD_CREDENTIALS = {
    "401", "AuthenticationFailed", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed",
    "SignatureDoesNotMatch", "TokenRefreshRequired",
}  # fmt: skip
_THROTTLED = {"429", "503", "SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests"}


class StorageError(PermanentError, OSError):
    """Storage that cannot be used."""


class NotFoundError(PermanentError, FileNotFoundError):
    """A file, folder or bucket that does not exist."""


class NoBucketError(NotFoundError):
    """A bucket that does not exist."""


class DeniedError(PermanentError, PermissionError):
    """Storage that refuses access to a file or bucket."""


class CredentialsError(DeniedError):
    """Credentials that are missing, wrong or expired: no file can be read with them."""


class UnavailableError(TransientError, OSError):
    """Storage that does not answer, or fails itself."""


class ThrottledError(UnavailableError):
    """Storage that asks for fewer requests."""


class TooLargeError(BadInputError, OverflowError):
    """A file of more bytes than the caller takes."""


class BadFileError(BadInputError, OSError):
    """A path that is not a file, or a file whose content is damaged."""


def is_local(uri: str) -> bool:
    """Whether `uri` is a path, and not the address of a remote file."""
    return not uri.startswith(("s3://", "gs://", "az://"))


def cluster_environment() -> dict[str, str]:
    """Variables that processes on other nodes need to reach the same storage, without secrets."""
    names = re.compile(
        r"AWS_(ENDPOINT_URL(_S3)?|(DEFAULT_)?REGION)|AZURE_STORAGE_(ACCOUNT_NAME|ENDPOINT)|CNNRAY_STORAGE_RETRY_SECONDS"
    )
    return {key: value for key, value in os.environ.items() if value and names.fullmatch(key)}


def split_address(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and key."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


_process = 0  # that made the first client
_making = threading.Lock()  # without it several threads would each make a client


def locate(uri: str, *, quick: bool = False) -> tuple[ObjectStore, str]:
    """The client for the bucket of `uri`, and the key.

    Args:
        uri: a remote file.
        quick: whether a request is given up after `QUICK_SECONDS`, without another try.
    """
    global _process
    if (_process := _process or os.getpid()) != os.getpid():
        # obstore's threads do not survive a fork: a call would never return.
        raise RuntimeError(f"{uri} cannot be used in a forked process; start it with 'spawn'.")
    scheme, bucket, key = split_address(uri)
    with _making:
        return _store(scheme, bucket, quick), key


@functools.lru_cache
def _store(scheme: str, bucket: str, quick: bool) -> ObjectStore:
    options = dict(_QUICK_OPTIONS if quick else _OPTIONS)
    if scheme == "s3":
        options |= {"region": _region(bucket), "credential_provider": _profile_credentials(bucket)}
        if address := _endpoint():
            options["endpoint"] = address.geturl()
    return from_url(f"{scheme}://{bucket}", **options)


def repeated(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a function of obstore, again where an answer broke off, which its clients repeat only within files."""
    for attempt in range(_RETRIES):
        try:
            return function(*arguments, **options)
        except BaseError as error:
            if "response body error" not in str(error):
                raise
            time.sleep(0.1 * 2**attempt)
    return function(*arguments, **options)


def request(
    function: Callable[..., Result], uri: str, *arguments: Any, quick: bool = False, **options: Any
) -> Result:
    """Call a function of obstore for a remote file, `repeated` unless it is to be quick (see `locate`)."""
    place = locate(uri, quick=quick)
    return function(*place, *arguments, **options) if quick else repeated(function, *place, *arguments, **options)


def _endpoint() -> SplitResult | None:
    """The S3 endpoint in use when it is not Amazon's."""
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return urlsplit(address.rstrip("/") if "://" in address else f"https://{address}") if address else None


@functools.lru_cache
def _region(bucket: str) -> str:
    given = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return given or ("us-east-1" if _endpoint() else pyarrow.fs.resolve_s3_region(bucket))  # a request


def _profile_credentials(bucket: str) -> Callable[[], Any] | None:
    """Gives the current keys of AWS's configuration files (keys, roles, SSO, processes), which obstore does not read.

    None where obstore finds keys itself: in the environment, by a web identity, of a container or an instance.
    """
    config = os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")
    shared = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    has_profiles = os.environ.get("AWS_PROFILE") or any(Path(p).expanduser().exists() for p in (config, shared))
    if os.environ.get("AWS_ACCESS_KEY_ID") or not has_profiles:
        return None
    import botocore.session  # takes half a second

    credentials = botocore.session.get_session().get_credentials()
    if credentials is None:
        raise _no_credentials(f"s3://{bucket}")

    def current() -> dict[str, Any]:
        # Asked for with every request: botocore renews keys in time, and obstore would keep these until `expires_at`.
        keys = credentials.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key, "secret_access_key": keys.secret_key, "token": keys.token,
            "expires_at": datetime.now(UTC),
        }  # fmt: skip

    return current


def deltalake_options(uri: str) -> dict[str, str]:
    """Options of the library deltalake, which reads the environment itself, for the storage of `uri`."""
    scheme, bucket, _ = split_address(uri)
    if is_local(uri) or scheme != "s3":
        return {}
    options = {"aws_region": _region(bucket), "aws_conditional_put": "etag", "allow_http": "true"}
    if address := _endpoint():
        options["aws_endpoint"] = address.geturl()
    if current := _profile_credentials(bucket):
        keys = current()
        options |= {"aws_access_key_id": keys["access_key_id"], "aws_secret_access_key": keys["secret_access_key"]}
        options |= {"aws_session_token": keys["token"]} if keys["token"] else {}
    return options


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of `uri`, one for each bucket and process, and `uri` as a path in it."""
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    scheme, bucket, _ = split_address(uri)
    with _making, translated_errors(uri):
        return _arrow_filesystem(scheme, bucket), uri.partition("://")[2]


@functools.lru_cache
def _arrow_filesystem(scheme: str, bucket: str) -> pyarrow.fs.FileSystem:
    if scheme == "gs":
        return pyarrow.fs.GcsFileSystem(retry_time_limit=timedelta(minutes=1))
    if scheme == "az":
        given = urlsplit(os.environ.get("AZURE_STORAGE_ENDPOINT", ""))
        emulator = {f"{kind}_storage_authority": given.netloc for kind in ("blob", "dfs")}
        emulator |= {f"{kind}_storage_scheme": given.scheme for kind in ("blob", "dfs")}
        return pyarrow.fs.AzureFileSystem(
            account_name=os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", ""),
            account_key=os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"),
            **(emulator if given.path.strip("/") else {}),  # an emulator has the account in its path
        )
    return _ArrowS3(bucket)


class _ArrowS3(pyarrow.fs.S3FileSystem):
    """S3 for pyarrow; pickled, it becomes that of the process where it arrives."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        options: dict[str, Any] = {}
        if address := _endpoint():
            options = {"scheme": address.scheme, "endpoint_override": address.netloc + address.path}
            # Other servers refuse the trailing checksums of AWS's C++ library (Ceph: HTTP 411 MissingContentLength),
            # which takes this from the environment alone.
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_RETRIES + 1)
        super().__init__(region=_region(bucket), retry_strategy=retries, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrow_filesystem, ("s3", self._bucket)


# -- errors ------------------------------------------------------------------------------------------------


_ARROW_CREDENTIALS = "ExpiredToken|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH|status 401"
_ARROW_ERRORS: tuple[tuple[type[DeniedError | UnavailableError], str, str], ...] = (
    (CredentialsError, _ARROW_CREDENTIALS, "does not accept the credentials for"),
    (DeniedError, "ACCESS_DENIED|HTTP status 403", "denies access to"),
    (ThrottledError, "SLOW_DOWN|THROTTLING|HTTP status (429|503)", "asks for fewer requests, at"),
    (UnavailableError, "NETWORK_CONNECTION|SERVICE_UNAVAILABLE|HTTP status 5[0-9][0-9]", "does not answer, at"),
)
"""The class for an error of pyarrow's filesystems, by a pattern in its text: nothing else tells them apart."""
_DAMAGED = "thrift|[Cc]orrupt|[Dd]ecompress"
"""A pattern in the text of an OSError that pyarrow raises for damaged Parquet."""


@contextlib.contextmanager
def translated_errors(uri: str) -> Iterator[None]:
    """Turn the errors of the system, of obstore and of pyarrow's filesystems into this module's."""
    try:
        yield
    except CnnrayError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{uri} does not exist.") from None
    except OSError as error:
        raise _system_error(uri, error) from None
    except Exception as error:
        if type(error).__module__ == "obstore.exceptions" or str(error).startswith("Could not parse path"):
            raise remote_error(uri, str(error).partition("\n\nDebug")[0]) from None
        raise


def _system_error(uri: str, error: OSError) -> CnnrayError:
    text = " ".join(str(error).split())[:300]
    if error.errno is None:
        if not is_local(uri):
            service = _SERVICES[split_address(uri)[0]]
            for kind, pattern, sentence in _ARROW_ERRORS:
                if match := re.search(pattern, text):
                    return kind(f"{service} {sentence} {uri} ({match[0]}).")
        damaged = is_local(uri) or re.search(_DAMAGED, text)
        return BadFileError(f"{uri} is damaged: {text}") if damaged else StorageError(f"{uri}: {text}.")
    sentence = f"{uri}: {error.strerror or text}."
    if error.errno in _TRANSIENT_ERRNOS:
        return UnavailableError(sentence)
    if isinstance(error, PermissionError):
        return DeniedError(sentence)
    return BadFileError(sentence) if error.errno in _BAD_FILE_ERRNOS else StorageError(sentence)


def remote_error(uri: str, text: str) -> CnnrayError:
    """The error for an obstore exception, by its text, which quotes the server's answer; most have no own class."""
    service = _SERVICES[split_address(uri)[0]]
    status, code = (re.search(pattern, text) for pattern in (r"status code: (\d+)", r"<Code>(\w+)</Code>"))
    codes = {match[1] for match in (status, code) if match}
    message = " ".join(re.sub(r"^Generic \S+ error: ", "", text).split())[:300]
    if "/latest/api/token" in text or "/latest/meta-data/iam" in text:
        return _no_credentials(uri)
    first = code or status
    if first and codes & _BAD_CREDENTIALS:
        return CredentialsError(f"{service} does not accept the credentials for {uri} ({first[1]}).")
    if first and codes & _DENIED:
        return DeniedError(f"{service} denies access to {uri} ({first[1]}).")
    if "valid authentication" in text:
        return CredentialsError(f"The credentials for {uri} cannot be obtained: {message}")
    if "NoSuchBucket" in codes:
        return NoBucketError(f"The bucket of {uri} does not exist.")
    if "404" in codes:
        return NotFoundError(f"{uri} does not exist.")
    if codes & _THROTTLED:
        why = " ".join(sorted(codes))
        return ThrottledError(f"{service} asks for fewer requests, at {uri} after several tries ({why}).")
    if not status and "HTTP error" in text:
        return UnavailableError(f"{service} cannot be reached for {uri}: {message}")
    kind = UnavailableError if status and (status[1] == "408" or status[1] >= "500") else StorageError
    return kind(f"{service} fails at {uri}: {message}")


def _no_credentials(uri: str) -> CredentialsError:
    return CredentialsError(
        f"No AWS credentials were found for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an "
        "instance role."
    )
