"""Parquet files that hold the images themselves: one address an image, and reading row group by row group.

An image's uri is `FILE.parquet#GROUP-ROW`: the number of the row group in the file and of the row in the group,
padded with zeros so that sorted uris are in the file's order. Parquet cannot give one row without reading its group
from the start, so images are read in that order, each group once.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from cnnray.images import storage
from cnnray.images.decode import BadImage

_ADDRESS = re.compile(r"(.+\.parquet)#(\d{6,})-(\d{9,})", re.IGNORECASE | re.DOTALL)
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "content", "img")
_ROWS_AT_ONCE = 16


def group_of(uri: str) -> tuple[str, int] | None:
    """The Parquet file and row group that hold an image; None for an image that is a file of its own."""
    found = _ADDRESS.fullmatch(uri)
    return (found[1], int(found[2])) if found else None


def image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images: binary, or a struct with a binary `bytes` as Hugging Face writes it.

    It is called image, image_bytes, bytes, content or img, or is the only one of its kind in a table without `uri`.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in _IMAGE_COLUMNS if name in found]
    if named:
        return named[0]
    return found[0] if len(found) == 1 and "uri" not in schema.names else None


def rows_of(file: str) -> pa.Table | None:
    """The rows of a Parquet file that holds images, without reading these.

    Returns:
        `uri` and the file's other columns (a `uri` among them as `original_uri`), or None where the file has no
        column of images. Numbers of a Hugging Face `label` become its names.
    """
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


def encoded(uris: Sequence[str]) -> Iterator[str | bytes | BadImage]:
    """What there is to decode for each uri, in order: its bytes where a container holds them, read as they are asked
    for; the uri itself where it is a file of its own; or why it cannot be read."""
    for group, run in itertools.groupby(uris, group_of):
        if group is None:
            yield from run
        else:
            yield from _from_group(*group, [int(uri.rpartition("-")[2]) for uri in run])


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
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        for _ in rows[given:]:
            yield BadImage(reason, f"{file}, row group {group}: {str(error).splitlines()[0]}")


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


def _opened(file: str) -> Any:
    filesystem, path = storage.arrow_filesystem(file)
    return pyarrow.parquet.ParquetFile(path, filesystem=filesystem)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_names(schema: pa.Schema) -> list[str] | None:
    """The names of a Hugging Face ClassLabel."""
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = stated.get("info", {}).get("features", {}).get("label", {}).get("names")
    return names if pa.types.is_integer(schema.field("label").type) else None
