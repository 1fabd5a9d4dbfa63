"""Tables of images as streams: files with a column `uri`, and files that hold the images (see `containers`).

Every table has the columns of the file. `uri`, `label` and `split` are strings, as far as they are there, or, for
`label`, lists of strings; `id` is called `original_id`.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from cnnray.errors import BadInputError
from cnnray.images import containers, parquet, storage

SPLITS = ("train", "validation", "test")
TABLES = (".csv", ".jsonl", ".ndjson", *containers.ENDINGS)
"""File name extensions of tables, in lower case."""
VERSION = "__version"
"""Column of `StoredFile.version` of an image's file; null for images of a table of uris."""
ROWS_AT_ONCE = 2**16

_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_BLOCK_BYTES = 64 * 2**20
"""Bytes of a CSV or JSONL file that are parsed at once. The first block decides the types of the columns."""
_TEXT_COLUMNS = ("uri", "label", "split")


class ManifestError(BadInputError, ValueError):
    """An input that no manifest can be built from; the message is one sentence for the user."""


def split_named(name: str) -> str | None:
    """The split that a folder or a value of a column `split` stands for: `Train` and `val` are `train` and
    `validation`. None for any other name."""
    return _SPLIT_NAMES.get(name.lower())


def shorten(values: Sequence[str], most: int = 5) -> str:
    """The first `most` values and the number of the others, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(repr(value) for value in values[:most]) + more


def read(source: str) -> tuple[pa.Schema, bool, Iterator[pa.Table]]:
    """Open a table file, or a file that holds the images.

    Returns:
        The columns of the tables; whether the file is a table of uris; and the rows, at most 65,536 at once.

    Raises:
        ManifestError: it cannot be read, lacks the column `uri`, or names an unknown split. Raised here or by the
            iterator.
        OSError: storage that cannot be read.
    """
    with _one_sentence(source):
        schema = containers.rows_schema(source) if source.lower().endswith(containers.ENDINGS) else None
        if schema is not None:
            tables, is_table = containers.list_rows(source), False
        else:
            (schema, tables), is_table = _open(source), True
        columns = _normal(schema.empty_table(), source).schema
        return columns, is_table, _normal_tables(source, tables, is_table)


def has_splits(source: str) -> bool:
    """Whether a Parquet file has a column `split` with a value."""
    with _one_sentence(source):
        if not source.lower().endswith(".parquet"):
            return False
        with parquet.open_file(source) as opened:
            batches = opened.iter_batches(ROWS_AT_ONCE, columns=["split"])
            return any(batch.column(0).null_count < len(batch) for batch in batches if batch.num_columns)


def _normal_tables(source: str, tables: Iterator[pa.Table], is_table: bool) -> Iterator[pa.Table]:
    with _one_sentence(source):
        for table in tables:
            for start in range(0, len(table), ROWS_AT_ONCE):
                rows = _normal(table.slice(start, ROWS_AT_ONCE), source)
                yield _with_absolute_uris(rows, source) if is_table else rows


@contextlib.contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Turn errors of reading a table into a sentence that names it."""
    try:
        with storage.translated_errors(source):
            yield
    except pa.ArrowException as error:
        raise ManifestError(f"{source} cannot be read as a table: {str(error).splitlines()[0]}") from None


def _open(source: str) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """The columns and rows of a table of uris."""
    kind = source.lower().rpartition(".")[2]
    schema, tables = _open_parquet(source) if kind == "parquet" else _open_text(source, kind)
    if len(set(schema.names)) < len(schema.names):
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        raise ManifestError(f"{source} has several columns of the same name: {shorten(twice)}.")
    if "uri" not in schema.names:
        wanted = "'uri' and no column of images" if kind == "parquet" else "'uri'"
        raise ManifestError(f"{source} has no column {wanted} (it has {shorten(schema.names)}).")
    return schema, tables


def _open_parquet(source: str) -> tuple[pa.Schema, Iterator[pa.Table]]:
    def tables() -> Iterator[pa.Table]:
        with parquet.open_file(source) as opened:
            for batch in opened.iter_batches(ROWS_AT_ONCE):
                yield pa.Table.from_batches([batch])

    with parquet.open_file(source) as opened:
        return opened.schema_arrow, tables()


def _open_text(source: str, kind: str) -> tuple[pa.Schema, Iterator[pa.Table]]:
    filesystem, path = storage.arrow_filesystem(source)
    stream = filesystem.open_input_stream(path)
    if kind == "csv":
        # Labels such as 007 or NA are names, not numbers or nulls.
        options = pyarrow.csv.ConvertOptions(
            column_types={column: pa.string() for column in _TEXT_COLUMNS},
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        )
        reading = pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES)
        reader = pyarrow.csv.open_csv(stream, read_options=reading, convert_options=options)
    else:
        reader = pyarrow.json.open_json(stream, read_options=pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES))

    def tables() -> Iterator[pa.Table]:
        with stream, reader:
            try:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
            except pa.ArrowInvalid as error:
                raise ManifestError(
                    f"{source} cannot be read as a table: {str(error).splitlines()[0]} (the first {_BLOCK_BYTES} "
                    "bytes decide the types of its columns; a Parquet file states its types)."
                ) from None

    return reader.schema, tables()


def _normal(table: pa.Table, source: str) -> pa.Table:
    """`uri` first, then the other columns."""
    table = table.replace_schema_metadata(None)
    if VERSION in table.column_names:  # a manifest of an earlier run
        table = table.drop_columns([VERSION])
    for column in _TEXT_COLUMNS:
        if column in table.column_names:
            is_list = column == "label" and _is_list(table.schema.field(column).type)
            table = with_column(table, column, table[column].cast(pa.list_(pa.string()) if is_list else pa.string()))
    if "split" in table.column_names:
        table = with_column(table, "split", _normal_splits(table["split"], source))
    if "id" in table.column_names:
        if "original_id" in table.column_names:
            raise ManifestError(f"{source} has the columns 'id' and 'original_id'; expected one of them.")
        table = table.rename_columns({"id": "original_id"})
    return table.select(["uri", *(name for name in table.column_names if name != "uri")])


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _normal_splits(splits: pa.ChunkedArray, source: str) -> pa.Array:
    names = pc.unique(splits).drop_null()
    normal = [split_named(name) for name in names.to_pylist()]
    if wrong := sorted(name for name, split in zip(names.to_pylist(), normal, strict=True) if split is None):
        raise ManifestError(f"{source} names the splits {shorten(wrong)}; expected {', '.join(SPLITS)}.")
    return pa.array(normal, pa.string()).take(pc.index_in(splits, names).combine_chunks())


def _with_absolute_uris(table: pa.Table, source: str) -> pa.Table:
    if table["uri"].null_count:
        raise ManifestError(f"{source} has {table['uri'].null_count} rows without a uri.")
    chunks = [_resolved(chunk, source.rpartition("/")[0]) for chunk in table["uri"].chunks]
    return with_column(table, "uri", pa.chunked_array(chunks, pa.string()))


def _resolved(uris: pa.Array, folder: str) -> pa.Array:
    """Absolute uris; relative ones are below `folder`."""
    scheme = pc.struct_field(pc.extract_regex(uris, r"^(?P<scheme>[a-z0-9]+://)"), "scheme")
    remote_schemes = [name for name in pc.unique(scheme).to_pylist() if name and not storage.is_local(name)]
    is_remote = pc.is_in(scheme, pa.array(remote_schemes, pa.string()))
    is_absolute = pc.or_(is_remote, pc.starts_with(uris, "/"))
    uris = pc.if_else(is_absolute, uris, pc.binary_join_element_wise(folder, uris, "/"))
    is_path = pc.invert(is_remote) if storage.is_local(folder) else pc.starts_with(uris, "/")
    # ./a.png is a.png. Few paths need it.
    is_odd = pc.and_(is_path, pc.match_substring_regex(uris, r"/\.{0,2}(/|$)"))
    normal = [os.path.normpath(uri) for uri in uris.filter(is_odd).to_pylist()]
    return pc.replace_with_mask(uris, is_odd, pa.array(normal, pa.string())) if normal else uris


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with other values in a column."""
    return table.set_column(table.column_names.index(name), name, values)
