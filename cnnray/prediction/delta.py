"""The rows of a run as a Delta table (https://github.com/delta-io/delta/blob/master/PROTOCOL.md).

The table is a folder of its own in the output, `config.DELTA_FOLDER`. Its files are the parts: the commit at the end
of a run writes no rows. Parts of earlier commits stay for readers of those versions, until `VACUUM` deletes them.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from cnnray.errors import BadInputError
from cnnray.images import storage
from cnnray.images.retries import patient
from cnnray.images.shards import Range
from cnnray.prediction import parts
from cnnray.prediction.parts import Part, PartError

log = logging.getLogger(__name__)

_SIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.decimal128(20)}
_AS_THEY_ARE = (
    pa.types.is_signed_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_boolean, pa.types.is_string,
    pa.types.is_binary, pa.types.is_date32,
)  # fmt: skip


class ColumnError(BadInputError, ValueError):
    """A column that a Delta table cannot have."""


def storable(schema: pa.Schema) -> pa.Schema:
    """The schema to which rows are cast, as Delta tables have fewer types than pyarrow.

    Raises:
        ColumnError: a column has a type that no type of Delta stands for, or two names differ in case only.
    """
    if twice := _same_but_for_case(schema.names):
        raise ColumnError(f"A Delta table cannot have both columns {twice[0]!r} and {twice[1]!r}: rename one.")
    fields = []
    for field in schema:
        kind = _storable(field.type)
        if kind is None:
            raise ColumnError(f"Column {field.name!r} has the type {field.type}, which a Delta table cannot have.")
        fields.append(field.with_type(kind))
    return pa.schema(fields)


def check_types(before: pa.Schema, now: pa.Schema) -> None:
    """
    Raises:
        ColumnError: a column would have another type than the rows that a Delta table has already.
    """
    earlier = {field.name: _storable(field.type) for field in before}
    for field in storable(now):
        if earlier.get(field.name, field.type) != field.type:
            raise ColumnError(
                f"Column {field.name!r} had the type {earlier[field.name]} in the earlier run and has {field.type} "
                "now; a column of a Delta table has one type. Classify all images anew with --overwrite."
            )


def _same_but_for_case(names: Iterable[str]) -> tuple[str, str] | None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            return other, name
    return None


def _storable(kind: pa.DataType) -> pa.DataType | None:
    """The type that a Delta table has for this one, without loss but of nanoseconds; None where there is none."""
    if kind in _SIGNED:
        return _SIGNED[kind]
    if any(is_kind(kind) for is_kind in _AS_THEY_ARE) or (pa.types.is_decimal128(kind) and kind.scale >= 0):
        return kind
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", None if kind.tz is None else "UTC")
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_date64(kind):
        return pa.date32()
    if pa.types.is_dictionary(kind):
        return _storable(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        value = _storable(kind.value_type)
        return None if value is None else pa.list_(value)
    if pa.types.is_map(kind):
        key, value = _storable(kind.key_type), _storable(kind.item_type)
        return None if key is None or value is None else pa.map_(key, value)
    if pa.types.is_struct(kind):
        fields = [field.with_type(_storable(field.type)) for field in kind if _storable(field.type) is not None]
        is_whole = len(fields) == kind.num_fields and not _same_but_for_case(field.name for field in kind)
        return pa.struct(fields) if is_whole else None
    return None


@patient
def commit(folder: str, counting: Mapping[Part, Range], model: str) -> None:
    """Make the parts that count the files of the table, in one transaction; if they are already, do nothing.

    Args:
        folder: of the table.
        counting: all parts of the run, with their ranges.
        model: `Bundle.version`, for the table's history.

    Raises:
        PartError: the table cannot be written, another writer has changed it at the same time, or parts have the same
            column with different types.
        OSError: storage that cannot be used.
    """
    import deltalake
    from deltalake.exceptions import TableNotFoundError
    from deltalake.transaction import AddAction, CommitProperties, RemoveAction, create_table_with_add_actions

    options, now = storage.deltalake_options(folder), time.time_ns() // 1_000_000
    properties = CommitProperties(custom_metadata={"userMetadata": f"cnnray predict, model {model}"})
    ranges = {part.name: range_ for part, range_ in counting.items()}
    sizes = {storage.name(file.uri): file.size for file in storage.walk(folder)}
    schema = deltalake.Schema.from_arrow(_schema(folder, counting))
    with _translated_errors(folder):
        try:
            table = deltalake.DeltaTable(folder, storage_options=options)
        except TableNotFoundError:
            table = None
        present = set(pa.table(table.get_add_actions())["path"].to_pylist()) if table else set()
        removed = present - ranges.keys()
        added = [
            AddAction(name, sizes[name], {}, now, True, json.dumps(_statistics(ranges[name])))
            for name in sorted(ranges.keys() - present)
        ]
        if not added and not removed:
            return
        if table is None:
            create_table_with_add_actions(
                folder, schema, added, storage_options=options, commit_properties=properties
            )
        elif removed == present:  # by itself, this mode removes all files, and changes the columns
            if '"timestamp_ntz"' in schema.to_json():  # such columns are a feature, which the mode does not add
                table.alter.add_feature(
                    deltalake.TableFeatures.TimestampWithoutTimezone, allow_protocol_versions_increase=True
                )
                table = deltalake.DeltaTable(folder, storage_options=options)
            table.create_write_transaction([*added], "overwrite", schema, commit_properties=properties)
        else:
            removals = [RemoveAction(name, True, now, partition_values={}) for name in sorted(removed)]
            table.create_write_transaction([*added, *removals], "append", schema, commit_properties=properties)
    log.info(
        "%s: a Delta table of %d files, %d of them new; %d removed",
        folder,
        len(ranges),
        len(added),
        len(removed),
    )


@contextlib.contextmanager
def _translated_errors(folder: str) -> Iterator[None]:
    from deltalake.exceptions import DeltaError

    try:
        yield
    except OSError as error:  # of the object store, with its text as obstore has it, but in colours
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        if storage.is_local(folder):
            raise storage.StorageError(f"{folder}: {_first_line(text)}.") from error
        raise storage.remote_error(folder, text) from error
    except DeltaError as error:
        raise PartError(f"The Delta table {folder} cannot be written: {_first_line(str(error))}.") from error


def _statistics(range_: Range) -> dict[str, Any]:
    """Number of rows, and range of ids, by which readers skip files (*Per-file Statistics* in the protocol)."""
    ids = {"minValues": {"id": range_.first}, "maxValues": {"id": range_.last}, "nullCount": {"id": 0}}
    return {"numRecords": range_.rows, **ids}


def _schema(folder: str, counting: Iterable[Part]) -> pa.Schema:
    """The columns of all parts. Those of one generation have the same, as all tables of an input do: one is read."""
    examples = {part.generation: part for part in counting}.values()
    try:
        return pa.unify_schemas([parts.read_schema(folder, part) for part in examples])
    except pa.ArrowTypeError as error:
        raise PartError(
            f"A column of the Delta table {folder} would have two types: {_first_line(str(error))}. Classify all "
            "images anew with --overwrite."
        ) from None


def _first_line(text: str) -> str:
    return text.splitlines()[0].rstrip(".")
