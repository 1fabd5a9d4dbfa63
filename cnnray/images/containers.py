"""Files that hold many images: Parquet and tar. Each image has a uri of its own, and neighbours are read together.

- In Parquet (see `parquet`), `FILE.parquet#GROUP-ROW`: the index of the row group in the file, and of the row in the
  group.
- In tar shards, as WebDataset writes them, `FILE.tar#OFFSET-SIZE-NAME`: offset and size of the member in bytes, and
  its name. Members that follow one another are read together.

Numbers are padded with zeros, so that uris sort in the order of the file.
"""

import contextlib
import functools
import itertools
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from cnnray.errors import CnnrayError, PermanentError, TransientError
from cnnray.images import parquet, storage
from cnnray.images.decode import EXTENSIONS, MAX_BYTES, BadImage
from cnnray.images.retries import Attempts

log = logging.getLogger(__name__)

ENDINGS = (".parquet", ".tar")

_TAR_ADDRESS = re.compile(r"(.+\.tar)#(\d{12,})-(\d{9,})-(.+)", re.IGNORECASE | re.DOTALL)
_TAR_COLUMNS = pa.schema([(name, pa.string()) for name in ("uri", "key", "label")])
_ROWS_OF_A_SLICE = 2**16
_BYTES_AT_ONCE = 8 * 2**20
"""Most bytes that one request reads, unless a single image is larger."""
_GAP = _BYTES_AT_ONCE // 8
"""Most bytes between two members of a tar file that one request reads."""
_OPEN_FILES = 64
"""Most tar files of buckets that stay open."""
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (FileNotFoundError, "missing"),
    (PermissionError, "access denied"),
    (OverflowError, "too large"),
)
"""The reason of an image that cannot be read by the class of the error; all other errors give `unreadable`."""

Source = str | bytes | CnnrayError
"""Where an image comes from: the uri of its file, its encoded bytes, or the error of reading them."""


def containing_file(uri: str) -> str:
    """The file that is opened to read an image: the image's own, or the container that holds it."""
    return _container(uri)[0] or uri


def is_inside(uri: str) -> bool:
    """Whether an image is inside a container."""
    return _container(uri)[0] is not None


def rows_schema(file: str) -> pa.Schema | None:
    """The columns that `list_rows` gives for a file; None for a Parquet file without a column of images.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
    """
    return _TAR_COLUMNS if file.lower().endswith(".tar") else parquet.rows_schema(file)


def list_rows(file: str) -> Iterator[pa.Table]:
    """One row for each image that a file holds, as a stream of tables, without reading Parquet's images.

    Yields:
        tables of at most 65,536 rows with `uri`, and

        - for Parquet the file's other columns: a column `uri` is called `original_uri`, and the numbers of a Hugging
          Face `label` become its names;
        - for tar `key`, and `label`: the content of the member `KEY.cls`, or null.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
    """
    return _rows_of_tar(file) if file.lower().endswith(".tar") else parquet.list_rows(file)


def image_error(error: Exception, place: str = "") -> CnnrayError:
    """The error of an image whose bytes cannot be read.

    Args:
        error: raised by reading it.
        place: put in front of the error's message if the message does not name the file.

    Returns:
        A `BadImage` if the file alone is at fault: it is missing, denied, too large or damaged. Otherwise the error
        itself: storage is in trouble, and says nothing about the image.
    """
    of_the_file = isinstance(error, storage.NotFoundError | storage.DeniedError) and not isinstance(
        error, storage.NoBucketError | storage.CredentialsError
    )
    if isinstance(error, TransientError | PermanentError) and not of_the_file:
        return error
    reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "unreadable")
    return BadImage(reason, place + (str(error).partition("\n")[0] or type(error).__name__))


def encoded(uris: Sequence[str]) -> Iterator[Source]:
    """The `Source` of each uri, in order.

    An image in a file of its own gives its uri. An image in a container gives its bytes, which are read when the
    iterator reaches it, or the error.
    """
    for (file, group), run in itertools.groupby(uris, _container):
        if file is None:
            yield from run
        elif group is None:
            yield from _read_with_retries(
                file, functools.partial(_from_tar, file), [_offset_and_size(uri) for uri in run]
            )
        else:
            rows = [int(uri.rpartition("-")[2]) for uri in run]
            yield from _read_with_retries(file, functools.partial(parquet.images, file, group), rows)


def neighbours(uris: Sequence[str]) -> Iterator[list[str]]:
    """Runs of images that `encoded` reads together. A run of images that are files of their own has one."""
    run: list[str] = []
    for uri in uris:
        if run and not _follows(run[-1], uri):
            yield run
            run = []
        run.append(uri)
    if run:
        yield run


def _follows(before: str, uri: str) -> bool:
    first, second = parquet.place(before), parquet.place(uri)
    if first and second:
        return parquet.is_near(first, second)
    file, _ = _container(uri)
    if file is None or _container(before) != (file, None):
        return False
    (start, size), (offset, _) = _offset_and_size(before), _offset_and_size(uri)
    return start + size <= offset <= start + size + _GAP


def _read_with_retries(
    file: str, read: Callable[[list[Any]], Iterator[bytes | BadImage]], places: list[Any]
) -> Iterator[Source]:
    """Read images of a container, and after an error those that are left, if another attempt may succeed.

    Args:
        file: the container.
        read: yields the images at places.
        places: of the images.
    """
    attempts, done = Attempts(file), 0
    while done < len(places):
        try:
            with storage.translated_errors(file):
                for source in read(places[done:]):
                    done += 1
                    attempts.succeeded()
                    yield source
            return
        except (CnnrayError, pa.ArrowException, IndexError) as error:
            if not attempts.wait(error):
                reason = image_error(error, "" if isinstance(error, CnnrayError) else f"{file}: ")
                yield from itertools.repeat(reason, len(places) - done)
                return


def _container(uri: str) -> tuple[str | None, int | None]:
    """The container that holds an image and, for Parquet, the row group; None for what does not apply."""
    place = parquet.place(uri)
    if place is not None:
        return place[:2]
    match = _TAR_ADDRESS.fullmatch(uri)
    return (match[1] if match else None), None


# -- tar ------------------------------------------------------------------------------------------------------


def _rows_of_tar(file: str) -> Iterator[pa.Table]:
    rows: list[tuple[str, str]] = []
    labels: dict[str, str] = {}
    is_cut = False
    try:
        for member, content in _tar_members(file):
            folder, _, name = member.name.rpartition("/")
            key = f"{folder}/{name.partition('.')[0]}".lstrip("/")
            if content is not None:
                labels[key] = content.decode().strip()
                continue
            if len(rows) >= _ROWS_OF_A_SLICE and key != rows[-1][1]:
                yield _tar_table(rows, labels)
                rows, is_cut = [], True
            rows.append((f"{file}#{member.offset_data:012d}-{member.size:09d}-{member.name}", key))
    except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
        raise pa.ArrowInvalid(f"{error} (tar files must be complete and not compressed)") from None
    yield _tar_table(rows, labels)
    if is_cut and labels:
        log.warning("%s has %d labels that do not follow an image, and are ignored", file, len(labels))


def _tar_table(rows: list[tuple[str, str]], labels: dict[str, str]) -> pa.Table:
    """The table of images. Their labels are taken out of `labels`."""
    columns = [[uri for uri, _ in rows], [key for _, key in rows], [labels.get(key) for _, key in rows]]
    for _, key in rows:
        labels.pop(key, None)
    return pa.table([pa.array(values, pa.string()) for values in columns], schema=_TAR_COLUMNS)


def _tar_members(file: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The members that are images, and those that hold labels with their content."""
    # A stream: in a bucket, random access would take one request for each member's header.
    filesystem, path = storage.arrow_filesystem(file)
    with (
        filesystem.open_input_stream(path, buffer_size=_BYTES_AT_ONCE) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        for member in archive:
            name = member.name.rpartition("/")[2]
            if not member.isreg() or member.issparse() or name.startswith("."):
                continue
            if PurePosixPath(name).suffix.lower() in EXTENSIONS:
                yield member, None
            elif name.endswith(".cls") and (content := archive.extractfile(member)):
                yield member, content.read()
            archive.members = []  # type: ignore[attr-defined] # which it would keep


def _offset_and_size(uri: str) -> tuple[int, int]:
    """Offset and size of a member in bytes."""
    match = _TAR_ADDRESS.fullmatch(uri)
    return (int(match[2]), int(match[3])) if match else (0, 0)


def _from_tar(file: str, places: list[tuple[int, int]]) -> Iterator[bytes | BadImage]:
    with _opened_tar(file) as opened:
        start, held = 0, b""
        for place, (offset, size) in enumerate(places):
            if size > MAX_BYTES:
                yield BadImage("too large", f"{size} bytes, at most {MAX_BYTES}")
                continue
            if not start <= offset <= offset + size <= start + len(held):
                start, held = offset, opened.read_at(_length_of_run(places[place:]), offset)
            data = held[offset - start : offset - start + size]
            yield data if len(data) == size else BadImage("unreadable", f"{file} ends before the image")


@contextlib.contextmanager
def _opened_tar(file: str) -> Iterator[Any]:
    """A file to read members of, in any number of threads."""
    if storage.is_local(file):
        filesystem, path = storage.arrow_filesystem(file)
        with filesystem.open_input_file(path) as opened:
            yield opened
        return
    try:
        yield _open_remote(file)
    except Exception:
        _open_remote.cache_clear()  # credentials, for example, may be others by now
        raise


@functools.lru_cache(_OPEN_FILES)
def _open_remote(file: str) -> Any:
    """A file in a bucket, which stays open: to open it takes a request."""
    filesystem, path = storage.arrow_filesystem(file)
    return filesystem.open_input_file(path)


def _length_of_run(places: list[tuple[int, int]]) -> int:
    """Bytes from the start of the first member to the end of the last one that follows closely: one request."""
    start, end = places[0][0], sum(places[0])
    for offset, size in places[1:]:
        if not end <= offset <= end + _GAP or offset + size - start > _BYTES_AT_ONCE:
            break
        end = offset + size
    return end - start
