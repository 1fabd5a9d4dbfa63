"""Files that hold many images: Parquet and tar. Each image has an address, and runs of them are read at once.

- In Parquet, `FILE.parquet#GROUP-ROW`: the number of the row group in the file and of the row in the group. One row
  cannot be had without reading its group from the start, so images are read in that order, each group once.
- In tar, as WebDataset writes its shards, `FILE.tar#OFFSET-SIZE-NAME`: where the image is in the file, in bytes, and
  what it is called there. Images that follow one another are read together.

Numbers are padded with zeros, so that sorted uris are in the file's order.
"""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from cnnray.images import storage
from cnnray.images.decode import EXTENSIONS, MAX_BYTES, BadImage

ENDINGS = (".parquet", ".tar")

_ADDRESS = re.compile(r"(.+\.parquet)#(\d{6,})-(\d{9,})", re.IGNORECASE | re.DOTALL)
_TAR_ADDRESS = re.compile(r"(.+\.tar)#(\d{12,})-(\d{9,})-(.+)", re.IGNORECASE | re.DOTALL)
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "content", "img")
_ROWS_AT_ONCE = 16
_BYTES_AT_ONCE = 8 * 2**20
"""Read from a file with one request."""
_REASONS = {
    "AWS Error ACCESS_DENIED": "access denied", "HTTP status 403": "access denied",
    "AWS Error SLOW_DOWN": "throttled", "AWS Error THROTTLING": "throttled", "HTTP status 503": "throttled",
}  # fmt: skip
"""By what Arrow says of S3."""

Source = str | bytes | BadImage
"""What there is to decode: the uri of a file, an image's bytes, or why there are none."""


def row_group(uri: str) -> tuple[str, int] | None:
    """The Parquet file and row group that hold an image; None for an image that is a file of its own."""
    found = _ADDRESS.fullmatch(uri)
    return (found[1], int(found[2])) if found else None


def containing_file(uri: str) -> str:
    """The file that is opened for an image: its own, or that of many which holds it."""
    return _holder(uri)[0] or uri


def is_inside(uri: str) -> bool:
    """Whether an image is inside a file of many."""
    return _holder(uri)[0] is not None


def image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images: binary, or a struct with a binary `bytes` as Hugging Face writes it.

    It is called image, image_bytes, bytes, content or img, or is the only one of its kind in a table without `uri`.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in _IMAGE_COLUMNS if name in found]
    if named:
        return named[0]
    return found[0] if len(found) == 1 and "uri" not in schema.names else None


def list_rows(file: str) -> pa.Table | None:
    """One row for each image that a file holds, without reading Parquet's images.

    Returns:
        `uri`, and of Parquet the file's other columns (a `uri` among them as `original_uri`; numbers of a Hugging
        Face `label` become its names), of tar `key`, and `label` where members `KEY.cls` name it. None for a Parquet
        file without a column of images.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: storage that cannot be read.
    """
    return _rows_of_tar(file) if file.lower().endswith(".tar") else _rows_of_parquet(file)


def _rows_of_parquet(file: str) -> pa.Table | None:
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
        column = image_column(schema)
        if column is None:
            return None
        groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
        table = parquet.read(columns=[name for name in schema.names if name != column])
    uris = [f"{file}#{group:06d}-{row:09d}" for group, rows in enumerate(groups) for row in range(rows)]
    if "uri" in table.column_names:
        table = table.rename_columns({"uri": "original_uri"})
    table = table.replace_schema_metadata(None)
    if "label" in table.column_names and (names := _label_names(schema)):
        labels = [None if label is None or label < 0 else names[label] for label in table["label"].to_pylist()]
        table = table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.string()))
    # A table of no columns has no rows.
    return table.add_column(0, "uri", pa.array(uris, pa.string())) if table.column_names else pa.table({"uri": uris})


def encoded(uris: Sequence[str]) -> Iterator[Source]:
    """What there is to decode for each uri, in order: its bytes where a container holds them, read as they are asked
    for; the uri itself where it is a file of its own; or why it cannot be read."""
    for (file, group), run in itertools.groupby(uris, _holder):
        if file is None:
            yield from run
        elif group is None:
            yield from _from_tar(file, [_place(uri) for uri in run])
        else:
            yield from _from_group(file, group, [int(uri.rpartition("-")[2]) for uri in run])


def _holder(uri: str) -> tuple[str | None, int | None]:
    """The file that holds an image, and of Parquet the row group."""
    group = row_group(uri)
    if group is not None:
        return group
    found = _TAR_ADDRESS.fullmatch(uri)
    return (found[1] if found else None), None


# -- Parquet --------------------------------------------------------------------------------------------------


def _from_group(file: str, group: int, rows: list[int]) -> Iterator[bytes | BadImage]:
    given, ascending = 0, sorted(rows)
    try:
        with _opened(file) as parquet:
            images = _in_file_order(parquet, group, ascending)
            if rows != ascending:
                found = dict(zip(ascending, images, strict=True))
                images = (found[row] for row in rows)
            for data in images:
                yield data
                given += 1
    except (OSError, pa.ArrowException, IndexError) as error:
        for _ in rows[given:]:
            yield _bad(error, f"{file}, row group {group}")


def _in_file_order(parquet: pyarrow.parquet.ParquetFile, group: int, rows: list[int]) -> Iterator[bytes]:
    column = image_column(parquet.schema_arrow)
    if column is None:
        raise IndexError("it holds no images any more")
    start = done = 0
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
        while done < len(rows) and rows[done] < start + len(batch):
            value = batch.column(0)[rows[done] - start].as_py()
            yield (value["bytes"] if isinstance(value, dict) else value) or b""
            done += 1
        start += len(batch)
        if done == len(rows):
            return
    raise IndexError(f"it has {start} rows, and row {rows[done]} was asked for")


# -- tar ------------------------------------------------------------------------------------------------------


def _rows_of_tar(file: str) -> pa.Table:
    uris, keys, labels = [], [], {}
    # As a stream, which a bucket gives faster than a request for each member's header.
    filesystem, path = storage.arrow_filesystem(file)
    try:
        with (
            filesystem.open_input_stream(path, buffer_size=_BYTES_AT_ONCE) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or member.issparse() or name.startswith("."):
                    continue
                key = f"{folder}/{name.partition('.')[0]}".lstrip("/")
                if PurePosixPath(name).suffix.lower() in EXTENSIONS:
                    uris.append(f"{file}#{member.offset_data:012d}-{member.size:09d}-{member.name}")
                    keys.append(key)
                elif name.endswith(".cls") and (content := archive.extractfile(member)):
                    labels[key] = content.read().decode().strip()
    except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
        raise pa.ArrowInvalid(f"{error} (of tar files, only whole ones that are not compressed are read)") from None
    columns = {"uri": uris, "key": keys} | ({"label": [labels.get(key) for key in keys]} if labels else {})
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _place(uri: str) -> tuple[int, int]:
    """Offset and size of a member."""
    found = _TAR_ADDRESS.fullmatch(uri)
    return (int(found[2]), int(found[3])) if found else (0, 0)


def _from_tar(file: str, places: list[tuple[int, int]]) -> Iterator[bytes | BadImage]:
    given = 0
    try:
        filesystem, path = storage.arrow_filesystem(file)
        with filesystem.open_input_file(path) as opened:
            start, held = 0, b""
            for offset, size in places:
                if size > MAX_BYTES:
                    yield BadImage("too large", f"{size} bytes, at most {MAX_BYTES}")
                    given += 1
                    continue
                if not start <= offset <= offset + size <= start + len(held):
                    start, held = offset, opened.read_at(_until(places[given:]), offset)
                data = held[offset - start : offset - start + size]
                yield data if len(data) == size else BadImage("unreadable", f"{file} ends before it")
                given += 1
    except (OSError, pa.ArrowException) as error:
        for _ in places[given:]:
            yield _bad(error, file)


def _until(places: list[tuple[int, int]]) -> int:
    """Bytes to read from the first place on: as far as images follow one another closely."""
    start, end = places[0][0], sum(places[0])
    for offset, size in places[1:]:
        if not end <= offset <= end + _BYTES_AT_ONCE // 8 or offset + size - start > _BYTES_AT_ONCE:
            break
        end = offset + size
    return end - start


def _bad(error: Exception, place: str) -> BadImage:
    """Why images of a container cannot be read."""
    said = str(error)
    reason = next((reason for words, reason in _REASONS.items() if words in said), "unreadable")
    if isinstance(error, FileNotFoundError):
        reason = "missing"
    elif isinstance(error, PermissionError):
        reason = "access denied"
    return BadImage(reason, f"{place}: {said.splitlines()[0] if said else type(error).__name__}")


def _opened(file: str) -> Any:
    filesystem, path = storage.arrow_filesystem(file)
    # Without these two Arrow holds a column of a whole row group: of photos, gigabytes.
    return pyarrow.parquet.ParquetFile(path, filesystem=filesystem, pre_buffer=False, buffer_size=_BYTES_AT_ONCE)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_names(schema: pa.Schema) -> list[str] | None:
    """The names of a Hugging Face ClassLabel."""
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = stated.get("info", {}).get("features", {}).get("label", {}).get("names")
    return names if pa.types.is_integer(schema.field("label").type) else None
