"""Parquet files that hold images, each with an address `FILE.parquet#GROUP-ROW`.

That is the index of the row group in the file, and of the row in the group, padded with zeros, so that addresses sort
in the order of the file. A row can only be read after those before it in the group.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cnnray.images import storage

_ADDRESS = re.compile(r"(.+\.parquet)#(\d{6,})-(\d{9,})", re.IGNORECASE | re.DOTALL)
_END_OF_ADDRESS = r"(?i)\.parquet#\d{6,}-\d{9}$"
_ROW_LENGTH = len("-000000000")
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "content", "img")
_ROWS_AT_ONCE = 16
_ROWS_OF_A_SLICE = 2**16
_BYTES_AT_ONCE, _BYTES_OF_ONE_OF_MANY = 8 * 2**20, 2**20
"""Most bytes that one request reads, unless a page is larger; the second where many groups are open."""
_ROWS_OF_A_PAGE = 1024
"""Most rows of a page, as far as pyarrow writes it: it looks at the size of a page after so many."""


def place(uri: str) -> tuple[str, int, int] | None:
    """File, row group and row of an image; None for an image that is not in Parquet."""
    match = _ADDRESS.fullmatch(uri)
    return (match[1], int(match[2]), int(match[3])) if match else None


def groups_of(uris: pa.Array) -> pa.Array:
    """The name of the row group of each image; null for those in none."""
    is_in_group = pc.match_substring_regex(uris, _END_OF_ADDRESS)
    return pc.if_else(is_in_group, pc.utf8_slice_codeunits(uris, 0, -_ROW_LENGTH), None)


def runs(uris: Iterable[pa.Array], name: Callable[[pa.Array], pa.Array]) -> Iterator[tuple[str | None, int]]:
    """Neighbouring images of the same name, or of none: the name, and the number of images.

    Args:
        uris: the chunks of a column. They are read no further than to the end of a run; images without a name are
            given for each chunk.
        name: the name of each image, such as `groups_of`.
    """
    for group, parts in itertools.groupby(_runs_of_slices(uris, name), lambda run: run[0]):
        if group is None:
            yield from parts
        else:
            yield group, sum(length for _, length in parts)


def holds_some(uris: pa.ChunkedArray) -> bool:
    """Whether some of the images are in Parquet files."""
    return bool(pc.any(pc.match_substring_regex(uris, _END_OF_ADDRESS)).as_py())


def _runs_of_slices(
    chunks: Iterable[pa.Array], name: Callable[[pa.Array], pa.Array]
) -> Iterator[tuple[str | None, int]]:
    for chunk in chunks:
        for start in range(0, len(chunk), _ROWS_OF_A_SLICE):
            named = pc.run_end_encode(name(chunk.slice(start, _ROWS_OF_A_SLICE)))
            yield from zip(named.values.to_pylist(), np.diff(named.run_ends, prepend=0).tolist(), strict=True)


# -- listing --------------------------------------------------------------------------------------------------


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
    """The columns that `list_rows` gives for a file; None for one without a column of images.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
    """
    with open_file(file) as opened:
        schema = opened.schema_arrow
    column = image_column(schema)
    if column is None:
        return None
    others = _without_images(schema.remove(schema.get_field_index(column)).empty_table(), _label_names(schema))
    return others.add_column(0, "uri", pa.array([], pa.string())).schema


def list_rows(file: str) -> Iterator[pa.Table]:
    """One row for each image, without reading images: see `containers.list_rows`."""
    with open_file(file) as opened:
        schema = opened.schema_arrow
        column, names = image_column(schema), _label_names(schema)
        others = [name for name in schema.names if name != column]
        for group in range(opened.metadata.num_row_groups):
            uris = _row_uris(file, group, opened.metadata.row_group(group).num_rows)
            if not others:
                for start in range(0, len(uris), _ROWS_OF_A_SLICE):
                    yield pa.table({"uri": uris.slice(start, _ROWS_OF_A_SLICE)})
                continue
            start = 0
            for batch in opened.iter_batches(_ROWS_OF_A_SLICE, row_groups=[group], columns=others):
                rows = _without_images(pa.Table.from_batches([batch]), names)
                yield rows.add_column(0, "uri", uris.slice(start, len(batch)))
                start += len(batch)


def _without_images(table: pa.Table, label_names: list[str] | None) -> pa.Table:
    """The user's columns, with the names of labels in place of their numbers."""
    table = table.replace_schema_metadata(None)
    if "uri" in table.column_names:
        table = table.rename_columns({"uri": "original_uri"})
    if label_names:
        chunks = [_named(chunk, pa.array(label_names, pa.string())) for chunk in table["label"].chunks]
        kind = pa.list_(pa.string()) if pa.types.is_list(table["label"].type) else pa.string()
        table = table.set_column(table.column_names.index("label"), "label", pa.chunked_array(chunks, kind))
    return table


def _named(numbers: pa.Array, names: pa.Array) -> pa.Array:
    """The names of labels, or of those in lists."""
    if pa.types.is_list(numbers.type):
        lengths = pc.fill_null(pc.list_value_length(numbers), 0).to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, _named(pc.list_flatten(numbers), names), mask=numbers.is_null())
    return names.take(pc.if_else(pc.less(numbers, 0), None, numbers))


def _row_uris(file: str, group: int, rows: int) -> pa.Array:
    numbers = pc.utf8_lpad(pa.array(np.arange(rows)).cast(pa.string()), 9, "0")
    return pc.binary_join_element_wise(f"{file}#{group:06d}", numbers, "-")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_names(schema: pa.Schema) -> list[str] | None:
    """The names of a Hugging Face ClassLabel `label`, or of lists of them; None where labels are no such numbers."""
    if "label" not in schema.names:
        return None
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature, kind = features.get("info", {}).get("features", {}).get("label", {}), schema.field("label").type
    if pa.types.is_list(kind):
        kind = kind.value_type
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", {})  # as it was, and as it is
    return feature.get("names") if pa.types.is_integer(kind) else None


# -- reading --------------------------------------------------------------------------------------------------


def open_file(file: str, **options: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads large columns piece by piece.

    Args:
        file: its uri.
        options: see `ParquetFile`.
    """
    filesystem, path = storage.arrow_filesystem(file)
    # Without these two options Arrow holds the column of a whole row group in memory: gigabytes of photos.
    options = {"pre_buffer": False, "buffer_size": _BYTES_AT_ONCE} | options
    return pyarrow.parquet.ParquetFile(path, filesystem=filesystem, **options)


class _OpenGroup:
    """A row group that is read from its beginning to its end."""

    def __init__(self, file: str, group: int, buffer: int) -> None:
        self._place = file, group
        self._file = open_file(file, buffer_size=buffer)
        try:
            column = image_column(self._file.schema_arrow)
            if column is None:
                raise IndexError("the file no longer has a column of images")
            self._batches = self._file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column])
            self._rows: int = self._file.metadata.row_group(group).num_rows
        except Exception:
            self.close()
            raise
        self._images: Any = ()
        self._start = 0

    def has(self, file: str, group: int, row: int) -> bool:
        """Whether this row is still to come, or was read last."""
        return self._place == (file, group) and row >= self._start

    def is_last(self, row: int) -> bool:
        """Whether nothing is left after this row."""
        return row + 1 >= self._rows

    def image(self, row: int) -> bytes:
        """The encoded image of a row."""
        while row >= (stop := self._start + len(self._images)):
            batch = next(self._batches, None)
            if batch is None:
                raise IndexError(f"row group {self._place[1]} has {stop} rows and no row {row}")
            self._start, self._images = stop, batch.column(0)
        value = self._images[row - self._start].as_py()
        return (value["bytes"] if isinstance(value, dict) else value) or b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Reader:
    """Reads images one after another, and keeps the row group of the last one open."""

    def __init__(self, buffer: int = _BYTES_OF_ONE_OF_MANY) -> None:
        """
        Args:
            buffer: most bytes that one request reads, unless a page is larger.
        """
        self._buffer = buffer
        self._opened: _OpenGroup | None = None

    def images(self, file: str, group: int, rows: list[int]) -> Iterator[bytes]:
        """The encoded images of rows of a group, in their order. To go back in a group opens it anew.

        Raises:
            pa.ArrowException: the file is damaged.
            OSError: the file cannot be read.
            IndexError: the file has changed, and has no such row.
        """
        for row in rows:
            if self._opened is None or not self._opened.has(file, group, row):
                self.close()
                self._opened = _OpenGroup(file, group, self._buffer)
            try:
                image = self._opened.image(row)
            except Exception:
                self.close()
                raise
            if self._opened.is_last(row):
                self.close()
            yield image

    def close(self) -> None:
        """Close the group."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def images(file: str, group: int, rows: list[int]) -> Iterator[bytes]:
    """The encoded images of rows of a group, in their order; they are read in the order of the file.

    Raises:
        pa.ArrowException, OSError, IndexError: see `Reader.images`.
    """
    ascending = sorted(rows)
    with contextlib.closing(Reader(_BYTES_AT_ONCE)) as reader:
        found = reader.images(file, group, ascending)
        if rows != ascending:
            of_rows = dict(zip(ascending, found, strict=True))
            found = (of_rows[row] for row in rows)
        yield from found


def bytes_of_reader(file: str, group: int) -> int:
    """About the memory that a `Reader` takes in a row group, in bytes: a page, as it is in the file and decompressed.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
    """
    with open_file(file) as opened:
        metadata = opened.metadata.row_group(group)
        sizes = [metadata.column(number) for number in range(metadata.num_columns)]
        largest: int = max(column.total_uncompressed_size for column in sizes)
        rows: int = max(metadata.num_rows, 1)
    return _BYTES_OF_ONE_OF_MANY + 2 * largest * min(rows, _ROWS_OF_A_PAGE) // rows
