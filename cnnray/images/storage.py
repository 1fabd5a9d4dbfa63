"""Files on a local path, Amazon S3 (s3://), Google Cloud Storage (gs://) and Azure Blob Storage (az://).

The only module through which the package reads and writes storage. Remote files go through obstore (see
`object_stores`).

- S3: credentials, region and endpoint come from the standard AWS variables, profiles and roles. Other servers (MinIO,
  Ceph, R2, ...) are reached through `AWS_ENDPOINT_URL`.
- Google: `GOOGLE_APPLICATION_CREDENTIALS`, or the machine's service account.
- Azure: az://CONTAINER/KEY in the account `AZURE_STORAGE_ACCOUNT_NAME`; `AZURE_STORAGE_ACCOUNT_KEY`, or an identity.

Every error is a `CnnrayError` whose message names the file. Trouble that may pass by itself is retried several times,
and then raised as `UnavailableError`.
"""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pyarrow
import pyarrow.parquet
from obstore.exceptions import AlreadyExistsError, PreconditionError

from cnnray.images.object_stores import BadFileError as BadFileError
from cnnray.images.object_stores import CredentialsError as CredentialsError
from cnnray.images.object_stores import DeniedError as DeniedError
from cnnray.images.object_stores import NoBucketError as NoBucketError
from cnnray.images.object_stores import NotFoundError as NotFoundError
from cnnray.images.object_stores import StorageError as StorageError
from cnnray.images.object_stores import ThrottledError as ThrottledError
from cnnray.images.object_stores import TooLargeError as TooLargeError
from cnnray.images.object_stores import UnavailableError as UnavailableError
from cnnray.images.object_stores import arrow_filesystem as arrow_filesystem
from cnnray.images.object_stores import cluster_environment as cluster_environment
from cnnray.images.object_stores import deltalake_options as deltalake_options
from cnnray.images.object_stores import is_local as is_local
from cnnray.images.object_stores import locate, repeated, request, split_address
from cnnray.images.object_stores import remote_error as remote_error
from cnnray.images.object_stores import translated_errors as translated_errors
from cnnray.images.tree import StoredFile as StoredFile
from cnnray.images.tree import folders as folders
from cnnray.images.tree import remote_pages
from cnnray.images.tree import stored_file as stored_file
from cnnray.images.tree import walk as walk

_TRANSFER_THREADS = 8
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Of file systems such as SMB, exFAT and buckets that are mounted."""
_CLAIM_SECONDS = 10.0
"""After which the empty file of a writer is that of one that was killed."""
_MULTIPART_BYTES = 16 * 2**20
"""Larger files are uploaded in parts of this size, and appear when all parts have arrived."""

Version = dict[str, str]
"""Identifies one content of a remote file. Versions can be compared, and passed to `write_if`."""


def absolute(uri: str) -> str:
    """`uri` as every other function takes it: SCHEME://BUCKET/KEY without a trailing slash, or an absolute path.

    Raises:
        StorageError: another scheme, or an address without a bucket.
    """
    if not is_local(uri):
        scheme, bucket, _ = split_address(uri)
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


def root(uri: str) -> str:
    """SCHEME://BUCKET of a remote file; / for a local path."""
    return "/" if is_local(uri) else "{}://{}".format(*split_address(uri))


def short_name(uri: str) -> str:
    """The last two parts of a path or key, by which a person knows it: runs/1."""
    return "/".join(uri.rstrip("/").split("/")[-2:])


# -- reading -----------------------------------------------------------------------------------------------


def read_bytes(uri: str, max_bytes: int | None = None, *, quick: bool = False) -> bytes:
    """Read one file with one request. If the body breaks off, reading continues from there.

    Args:
        uri: the file.
        max_bytes: see below.
        quick: see `object_stores.locate`.

    Raises:
        NotFoundError, DeniedError, BadFileError, UnavailableError, StorageError: each with a sentence that names the
            file.
        TooLargeError: the file is longer than `max_bytes`; nothing was read.
    """
    with translated_errors(uri):
        if not is_local(uri):
            answer = request(obstore.get, uri, quick=quick)
            _check_size(answer.meta["size"], max_bytes)
            return bytes(answer.bytes())
        path = Path(uri)
        if path.exists() and not path.is_file():
            raise BadFileError(f"{uri} is not a file.")  # reading a pipe or a device may never end
        with path.open("rb") as file:
            _check_size(os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise TooLargeError(f"{size} bytes, at most {max_bytes}")


def parse_parquet(data: bytes, columns: list[str] | None = None) -> pyarrow.Table:
    """The table in a Parquet file that was read, or some of its columns.

    `pyarrow.parquet.read_table`, and `ParquetFile.read` with threads, leave tasks behind that release `data` a moment
    later in a thread of Arrow. If the interpreter is ending by then, the process aborts.

    Raises:
        pyarrow.ArrowException: the file is damaged.
        KeyError: it lacks a column.
    """
    table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read(columns, use_threads=False)
    return table.select(columns) if columns else table


def exists(uri: str) -> bool:
    """Whether `uri` is a file, or a folder (in a bucket, one with something in it)."""
    if is_local(uri):
        return Path(uri).exists()
    return is_file(uri) or any(remote_pages(uri, hidden=True))


def is_file(uri: str) -> bool:
    """Whether `uri` is a file (in a bucket, an object with this very key)."""
    return Path(uri).is_file() if is_local(uri) else bool(split_address(uri)[2]) and version(uri) is not None


def files(root: str) -> list[StoredFile]:
    """All files below `root` (see `walk`), sorted by uri."""
    return list(walk(root))


# -- writing -----------------------------------------------------------------------------------------------


_guards: dict[str, Callable[[], None]] = {}


@contextlib.contextmanager
def guarded(folder: str, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each write and each deletion in a folder by this process, for as long as the context lasts.

    Args:
        folder: a folder that no other context guards.
        check: raises an error if nothing may be written any more.
    """
    _guards[folder] = check
    try:
        yield
    finally:
        del _guards[folder]


def _check_guards(uri: str) -> None:
    for folder, check in list(_guards.items()):
        if f"{uri}/".startswith(f"{folder}/"):
            check()


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file so that a reader sees the old one or the new one, never a part."""
    _check_guards(uri)
    with translated_errors(uri):
        if not is_local(uri):
            request(obstore.put, uri, data, chunk_size=_MULTIPART_BYTES)
            return
        with _temporary(Path(uri)) as temporary:
            _write_durably(temporary, data)
            temporary.replace(uri)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A hidden path beside `path`, whose folder is made; what is there at the end is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def version(uri: str, *, quick: bool = False) -> Version | None:
    """The version of a remote file, which changes whenever its content does; None if there is no such file.

    Args:
        uri: a remote file.
        quick: see `object_stores.locate`.
    """
    try:
        with translated_errors(uri):
            return _version(request(obstore.head, uri, quick=quick))
    except NotFoundError:
        return None


def _version(answer: Any) -> Version:
    return {key: answer[key] for key in ("e_tag", "version") if answer[key]}


def write_if(uri: str, data: bytes, expected: Version | None, *, quick: bool = False) -> Version | None:
    """Write a remote file only if it is still as it was: of two writers that saw the same version one succeeds.

    Args:
        uri: a remote file.
        data: its new content.
        expected: the version that it must still have; None: it must not exist.
        quick: see `object_stores.locate`.

    Returns:
        Its new version; None if another writer has changed or deleted it.
    """
    modes: list[Any] = ["create"]
    if expected:
        # Ceph compares the ETag without the quotes that it gives it with.
        modes = [expected, expected | {"e_tag": expected["e_tag"].strip('"')}]
    try:
        for mode in modes:
            with translated_errors(uri), contextlib.suppress(AlreadyExistsError, PreconditionError):
                return _version(request(obstore.put, uri, data, mode=mode, quick=quick))
    except NotFoundError:
        if not expected:
            raise  # the bucket does not exist
    return None


def create(uri: str, data: bytes) -> bool:
    """Write one file whole, only if there is none by that name: of several writers one succeeds.

    Returns:
        Whether this call has written it. False also where the answer to a request that wrote it was lost.

    Raises:
        OSError: storage that cannot be written.
    """
    _check_guards(uri)
    if not is_local(uri):
        try:
            created = write_if(uri, data, None) is not None
        except UnavailableError:  # obstore does not repeat such a request when it gets no answer
            created = False
        # S3 refuses both of two writers at the same time (409), which obstore does not tell from a file that exists.
        return created or (not is_file(uri) and write_if(uri, data, None) is not None)
    path = Path(uri)
    if path.exists() and path.stat().st_size:
        return False
    with translated_errors(uri), _temporary(path) as temporary:
        _write_durably(temporary, data)
        try:
            os.link(temporary, path)  # fails if the name is taken
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _claim(path, temporary)
        return True


def _claim(path: Path, temporary: Path) -> bool:
    """Rename `temporary` unless `path` exists. A writer that is at work, or was killed here, has an empty file."""
    try:
        path.open("xb").close()
    except FileExistsError:
        until = time.monotonic() + _CLAIM_SECONDS
        while time.monotonic() < until:
            if path.stat().st_size:
                return False
            time.sleep(0.01)
    try:
        temporary.replace(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path of a file or folder; a copy from a bucket is deleted when the context ends."""
    if is_local(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="cnnray-copy-") as folder:
        path = Path(folder, name(uri))
        if is_file(uri):
            path.write_bytes(read_bytes(uri))
        else:
            copy_folder(uri, str(path))
        yield path


def copy_folder(source: str, target: str, *, last: Iterable[str] = (), skip: Iterable[str] = ()) -> None:
    """Copy all files below `source` to `target`; either may be local or remote.

    Args:
        source: a folder.
        target: a folder; files of the same name are replaced.
        last: names of files that are copied after all the others, in this order: where a reader takes the
            presence of a file for the completeness of the folder.
        skip: names of files that are not copied.
    """
    _check_guards(target)
    last, skip = list(last), set(skip)
    uris = {file.uri.removeprefix(source.rstrip("/") + "/"): file.uri for file in files(source)}
    first = [relative for relative in uris if relative not in last and relative not in skip]

    def copy(relative: str) -> None:
        if not (is_local(source) and is_local(target)):
            write_bytes(join(target, relative), read_bytes(uris[relative]))
            return
        with translated_errors(uris[relative]), _temporary(Path(target, relative)) as temporary:
            shutil.copyfile(uris[relative], temporary)
            temporary.replace(Path(target, relative))

    with ThreadPoolExecutor(_TRANSFER_THREADS) as pool:
        list(pool.map(copy, first))
    for relative in last:
        if relative in uris:
            copy(relative)


def delete_folder(uri: str) -> None:
    """Delete a folder and all that is below it; nothing happens where there is none."""
    _check_guards(uri)
    with translated_errors(uri), contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            shutil.rmtree(uri)
            return
        for page in remote_pages(uri, hidden=True):
            repeated(obstore.delete, locate(uri)[0], [split_address(file.uri)[2] for file in page])


def delete_file(uri: str) -> None:
    """Delete one file; nothing happens where there is none."""
    _check_guards(uri)
    with translated_errors(uri), contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            Path(uri).unlink()
        else:
            request(obstore.delete, uri)
