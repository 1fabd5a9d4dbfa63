"""The manifest of a large run: Parquet files (shards) in a folder, written while the listing goes on.

A shard is called `rows-FIRST.parquet` by the id of its first row. Each of its row groups is a range of the manifest:
the rows of one part of the output. Rows have the columns `id` (int64, ascending), `uri`, the user's own columns, and
`inputs.VERSION`; after an update also `CHANGED`.
"""

import io
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cnnray.images import ahead, manifest, parquet, storage
from cnnray.images.ranges import ranges_of_stream
from cnnray.images.retries import patient

FORMAT = 2
"""Number of the manifest format (see `manifest.FORMAT`)."""
CHANGED = "__changed"
"""Column of an updated manifest: whether the row was new or had changed in the last update."""

_GENERATIONS_KEY = b"cnnray.generations"
_COMPLETE = "complete.json"
_MOST_RANGES = 256
_THREADS = 8


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """One row group of a shard: the rows of one part of the output."""

    first: int
    """Id of its first row."""
    last: int
    """Id of its last row; after an update, ids between them may be missing."""
    rows: int
    shard: int
    """Names the shard: id of its first row."""
    group: int
    """Index of the row group in the shard."""
    generation: int
    """Number of the run or update that classified it last."""


def write(
    folder: str,
    tables: Iterable[pa.Table],
    *,
    rows_per_range: int,
    generation: int,
    first_id: int = 0,
    after: str | int | None = None,
) -> Iterator[Range]:
    """Number rows, and store them in shards.

    The first shard has one range, and each next one twice as many, up to 256, so that work begins early.

    Args:
        folder: of the shards.
        tables: see `inputs.Input.tables`.
        rows_per_range: see `ranges.split_rows`, with `cut_groups`.
        generation: of all ranges.
        first_id: id of the first row; the ids after it are dense.
        after: where a listing that was killed goes on. A uri: rows up to it are left out, which must be ascending.
            A number: so many rows are left out. None: no rows.

    Yields:
        the ranges of each shard, once it is stored.

    Raises:
        OSError: storage that cannot be written.
    """
    rest = tables if after is None else _rows_after(tables, after)
    return write_ranges(folder, _numbered_ranges(rest, rows_per_range, generation, first_id))


def _rows_after(tables: Iterable[pa.Table], after: str | int) -> Iterator[pa.Table]:
    for table in tables:
        if isinstance(after, int):
            count = min(after, len(table))
            after -= count
        elif len(table) and table["uri"][-1].as_py() <= after:
            count = len(table)
        else:
            count = pc.sum(pc.less_equal(table["uri"], after)).as_py() or 0
        if count < len(table):
            yield table.slice(count)


def _numbered_ranges(
    tables: Iterable[pa.Table], rows: int, generation: int, first_id: int
) -> Iterator[tuple[pa.Table, int]]:
    held: deque[pa.Table] = deque()

    def uris() -> Iterator[pa.Array]:
        for table in tables:
            held.append(table)
            yield from table["uri"].chunks

    for start, stop in ranges_of_stream(uris(), rows, cut_groups=True):
        ids = pa.array(np.arange(first_id + start, first_id + stop, dtype=np.int64))
        yield _taken(held, stop - start).add_column(0, "id", ids), generation


def _taken(held: deque[pa.Table], rows: int) -> pa.Table:
    """Take so many rows from the front of `held`."""
    taken = []
    while rows:
        table = held.popleft()
        if len(table) > rows:
            held.appendleft(table.slice(rows))
        taken.append(table.slice(0, rows))
        rows -= len(taken[-1])
    return pa.concat_tables(taken)


def write_ranges(folder: str, ranged_tables: Iterable[tuple[pa.Table, int]]) -> Iterator[Range]:
    """Store ranges in shards, of sizes as `write` makes them.

    Args:
        folder: of the shards.
        ranged_tables: the rows of each range, with the column `id`, and its generation. All tables have the same
            columns.

    Yields:
        the ranges of each shard, once it is stored.

    Raises:
        OSError: storage that cannot be written.
    """
    ranged_tables, most = iter(ranged_tables), 1
    while first := next(ranged_tables, None):
        yield from _write_shard(folder, itertools.chain([first], itertools.islice(ranged_tables, most - 1)))
        most = min(2 * most, _MOST_RANGES)


def _write_shard(folder: str, ranged_tables: Iterator[tuple[pa.Table, int]]) -> list[Range]:
    """Store a shard. Its rows are compressed range by range, so that they are not all in memory."""
    first = next(ranged_tables)
    columns = first[0].schema.remove_metadata()
    shard = first[0]["id"][0].as_py()
    ranges: list[Range] = []
    buffer = io.BytesIO()
    repeating = [name for name in columns.names if name not in ("id", "uri")]
    with pyarrow.parquet.ParquetWriter(
        buffer, columns, compression="zstd", use_dictionary=repeating, write_statistics=["id"]
    ) as writer:
        for table, generation in itertools.chain([first], ranged_tables):
            writer.write_table(table.replace_schema_metadata(None), row_group_size=len(table))
            ids = table["id"]
            ranges.append(Range(ids[0].as_py(), ids[-1].as_py(), len(ids), shard, len(ranges), generation))
        generations = json.dumps([range_.generation for range_ in ranges]).encode()
        writer.add_key_value_metadata({manifest.FORMAT_KEY: str(FORMAT).encode(), _GENERATIONS_KEY: generations})
    storage.write_bytes(_uri(folder, shard), buffer.getvalue())
    return ranges


def _uri(folder: str, shard: int) -> str:
    return storage.join(folder, f"rows-{shard:012d}.parquet")


def finish(folder: str, **facts: Any) -> None:
    """Mark a manifest as complete.

    Args:
        folder: of the shards.
        facts: kept for `read_facts`, as JSON.
    """
    storage.write_bytes(storage.join(folder, _COMPLETE), json.dumps(facts).encode())


def read_facts(folder: str) -> dict[str, Any] | None:
    """The facts that `finish` kept; None for a manifest that is not complete."""
    try:
        facts: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, _COMPLETE)))
    except storage.NotFoundError:
        return None
    return facts


def ranges(folder: str) -> Iterator[Range]:
    """The ranges of the stored shards, in order. Only the footers of the files are read.

    Raises:
        ManifestError: a later version of cnnray wrote them.
        OSError: storage that cannot be read.
    """
    for shard in ahead.mapped(_shard_ranges, _shards(folder), _THREADS):
        yield from shard


def _shards(folder: str) -> list[str]:
    """The uris of the shards, in the order of their ids."""
    if not storage.exists(folder):
        return []
    uris = [file.uri for file in storage.files(folder)]
    return [uri for uri in uris if storage.name(uri).startswith("rows-") and uri.endswith(".parquet")]


@patient
def _shard_ranges(uri: str) -> list[Range]:
    with storage.translated_errors(uri), parquet.open_file(uri) as opened:
        metadata = opened.metadata
        generations = json.loads(_checked(metadata, uri)[_GENERATIONS_KEY])
        found: list[Range] = []
        for group, generation in enumerate(generations):
            rows = metadata.row_group(group)
            ids = rows.column(0).statistics
            shard = found[0].first if found else ids.min
            found.append(Range(ids.min, ids.max, rows.num_rows, shard, group, generation))
        return found


def _checked(metadata: Any, uri: str) -> dict[bytes, bytes]:
    """The metadata of a shard whose format is known."""
    values: dict[bytes, bytes] = metadata.metadata or {}
    manifest.check_format(values, uri, FORMAT)
    return values


@patient
def read(folder: str, range_: Range, columns: list[str] | None = None) -> pa.Table:
    """The rows of one range. In a bucket only its bytes are read.

    Args:
        folder: of the shards.
        range_: one of `ranges`.
        columns: which to read; None: all.

    Raises:
        ManifestError: a later version of cnnray wrote it.
        OSError: storage that cannot be read.
    """
    uri = _uri(folder, range_.shard)
    with storage.translated_errors(uri), parquet.open_file(uri) as opened:
        _checked(opened.metadata, uri)
        table = opened.read_row_group(range_.group, columns=columns, use_threads=False)
    return table.select(columns) if columns else table


def last_row(folder: str) -> tuple[int, str] | None:
    """Where the listing of a manifest ended: the next id, and the uri of the last row; None: no row is stored."""
    shards = _shards(folder)
    if not shards:
        return None
    last = _shard_ranges(shards[-1])[-1]
    uris = read(folder, last, ["uri"])["uri"]
    return last.last + 1, uris[-1].as_py()
