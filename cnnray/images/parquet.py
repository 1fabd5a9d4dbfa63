"""Parquet files that hold images, each with an address `FILE.parquet#GROUP-ROW`.

That is the index of the row group in the file, and of the row in the group, padded with zeros, so that addresses sort
in the order of the file. A row can only be read after those before it in the group. A process that reads many groups
side by side, a few images of each in turn, keeps them open (`keep_open`), and goes on where it was.
"""

import collections
import itertools
import json
import re
import threading
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
"""Most bytes that one request reads, unless a single image is larger; the second where many groups are open."""
_NEAR = 64
"""Rows that are read on from one image to the next, where the group could also be opened anew."""


def place(uri: str) -> tuple[str, int, int] | None:
    """File, row group and row of an image; None for an image that is not in Parquet."""
    match = _ADDRESS.fullmatch(uri)
    return (match[1], int(match[2]), int(match[3])) if match else None


def is_near(before: tuple[str, int, int], after: tuple[str, int, int]) -> bool:
    """Whether the second of two places is read on from the first."""
    return before[:2] == after[:2] and before[2] < after[2] <= before[2] + _NEAR


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
        numbers = table["label"].combine_chunks()
        labels = pa.array(label_names, pa.string()).take(pc.if_else(pc.less(numbers, 0), None, numbers))
        table = table.set_column(table.column_names.index("label"), "label", labels)
    return table


def _row_uris(file: str, group: int, rows: int) -> pa.Array:
    numbers = pc.utf8_lpad(pa.array(np.arange(rows)).cast(pa.string()), 9, "0")
    return pc.binary_join_element_wise(f"{file}#{group:06d}", numbers, "-")


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
        self._file, self._group = open_file(file, buffer_size=buffer), group
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

    @property
    def _stop(self) -> int:
        return self._start + len(self._images)

    def is_near(self, row: int) -> bool:
        """Whether a row comes next, or a few rows later."""
        return self._start <= row < self._stop + _NEAR

    def is_read(self, row: int) -> bool:
        """Whether nothing is left after this row."""
        return row + 1 >= self._rows

    def image(self, row: int) -> bytes:
        """The encoded image of a row, which must not come before those that were read together last."""
        while row >= self._stop:
            start, batch = self._stop, next(self._batches, None)
            if batch is None:
                raise IndexError(f"row group {self._group} has {start} rows and no row {row}")
            self._start, self._images = start, batch.column(0)
        value = self._images[row - self._start].as_py()
        return (value["bytes"] if isinstance(value, dict) else value) or b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_most_open = 0
_open: collections.OrderedDict[tuple[str, int], list[_OpenGroup]] = collections.OrderedDict()
"""The groups that were used last come last."""
_lock = threading.Lock()


def keep_open(groups: int) -> None:
    """Let this process keep so many row groups open, of those that it has not read to their end."""
    global _most_open
    _most_open = groups


def images(file: str, group: int, rows: list[int], *, in_lane: bool = False) -> Iterator[bytes]:
    """The encoded images of rows of a group, in their order.

    Args:
        file: its uri.
        group: index of the row group.
        rows: indices of the rows in the group.
        in_lane: whether the rows that follow are read later by this process.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
        IndexError: the file has changed, and has no such row.
    """
    ascending = sorted(rows)
    found = _ascending(file, group, ascending, in_lane)
    if rows != ascending:
        of_rows = dict(zip(ascending, found, strict=True))
        found = (of_rows[row] for row in rows)
    yield from found


def _ascending(file: str, group: int, rows: list[int], in_lane: bool) -> Iterator[bytes]:
    opened = _taken(file, group, rows[0]) if in_lane else None
    opened = opened or _OpenGroup(file, group, _BYTES_OF_ONE_OF_MANY if in_lane else _BYTES_AT_ONCE)
    is_kept = False
    try:
        for row in rows:
            yield opened.image(row)
        is_kept = in_lane and not opened.is_read(rows[-1])
    finally:
        if is_kept:
            _keep(file, group, opened)
        else:
            opened.close()


def _taken(file: str, group: int, row: int) -> _OpenGroup | None:
    """An open group whose next rows include this one; no one else has it then."""
    with _lock:
        of_group = _open.get((file, group), [])
        found = next((opened for opened in of_group if opened.is_near(row)), None)
        if found is not None:
            of_group.remove(found)
            if not of_group:
                del _open[file, group]
        return found


def _keep(file: str, group: int, opened: _OpenGroup) -> None:
    with _lock:
        _open.setdefault((file, group), []).append(opened)
        _open.move_to_end((file, group))
        unused = [_open.popitem(last=False)[1] for _ in range(len(_open) - _most_open)]
    for one in itertools.chain.from_iterable(unused):
        one.close()
