"""Files that hold many images: Parquet and tar. Each image has a uri of its own, and neighbours are read together.

- In Parquet, `FILE.parquet#GROUP-ROW`: the index of the row group in the file, and of the row in the group. A row can
  only be read after those before it in the group, so images are read in that order, and each group once.
- In tar shards, as WebDataset writes them, `FILE.tar#OFFSET-SIZE-NAME`: offset and size of the member in bytes, and
  its name. Members that follow one another are read together.

Numbers are padded with zeros, so that uris sort in the order of the file.
"""

import contextlib
import functools
import itertools
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cnnray.errors import CnnrayError, PermanentError, TransientError
from cnnray.images import storage
from cnnray.images.decode import EXTENSIONS, MAX_BYTES, BadImage
from cnnray.images.retries import Attempts

log = logging.getLogger(__name__)

ENDINGS = (".parquet", ".tar")

_ADDRESS = re.compile(r"(.+\.parquet)#(\d{6,})-(\d{9,})", re.IGNORECASE | re.DOTALL)
_END_OF_ADDRESS = r"(?i)\.parquet#\d{6,}-\d{9}$"
_ROW_LENGTH = len("-000000000")
_TAR_ADDRESS = re.compile(r"(.+\.tar)#(\d{12,})-(\d{9,})-(.+)", re.IGNORECASE | re.DOTALL)
_TAR_COLUMNS = pa.schema([(name, pa.string()) for name in ("uri", "key", "label")])
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "content", "img")
_ROWS_AT_ONCE = 16
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


def row_group(uri: str) -> tuple[str, int] | None:
    """The Parquet file and row group that hold an image; None for an image that is a file of its own."""
    match = _ADDRESS.fullmatch(uri)
    return (match[1], int(match[2])) if match else None


def row_group_runs(uris: pa.ChunkedArray | Iterable[pa.Array]) -> Iterator[tuple[str | None, int]]:
    """Neighbouring images of the same row group, or of none: its name, and the number of images.

    Args:
        uris: a column, or its chunks one after another. They are read no further than to the end of a row group;
            images of no row group are given for each chunk.
    """
    chunks = uris.chunks if isinstance(uris, pa.ChunkedArray) else uris
    for group, runs in itertools.groupby(_runs_of_slices(chunks), lambda run: run[0]):
        if group is None:
            yield from runs
        else:
            yield group, sum(length for _, length in runs)


def _runs_of_slices(chunks: Iterable[pa.Array]) -> Iterator[tuple[str | None, int]]:
    for chunk in chunks:
        for start in range(0, len(chunk), _ROWS_OF_A_SLICE):
            part = chunk.slice(start, _ROWS_OF_A_SLICE)
            is_in_group = pc.match_substring_regex(part, _END_OF_ADDRESS)
            runs = pc.run_end_encode(pc.if_else(is_in_group, pc.utf8_slice_codeunits(part, 0, -_ROW_LENGTH), None))
            yield from zip(runs.values.to_pylist(), np.diff(runs.run_ends, prepend=0).tolist(), strict=True)


def containing_file(uri: str) -> str:
    """The file that is opened to read an image: the image's own, or the container that holds it."""
    return _container(uri)[0] or uri


def is_inside(uri: str) -> bool:
    """Whether an image is inside a container."""
    return _container(uri)[0] is not None


def image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images: binary, or a struct with a binary `bytes` as Hugging Face writes it.

    Its name is image, image_bytes, bytes, content or img, or it is the only such column of a table without `uri`.
    """
    columns = [field.name for field in schema if _holds_bytes(field.type)]
    known = [name for name in _IMAGE_COLUMNS if name in columns]
    if known:
        return known[0]
    return columns[0] if len(columns) == 1 and "uri" not in schema.names else None


def rows_schema(file: str) -> pa.Schema | None:
    """The columns that `list_rows` gives for a file; None for a Parquet file without a column of images.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
    """
    if file.lower().endswith(".tar"):
        return _TAR_COLUMNS
    with open_parquet(file) as parquet:
        schema = parquet.schema_arrow
    column = image_column(schema)
    if column is None:
        return None
    others = _without_images(schema.remove(schema.get_field_index(column)).empty_table(), _label_names(schema))
    return others.add_column(0, "uri", pa.array([], pa.string())).schema


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
    return _rows_of_tar(file) if file.lower().endswith(".tar") else _rows_of_parquet(file)


def _rows_of_parquet(file: str) -> Iterator[pa.Table]:
    with open_parquet(file) as parquet:
        schema = parquet.schema_arrow
        column, names = image_column(schema), _label_names(schema)
        others = [name for name in schema.names if name != column]
        for group in range(parquet.metadata.num_row_groups):
            uris = _row_uris(file, group, parquet.metadata.row_group(group).num_rows)
            if not others:
                for start in range(0, len(uris), _ROWS_OF_A_SLICE):
                    yield pa.table({"uri": uris.slice(start, _ROWS_OF_A_SLICE)})
                continue
            start = 0
            for batch in parquet.iter_batches(_ROWS_OF_A_SLICE, row_groups=[group], columns=others):
                rows = _without_images(pa.Table.from_batches([batch]), names)
                yield rows.add_column(0, "uri", uris.slice(start, len(batch)))
                start += len(batch)


def _without_images(table: pa.Table, label_names: list[str] | None) -> pa.Table:
    """The user's columns, with the names of labels in place of their numbers."""
    table = table.replace_schema_metadata(None)
    if "uri" in table.column_names:
        table = table.rename_columns({"uri": "original_uri"})
    if label_names:
        numbers = table["label"].combine_chunks()
        labels = pa.array(label_names, pa.string()).take(pc.if_else(pc.less(numbers, 0), None, numbers))
        table = table.set_column(table.column_names.index("label"), "label", labels)
    return table


def _row_uris(file: str, group: int, rows: int) -> pa.Array:
    numbers = pc.utf8_lpad(pa.array(np.arange(rows)).cast(pa.string()), 9, "0")
    return pc.binary_join_element_wise(f"{file}#{group:06d}", numbers, "-")


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
            yield from _read_with_retries(file, functools.partial(_from_group, file, group), rows)


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
    file, group = _container(uri)
    if file is None or _container(before) != (file, group):
        return False
    if group is not None:
        return True
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
    group = row_group(uri)
    if group is not None:
        return group
    match = _TAR_ADDRESS.fullmatch(uri)
    return (match[1] if match else None), None


# -- Parquet --------------------------------------------------------------------------------------------------


def _from_group(file: str, group: int, rows: list[int]) -> Iterator[bytes]:
    ascending = sorted(rows)
    with open_parquet(file) as parquet:
        images = _in_file_order(parquet, group, ascending)
        if rows != ascending:
            images_by_row = dict(zip(ascending, images, strict=True))
            images = (images_by_row[row] for row in rows)
        yield from images


def _in_file_order(parquet: pyarrow.parquet.ParquetFile, group: int, rows: list[int]) -> Iterator[bytes]:
    column = image_column(parquet.schema_arrow)
    if column is None:
        raise IndexError("the file no longer has a column of images")
    start = done = 0
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
        while done < len(rows) and rows[done] < start + len(batch):
            value = batch.column(0)[rows[done] - start].as_py()
            yield (value["bytes"] if isinstance(value, dict) else value) or b""
            done += 1
        start += len(batch)
        if done == len(rows):
            return
    raise IndexError(f"row group {group} has {start} rows and no row {rows[done]}")


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


def open_parquet(file: str, **options: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads large columns piece by piece.

    Args:
        file: its uri.
        options: see `ParquetFile`.
    """
    filesystem, path = storage.arrow_filesystem(file)
    # Without these two options Arrow holds the column of a whole row group in memory: gigabytes of photos.
    return pyarrow.parquet.ParquetFile(
        path, filesystem=filesystem, pre_buffer=False, buffer_size=_BYTES_AT_ONCE, **options
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_names(schema: pa.Schema) -> list[str] | None:
    """The names of a Hugging Face ClassLabel `label`; None where labels are no such numbers."""
    if "label" not in schema.names:
        return None
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = features.get("info", {}).get("features", {}).get("label", {}).get("names")
    return names if pa.types.is_integer(schema.field("label").type) else None
