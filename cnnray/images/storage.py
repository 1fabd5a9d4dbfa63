"""Files on a local path or under s3://: open, list, write-then-publish. The only code that knows S3.

Credentials, region and endpoint come from the standard AWS variables, profiles and roles. Servers other than
Amazon's (MinIO, Ceph, R2, ...) are reached through `AWS_ENDPOINT_URL`: bucket names then go into the path,
and checksums are only sent where the operation requires them, because such servers refuse the trailing
checksums that AWS's SDKs add by default (Ceph: HTTP 411 MissingContentLength).
"""

import contextlib
import functools
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_LISTING_THREADS = 16
_TRANSFER_THREADS = 8
_DENIED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "Forbidden"}
_NOT_AS_IT_WAS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "NoSuchKey"}
_THROTTLED = {"SlowDown", "503", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests", "429"}
_BODY_PAUSES = (0.2, 1.0, 5.0)
"""Seconds before an answer that broke off is asked for again. (Requests that fail the client itself repeats.)"""
_MISSING = {"NoSuchKey", "NoSuchBucket", "404", "NotFound"}


class StorageError(OSError):
    """Storage that cannot be used; the message is one sentence for the user."""


class ThrottledError(StorageError):
    """Storage that asks for fewer requests, also after several tries."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a listing: its `uri` (absolute path or s3://) and `size` in bytes."""

    uri: str
    size: int


def is_s3(uri: str) -> bool:
    """Whether `uri` names something on S3."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """`uri` as every other function takes it: s3://bucket/key without a trailing slash, or an absolute path.

    Raises:
        StorageError: another scheme, or s3:// without a bucket.
    """
    if is_s3(uri):
        if not _bucket_key(uri)[0]:
            raise StorageError(f"{uri!r} names no bucket; expected s3://BUCKET/PREFIX.")
        return uri.rstrip("/")
    if "://" in uri:
        raise StorageError(f"{uri!r} is neither a local path nor an s3:// address.")
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


# -- S3 --------------------------------------------------------------------------------------------------


def endpoint() -> str | None:
    """The S3 endpoint in use when it is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def cluster_environment() -> dict[str, str]:
    """Variables that processes on other nodes need to reach the same S3: address and region, no secrets."""
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
    return {key: os.environ[key] for key in names if os.environ.get(key)}


@functools.lru_cache(maxsize=1)
def _client() -> "S3Client":
    import boto3  # three seconds of import that local storage does not need
    from botocore.config import Config

    checksums: Any = "when_required" if endpoint() else "when_supported"
    return boto3.session.Session().client(
        "s3",
        config=Config(
            retries={"mode": "standard", "max_attempts": 6},
            max_pool_connections=2 * _LISTING_THREADS,
            connect_timeout=10,
            read_timeout=60,
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
        ),
    )


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


@contextlib.contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _MISSING:
            raise FileNotFoundError(f"{uri} does not exist.") from None
        if code in _DENIED:
            raise PermissionError(f"S3 denies access to {uri} ({code}).") from None
        if code in _THROTTLED:
            raise ThrottledError(f"S3 asks for fewer requests, at {uri} after several tries ({code}).") from None
        hint = ""
        if code in {"MissingContentLength", "NotImplemented", "XAmzContentSHA256Mismatch"}:
            hint = "; this server may need AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        raise StorageError(f"S3 fails at {uri}: {error}{hint}.") from None
    except NoCredentialsError:
        raise PermissionError(
            f"No AWS credentials were found for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "a profile, or an instance role."
        ) from None
    except BotoCoreError as error:
        raise StorageError(f"S3 cannot be reached for {uri}: {error}") from None


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of `uri`, and `uri` as a path in it, for libraries that write through pyarrow."""
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    options: dict[str, Any] = {"retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=6)}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if address := endpoint():
        scheme, _, host = address.rpartition("://")
        options |= {"scheme": scheme or "https", "endpoint_override": host.rstrip("/")}
        region = region or "us-east-1"
    elif not region:
        region = _region_of(_bucket_key(uri)[0])
    return _ArrowS3(region=region, **options), uri.removeprefix("s3://")


@functools.cache
def _region_of(bucket: str) -> str:
    return str(pyarrow.fs.resolve_s3_region(bucket))  # a request


class _ArrowS3(pyarrow.fs.S3FileSystem):
    """S3 for pyarrow that says when to send checksums, in whatever process it is made or arrives.

    AWS's C++ library takes that from the environment alone, and reads it whenever a client is made.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("endpoint_override"):
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        self._options = options
        super().__init__(**options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrow_s3, (self._options,)


def _arrow_s3(options: dict[str, Any]) -> _ArrowS3:
    return _ArrowS3(**options)


# -- reading -----------------------------------------------------------------------------------------------


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The whole of one file, with one request.

    Raises:
        FileNotFoundError, PermissionError, StorageError: each with a sentence that names the file.
        OverflowError: the file is longer than `max_bytes`; nothing was read.
    """
    if not is_s3(uri):
        path = Path(uri)
        if path.exists() and not path.is_file():
            raise StorageError(f"{uri} is not a file.")  # to read a pipe or a device may never end
        with path.open("rb") as file:
            if max_bytes is not None and (size := os.fstat(file.fileno()).st_size) > max_bytes:
                raise OverflowError(f"{size} bytes, at most {max_bytes}")
            return file.read()
    from botocore.exceptions import BotoCoreError

    bucket, key = _bucket_key(uri)
    for pause in (*_BODY_PAUSES, None):
        with _s3_errors(uri):
            answer = _client().get_object(Bucket=bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                if max_bytes is not None and answer["ContentLength"] > max_bytes:
                    raise OverflowError(f"{answer['ContentLength']} bytes, at most {max_bytes}")
                try:
                    return bytes(body.read())
                except BotoCoreError:
                    if pause is None:
                        raise
        time.sleep(pause)
    raise AssertionError


def exists(uri: str) -> bool:
    """Whether `uri` is a file, or a folder with something in it."""
    if not is_s3(uri):
        return Path(uri).exists()
    return is_file(uri) or next(_pages(uri, limit=1)) is not None


def is_file(uri: str) -> bool:
    """Whether `uri` is a file (on S3, an object with this very key)."""
    if not is_s3(uri):
        return Path(uri).is_file()
    bucket, key = _bucket_key(uri)
    if not key:
        return False
    try:
        with _s3_errors(uri):
            _client().head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def folders(root: str) -> list[str]:
    """The folders directly below `root`, sorted; hidden ones (a leading dot) left out."""
    if not is_s3(root):
        found = [entry.path for entry in os.scandir(root) if entry.is_dir()]
    else:
        bucket, key = _bucket_key(root)
        prefix = f"{key}/" if key else ""
        found = []
        with _s3_errors(root):
            pages = _client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
                found += [f"s3://{bucket}/{item['Prefix'].rstrip('/')}" for item in page.get("CommonPrefixes", [])]
    return sorted(path for path in found if not name(path).startswith("."))


def files(root: str) -> list[StoredFile]:
    """All files below `root`, at any depth, sorted by uri; hidden files and folders left out.

    Sub-folders (on S3, prefixes) are listed side by side.
    """
    if not is_s3(root):
        return sorted(_local_files(root), key=lambda file: file.uri)
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        below = [list(_s3_files(root, recursive=False))]
        below += pool.map(lambda folder: list(_s3_files(folder, recursive=True)), folders(root))
    return sorted((file for part in below for file in part), key=lambda file: file.uri)


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


def _s3_files(root: str, *, recursive: bool) -> Iterator[StoredFile]:
    bucket, key = _bucket_key(root)
    for item in _pages(root, delimiter="" if recursive else "/"):
        if item is not None and not item["Key"].endswith("/"):
            relative = item["Key"].removeprefix(f"{key}/" if key else "")
            if not any(part.startswith(".") for part in relative.split("/")):
                yield StoredFile(f"s3://{bucket}/{item['Key']}", item["Size"])


def _pages(root: str, limit: int = 1000, delimiter: str = "") -> Iterator[Any]:
    """The objects below `root`, then one None, so that an empty listing still has an end."""
    bucket, key = _bucket_key(root)
    with _s3_errors(root):
        paginator = _client().get_paginator("list_objects_v2")
        for page in paginator.paginate(
            Bucket=bucket,
            Prefix=f"{key}/" if key else "",
            Delimiter=delimiter,
            PaginationConfig={"PageSize": limit},
        ):
            yield from page.get("Contents", [])
    yield None


# -- writing -----------------------------------------------------------------------------------------------


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file so that a reader sees the old one or the new one, never a part."""
    if is_s3(uri):
        bucket, key = _bucket_key(uri)
        with _s3_errors(uri):
            _client().put_object(Bucket=bucket, Key=key, Body=data)
        return
    path = Path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def version_on_s3(uri: str) -> str | None:
    """What changes whenever a file on S3 is written with other content; None where there is none."""
    bucket, key = _bucket_key(uri)
    try:
        with _s3_errors(uri):
            return str(_client().head_object(Bucket=bucket, Key=key)["ETag"])
    except FileNotFoundError:
        return None


def write_on_s3_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Write a file on S3 only if it is still as it was: of two writers that saw the same version one succeeds.

    Args:
        uri: s3://.
        data: its new content.
        version: what it must still have, by `version_on_s3`; None: it must not exist.

    Returns:
        Its new version, or None where somebody else has written, or deleted, it.
    """
    from botocore.exceptions import ClientError

    bucket, key = _bucket_key(uri)
    # Ceph compares the version without the quotes that it gives it with.
    conditions: list[Any] = (
        [{"IfMatch": version}, {"IfMatch": version.strip('"')}] if version else [{"IfNoneMatch": "*"}]
    )
    with _s3_errors(uri):
        for condition in conditions:
            try:
                return str(_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
            except ClientError as error:
                if error.response["Error"]["Code"] not in _NOT_AS_IT_WAS:
                    raise
    return None


def copy_folder(source: str, target: str, *, last: Iterable[str] = ()) -> None:
    """Copy all files below `source` to `target`; either may be local or on S3.

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
        if is_s3(source) or is_s3(target):
            write_bytes(join(target, relative), read_bytes(found[relative]))
        else:
            _copy_local(Path(found[relative]), Path(target, relative))

    with ThreadPoolExecutor(_TRANSFER_THREADS) as pool:
        list(pool.map(copy, first))
    for relative in last:
        if relative in found:
            copy(relative)


def _copy_local(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def delete_folder(uri: str) -> None:
    """Delete a folder and all that is below it; nothing happens where there is none."""
    if not is_s3(uri):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(uri)
        return
    bucket = _bucket_key(uri)[0]
    for item in list(_pages(uri)):
        if item is not None:
            with _s3_errors(uri):
                _client().delete_object(Bucket=bucket, Key=item["Key"])


def delete_file(uri: str) -> None:
    """Delete one file; nothing happens where there is none."""
    if not is_s3(uri):
        Path(uri).unlink(missing_ok=True)
        return
    bucket, key = _bucket_key(uri)
    with _s3_errors(uri):
        _client().delete_object(Bucket=bucket, Key=key)
