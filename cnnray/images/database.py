"""Questions about manifests that do not fit in memory, answered by DuckDB, which spills to a temporary folder."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from cnnray.images import storage
from cnnray.images.shards import CHANGED

if TYPE_CHECKING:
    import duckdb

_MEMORY = "512MB"
_MOST_THREADS = 4
"""Each has buffers of its own, for which the memory would not be enough."""
_MOST_CANDIDATES = 10_000
_ROWS_AT_ONCE = 2**16

Rows = Iterable[pa.RecordBatch] | Iterable[pa.Table]


@contextlib.contextmanager
def _database() -> Iterator["duckdb.DuckDBPyConnection"]:
    """An empty database in a temporary folder."""
    import duckdb  # only large runs need it

    with tempfile.TemporaryDirectory(prefix="cnnray-database-") as folder:
        # With the order of insertion kept, larger parts of a table are in memory.
        options: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": _MEMORY,
            "temp_directory": f"{folder}/spilled",
            "threads": min(_MOST_THREADS, os.cpu_count() or 1),
            "preserve_insertion_order": False,
        }
        connection = duckdb.connect(f"{folder}/rows.duckdb", config=options)
        try:
            yield connection
        except duckdb.Error as error:
            reason = str(error).partition("\n")[0]
            raise storage.StorageError(
                f"DuckDB cannot compare the images ({reason}); what does not fit in memory is in {folder}; TMPDIR "
                "names another place."
            ) from error
        finally:
            connection.close()


def repeated_uris(batches: Callable[[], Rows], most: int = 6) -> list[str]:
    """Uris that occur more than once.

    Args:
        batches: gives the rows, which have a column `uri`. Called twice if any hash of a uri is repeated.
        most: number of uris that are returned.

    Returns:
        some of the repeated uris, sorted; none if all are distinct.
    """
    with _database() as connection:
        with _uris(connection, batches()):
            connection.execute(
                "CREATE TABLE candidates AS SELECT hash FROM (SELECT hash(uri) AS hash FROM stream) GROUP BY hash "
                f"HAVING count(*) > 1 ORDER BY hash LIMIT {_MOST_CANDIDATES}"
            )
        if not _count(connection, "candidates"):
            return []
        with _uris(connection, batches()):
            repeated = connection.execute(
                "SELECT uri FROM stream WHERE hash(uri) IN (FROM candidates) GROUP BY uri HAVING count(*) > 1 "
                f"ORDER BY uri LIMIT {most}"
            )
            return [uri for (uri,) in repeated.fetchall()]


def _count(connection: "duckdb.DuckDBPyConnection", rows: str) -> int:
    ((count,),) = connection.execute(f"SELECT count(*) FROM {rows}").fetchall()
    return int(count)


def _batches(rows: Rows) -> Iterator[pa.RecordBatch]:
    for part in rows:
        yield from part.to_batches(_ROWS_AT_ONCE) if isinstance(part, pa.Table) else [part]


def _opened(rows: Rows) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The columns of some rows, and the rows in batches."""
    batches = _batches(rows)
    first = next(batches, None)
    if first is None:
        raise ValueError("expected at least one batch of rows")
    return first.schema, itertools.chain([first], batches)


@contextlib.contextmanager
def _stream(
    connection: "duckdb.DuckDBPyConnection", schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> Iterator[None]:
    """Let queries read rows, once, as `stream`. An error of `batches` is raised as it is, and not as DuckDB's."""
    errors: list[Exception] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            errors.append(error)
            raise

    connection.register("stream", pa.RecordBatchReader.from_batches(schema, watched()))
    try:
        yield
    except Exception:
        if errors:
            raise errors[0] from None
        raise
    finally:
        connection.unregister("stream")


@contextlib.contextmanager
def _uris(connection: "duckdb.DuckDBPyConnection", rows: Rows) -> Iterator[None]:
    """The column `uri` as `stream`."""
    schema, batches = _opened(rows)
    columns = ["uri"]
    with _stream(connection, pa.schema([schema.field("uri")]), (batch.select(columns) for batch in batches)):
        yield


class Comparison:
    """How the images of an input have changed since a manifest was made. Made by `compare`; a context manager."""

    gone: int
    """Rows of the manifest that the input no longer has."""
    changed: int
    """Rows with another version, or another value in any column."""
    new_rows: int
    """Rows that the manifest does not have."""
    repeated: list[str]
    """Some uris that the input has more than once. Then there are no other results."""

    def __init__(self, before: Rows, now: Rows) -> None:
        self._closing = contextlib.ExitStack()
        self._connection = self._closing.enter_context(_database())
        try:
            self._compare(before, now)
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def _compare(self, before: Rows, now: Rows) -> None:
        self.gone = self.changed = self.new_rows = 0
        (old_schema, old_rows), (self._schema, rows) = _opened(before), _opened(now)
        columns = [name for name in old_schema.names if name not in ("id", CHANGED)]
        is_same_set = set(columns) == set(self._schema.names)
        # Columns have numbers, because DuckDB takes Label and label for the same name.
        names = ["uri", *(name for name in self._schema.names if name != "uri")]
        self._columns = {name: f"c{number}" for number, name in enumerate(names)}
        self._load("now", self._schema, rows, names, numbered=True)
        self.repeated = [
            uri for (uri,) in self._rows("SELECT c0 FROM now GROUP BY c0 HAVING count(*) > 1 ORDER BY c0 LIMIT 6")
        ]
        if self.repeated:
            return
        shared = [name for name in names if name in columns]
        self._load("before", old_schema, old_rows, ["id", *shared])
        differences = [self._difference(name, old_schema) for name in shared if name != "uri"]
        changed = " OR ".join(differences) if is_same_set else "true"
        self._connection.execute("SET preserve_insertion_order = true")  # ids are then found by a search
        self._connection.execute(
            f"CREATE TABLE kept AS SELECT before.id, now.*, {changed or 'false'} AS changed "
            "FROM before JOIN now ON before.c0 = now.c0 ORDER BY before.id"
        )
        kept, self.changed = self._rows("SELECT count(*), count(*) FILTER (changed) FROM kept")[0]
        self.gone = _count(self._connection, "before") - kept
        self.new_rows = _count(self._connection, "now") - kept

    def _difference(self, name: str, old: pa.Schema) -> str:
        column = self._columns[name]
        kind = "::VARCHAR" if old.field(name).type != self._schema.field(name).type else ""
        return f"(before.{column}{kind} IS DISTINCT FROM now.{column}{kind})"

    def _load(
        self,
        table: str,
        schema: pa.Schema,
        rows: Iterator[pa.RecordBatch],
        names: list[str],
        *,
        numbered: bool = False,
    ) -> None:
        """Store columns of some rows; with `numbered` also their positions, as `position`."""
        columns = [self._columns.get(name, name) for name in names] + ["position"] * numbered
        kinds = [schema.field(name).type for name in names] + [pa.int64()] * numbered
        kinds = [pa.string() if pa.types.is_null(kind) else kind for kind in kinds]

        def renamed() -> Iterator[pa.RecordBatch]:
            position = 0
            for batch in rows:
                values = [batch.column(name) for name in names]
                if numbered:
                    values.append(pa.array(np.arange(position, position + len(batch))))
                    position += len(batch)
                values = [value.cast(kind) for value, kind in zip(values, kinds, strict=True)]
                yield pa.RecordBatch.from_arrays(values, columns)

        with _stream(self._connection, pa.schema(list(zip(columns, kinds, strict=True))), renamed()):
            self._connection.execute(f"CREATE TABLE {table} AS FROM stream")

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(query).fetchall()

    def kept(self, first: int, last: int) -> pa.Table:
        """The rows of the manifest with ids from `first` to `last` that the input still has, in the order of ids.

        Returns:
            `id`, the columns of the input with their values now, and `CHANGED`: whether a value differs.
        """
        query = f"SELECT * FROM kept WHERE id BETWEEN {int(first)} AND {int(last)} ORDER BY id"
        table = self._results(query).read_all()
        rows = self._with_names(table).add_column(0, "id", table["id"].cast(pa.int64()))
        return rows.append_column(CHANGED, table["changed"])

    def new(self) -> Iterator[pa.Table]:
        """The rows of the input that the manifest does not have, in the order of the input."""
        query = "SELECT * FROM now WHERE NOT EXISTS (FROM before WHERE before.c0 = now.c0) ORDER BY position"
        for batch in self._results(query):
            if len(batch):
                yield self._with_names(pa.Table.from_batches([batch]))

    def _results(self, query: str) -> Any:
        """The results as a stream; others may be read at the same time."""
        return self._connection.cursor().sql(query).to_arrow_reader(_ROWS_AT_ONCE)

    def _with_names(self, table: pa.Table) -> pa.Table:
        """The columns of the input, of their types."""
        columns = [
            pa.nulls(len(table), field.type)
            if pa.types.is_null(field.type)
            else table[self._columns[field.name]].cast(field.type)
            for field in self._schema
        ]
        return pa.table(columns, schema=self._schema)


def compare(before: Rows, now: Rows) -> Comparison:
    """Compare an input with an earlier manifest of it, without either in memory.

    Args:
        before: rows of the manifest, in the order of ids: `id`, `uri`, `VERSION`, and the user's own columns;
            `CHANGED` is ignored.
        now: rows of the input: `uri`, `VERSION`, and the user's own columns.

    Returns:
        What has changed. A row has changed if any column differs; two nulls are equal. If the input has other
        columns than the manifest, all rows have changed.
    """
    return Comparison(before, now)
