"""Files on a local path, Amazon S3 (s3://), Google Cloud Storage (gs://) and Azure Blob Storage (az://).

The only module that knows object stores. Remote files go through obstore, one client for each bucket and process.

- S3: credentials, region and endpoint come from the standard AWS variables, profiles and roles. Other servers (MinIO,
  Ceph, R2, ...) are reached through `AWS_ENDPOINT_URL`.
- Google: `GOOGLE_APPLICATION_CREDENTIALS`, or the machine's service account.
- Azure: az://CONTAINER/KEY in the account `AZURE_STORAGE_ACCOUNT_NAME`; `AZURE_STORAGE_ACCOUNT_KEY`, or an identity.

Every error is a `CnnrayError` whose message names the file. What may pass by itself is an `UnavailableError`, after
several retries.
"""

import contextlib
import errno
import functools
import itertools
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import obstore
import pyarrow.fs
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import ObjectStore, from_url

from cnnray.errors import BadInputError, CnnrayError, PermanentError, TransientError

_SERVICES = {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure"}
_LISTING_THREADS = 16
_PAGE = 1000
_TRANSFER_THREADS = 8
_MULTIPART_BYTES = 16 * 2**20
"""Larger files are uploaded in parts of this size, and appear when all parts have arrived."""
_RETRIES = 5
_OPTIONS: dict[str, Any] = {
    # `read_timeout` is for each read; `timeout` is for a whole request, however large its body.
    "client_options": {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h", "allow_http": True},
    "retry_config": {"max_retries": _RETRIES},
}
_TRANSIENT_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_THROTTLED = {"429", "503", "SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests"}

Version = dict[str, str]
"""Identifies one content of a remote file: to be compared, and handed back to `write_if`."""


class StorageError(PermanentError, OSError):
    """Storage that cannot be used."""


class NotFoundError(PermanentError, FileNotFoundError):
    """A file, folder or bucket that does not exist."""


class DeniedError(PermanentError, PermissionError):
    """Storage that refuses access, or for which there are no credentials."""


class UnavailableError(TransientError, OSError):
    """Storage that does not answer, or fails itself."""


class ThrottledError(UnavailableError):
    """Storage that asks for fewer requests."""


class TooLargeError(BadInputError, OverflowError):
    """A file of more bytes than the caller takes."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing: its `uri` (absolute path or address) and `size` in bytes."""

    uri: str
    size: int


def is_local(uri: str) -> bool:
    """Whether `uri` is a path, and not the address of a remote file."""
    return not uri.startswith(("s3://", "gs://", "az://"))


def absolute(uri: str) -> str:
    """`uri` as every other function takes it: SCHEME://BUCKET/KEY without a trailing slash, or an absolute path.

    Raises:
        StorageError: another scheme, or an address without a bucket.
    """
    if not is_local(uri):
        scheme, bucket, _ = _parts(uri)
        if not bucket:
            raise StorageError(f"{uri!r} names no bucket; expected {scheme}://BUCKET/PREFIX.")
        return uri.rstrip("/")
    if "://" in uri:
        raise StorageError(f"{uri!r} is neither a local path nor an s3://, gs:// or az:// address.")
    return str(Path(uri).expanduser().absolute())


def join(root: str, *parts: str) -> str:
    """`root` with `parts` below it."""
    return "/".join([root.rstrip("/"), *parts])


def name(uri: str) -> str:
    """The last part of a path or key."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def short_name(uri: str) -> str:
    """The last two parts of a path or key, by which a person knows it: runs/1."""
    return "/".join(uri.rstrip("/").split("/")[-2:])


def cluster_environment() -> dict[str, str]:
    """Variables that processes on other nodes need to reach the same storage: address and region, no secrets."""
    names = re.compile(r"AWS_(ENDPOINT_URL(_S3)?|(DEFAULT_)?REGION)|AZURE_STORAGE_(ACCOUNT_NAME|ENDPOINT)")
    return {key: value for key, value in os.environ.items() if value and names.fullmatch(key)}


# -- clients -----------------------------------------------------------------------------------------------


def _parts(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and key."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


_process = 0  # that made the first client
_making = threading.Lock()  # without it several threads would each make a client


def _place(uri: str) -> tuple[ObjectStore, str]:
    """The client for the bucket of `uri`, and the key."""
    global _process
    if (_process := _process or os.getpid()) != os.getpid():
        # obstore's threads do not survive a fork: a call would never return.
        raise RuntimeError(f"{uri} cannot be used in a forked process; start it with 'spawn'.")
    scheme, bucket, key = _parts(uri)
    with _making:
        return _store(scheme, bucket), key


@functools.lru_cache
def _store(scheme: str, bucket: str) -> ObjectStore:
    options = dict(_OPTIONS)
    if scheme == "s3":
        options |= {"region": _region(bucket), "credential_provider": _profile_credentials(bucket)}
        if address := _endpoint():
            options["endpoint"] = address.geturl()
    return from_url(f"{scheme}://{bucket}", **options)


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


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of `uri`, one for each bucket and process, and `uri` as a path in it."""
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    scheme, bucket, _ = _parts(uri)
    with _making, _errors(uri):
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


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn what the system and obstore raise into this module's errors."""
    try:
        yield
    except CnnrayError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{uri} does not exist.") from None
    except OSError as error:
        kind: Any = UnavailableError if error.errno in _TRANSIENT_ERRNOS else StorageError
        kind = DeniedError if isinstance(error, PermissionError) else kind
        raise kind(f"{uri}: {error.strerror or error}.") from None
    except Exception as error:
        if type(error).__module__ == "obstore.exceptions" or str(error).startswith("Could not parse path"):
            raise _remote_error(uri, str(error).partition("\n\nDebug")[0]) from None
        raise


def _remote_error(uri: str, text: str) -> CnnrayError:
    """Most of obstore's errors differ in their text alone, which quotes the server's answer."""
    service = _SERVICES[_parts(uri)[0]]
    status, code = (re.search(pattern, text) for pattern in (r"status code: (\d+)", r"<Code>(\w+)</Code>"))
    says = {found[1] for found in (status, code) if found}
    said = " ".join(re.sub(r"^Generic \S+ error: ", "", text).split())[:300]
    if "/latest/api/token" in text or "/latest/meta-data/iam" in text:
        return _no_credentials(uri)
    if (first := code or status) and says & _DENIED:
        return DeniedError(f"{service} denies access to {uri} ({first[1]}).")
    if "valid authentication" in text:
        return DeniedError(f"The credentials for {uri} cannot be had: {said}")
    if "404" in says:
        return NotFoundError(f"{uri} does not exist.")
    if says & _THROTTLED:
        why = " ".join(sorted(says))
        return ThrottledError(f"{service} asks for fewer requests, at {uri} after several tries ({why}).")
    if not status and "HTTP error" in text:
        return UnavailableError(f"{service} cannot be reached for {uri}: {said}")
    kind = UnavailableError if status and (status[1] == "408" or status[1] >= "500") else StorageError
    return kind(f"{service} fails at {uri}: {said}")


def _no_credentials(uri: str) -> DeniedError:
    return DeniedError(
        f"No AWS credentials were found for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an "
        "instance role."
    )


# -- reading -----------------------------------------------------------------------------------------------


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The whole of one file, with one request; a body that breaks off is read on from there.

    Raises:
        NotFoundError, DeniedError, UnavailableError, StorageError: each with a sentence that names the file.
        TooLargeError: the file is longer than `max_bytes`; nothing was read.
    """
    with _errors(uri):
        if not is_local(uri):
            answer = obstore.get(*_place(uri))
            _check_size(answer.meta["size"], max_bytes)
            return bytes(answer.bytes())
        path = Path(uri)
        if path.exists() and not path.is_file():
            raise StorageError(f"{uri} is not a file.")  # to read a pipe or a device may never end
        with path.open("rb") as file:
            _check_size(os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise TooLargeError(f"{size} bytes, at most {max_bytes}")


def exists(uri: str) -> bool:
    """Whether `uri` is a file, or a folder (in a bucket, one with something in it)."""
    if is_local(uri):
        return Path(uri).exists()
    return is_file(uri) or next(_remote_files(uri, hidden=True), None) is not None


def is_file(uri: str) -> bool:
    """Whether `uri` is a file (in a bucket, an object with this very key)."""
    return Path(uri).is_file() if is_local(uri) else bool(_parts(uri)[2]) and version(uri) is not None


def folders(root: str) -> list[str]:
    """The folders directly below `root`, sorted; hidden ones (a leading dot) left out."""
    with _errors(root):
        found = [item.path for item in os.scandir(root) if item.is_dir()] if is_local(root) else _level(root)[0]
    return sorted(path for path in found if not name(path).startswith("."))


def files(root: str) -> list[StoredFile]:
    """All files below `root`, at any depth, sorted by uri; hidden files and folders left out.

    In a bucket, the folders directly below `root` are listed side by side, unless there are few files or no folders.
    """
    with _errors(root), ThreadPoolExecutor(_LISTING_THREADS) as pool:
        if is_local(root):
            return sorted(_local_files(root), key=lambda file: file.uri)
        found: list[StoredFile] = []
        for number, page in enumerate(_pages(root)):
            found += page
            if number and any("/" in file.uri[len(root) + 1 :] for file in found[:_PAGE]):
                below, found = _level(root)
                for part in pool.map(lambda folder: list(_remote_files(folder)), below):
                    found += part
                break
        # An empty object may be called KEY/ and stand for a folder; obstore gives its name as KEY.
        empty = [file.uri for file in found if not file.size]
        no_files = {uri for uri, is_one in zip(empty, pool.map(is_file, empty), strict=True) if not is_one}
    return sorted((file for file in found if file.uri not in no_files), key=lambda file: file.uri)


def _local_files(root: str) -> Iterator[StoredFile]:
    for entry in os.scandir(root):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _local_files(entry.path)
        elif entry.is_file():
            try:
                entry.path.encode()
            except UnicodeEncodeError:
                raise StorageError(f"The file name {os.fsencode(entry.path)!r} is not UTF-8: rename it.") from None
            yield StoredFile(entry.path, entry.stat().st_size)


def _level(root: str) -> tuple[list[str], list[StoredFile]]:
    """Folders and files directly below a remote `root`, hidden ones left out."""
    store, key = _place(root)
    found = obstore.list_with_delimiter(store, key or None)
    base = root.removesuffix(key).rstrip("/") + "/"
    below = [base + path for path in found["common_prefixes"] if not name(path).startswith(".")]
    return below, list(_stored(root, key, found["objects"], hidden=False))


def _pages(root: str, *, hidden: bool = False) -> Iterator[list[StoredFile]]:
    """Remote files below `root` at any depth, as the pages of a listing arrive."""
    with _errors(root):
        store, key = _place(root)
        for objects in obstore.list(store, key or None, chunk_size=_PAGE):
            yield list(_stored(root, key, objects, hidden=hidden))


def _remote_files(root: str, *, hidden: bool = False) -> Iterator[StoredFile]:
    return itertools.chain.from_iterable(_pages(root, hidden=hidden))


def _stored(root: str, key: str, objects: Iterable[Any], *, hidden: bool) -> Iterator[StoredFile]:
    for item in objects:
        below = item["path"][len(key) :].lstrip("/")  # empty for an object KEY/, which stands for the folder itself
        if below and (hidden or "/." not in f"/{below}"):
            yield StoredFile(join(root, below), item["size"])


# -- writing -----------------------------------------------------------------------------------------------


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file so that a reader sees the old one or the new one, never a part."""
    with _errors(uri):
        if not is_local(uri):
            obstore.put(*_place(uri), data, chunk_size=_MULTIPART_BYTES)
            return
        with _published(Path(uri)) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def version(uri: str) -> Version | None:
    """What changes whenever a remote file is written with other content; None where there is no such file."""
    try:
        with _errors(uri):
            return _version(obstore.head(*_place(uri)))
    except NotFoundError:
        return None


def _version(answer: Any) -> Version:
    return {key: answer[key] for key in ("e_tag", "version") if answer[key]}


def write_if(uri: str, data: bytes, expected: Version | None) -> Version | None:
    """Write a remote file only if it is still as it was: of two writers that saw the same version one succeeds.

    Args:
        uri: of a remote file.
        data: its new content.
        expected: the version that it must still have; None: it must not exist.

    Returns:
        Its new version, or None where somebody else has written, or deleted, it.
    """
    modes: list[Any] = ["create"]
    if expected:
        # Ceph compares the ETag without the quotes that it gives it with.
        modes = [expected, expected | {"e_tag": expected["e_tag"].strip('"')}]
    try:
        for mode in modes:
            with _errors(uri), contextlib.suppress(AlreadyExistsError, PreconditionError):
                return _version(obstore.put(*_place(uri), data, mode=mode))
    except NotFoundError:
        if not expected:
            raise  # the bucket does not exist
    return None


def copy_folder(source: str, target: str, *, last: Iterable[str] = ()) -> None:
    """Copy all files below `source` to `target`; either may be local or remote.

    Args:
        source: a folder.
        target: a folder; files of the same name are replaced.
        last: names of files that are copied after all the others, in this order: where a reader takes the
            presence of a file for the completeness of the folder.
    """
    last = list(last)
    found = {file.uri.removeprefix(source.rstrip("/") + "/"): file.uri for file in files(source)}
    first = [relative for relative in found if relative not in last]

    def copy(relative: str) -> None:
        if not (is_local(source) and is_local(target)):
            write_bytes(join(target, relative), read_bytes(found[relative]))
            return
        with _errors(found[relative]), _published(Path(target, relative)) as temporary:
            shutil.copyfile(found[relative], temporary)

    with ThreadPoolExecutor(_TRANSFER_THREADS) as pool:
        list(pool.map(copy, first))
    for relative in last:
        if relative in found:
            copy(relative)


def delete_folder(uri: str) -> None:
    """Delete a folder and all that is below it; nothing happens where there is none."""
    with _errors(uri), contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            shutil.rmtree(uri)
        elif keys := [_parts(file.uri)[2] for file in _remote_files(uri, hidden=True)]:
            obstore.delete(_place(uri)[0], keys)


def delete_file(uri: str) -> None:
    """Delete one file; nothing happens where there is none."""
    with _errors(uri), contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            Path(uri).unlink()
        else:
            obstore.delete(*_place(uri))
