"""The manifest of a run: it is listed into shards, continued where a listing was killed, or updated."""

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import waiting
from cnnray.images import database, inputs, shards, storage
from cnnray.images.inputs import Input
from cnnray.images.listing import ManifestError, shorten
from cnnray.images.reading import FEW_IMAGES
from cnnray.images.shards import Range
from cnnray.prediction import delta
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.worker import RESERVED, rename_reserved

log = logging.getLogger(__name__)

FOLDER = "manifest"
"""In the output; holds a folder for each generation."""
_MANY = 2**18
"""Images beyond which ranges have `rows_per_part` rows. Fewer images have smaller ranges, so that many workers get
some."""
_RANGES, _FEWEST_ROWS = 64, 512
_NEXT_ID = "next_id"
"""Fact of a complete manifest: the id that the next new image gets."""
_SAMPLE_RANGES, _SAMPLE_ROWS, _SAMPLED_TABLES = 8, 32, 16


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a run, whose listing may still go on."""

    generation: int
    folder: str
    """Of its shards."""
    ranges: Iterable[Range]
    """In order. Unless `is_listed`, images are listed and stored as the ranges are taken."""
    example: str
    """Uri of an image."""
    rows: int | None
    """Number of images, if it is known."""
    is_listed: bool = False
    """Whether all shards are stored."""


def folder_of(config: PredictConfig, generation: int) -> str:
    """The folder of a generation's shards."""
    return storage.join(config.output, FOLDER, str(generation))


def begin(config: PredictConfig, generation: int) -> Manifest:
    """List the input of a run that begins anew.

    A table is listed and checked as a whole; the images of a folder while they are classified.

    Raises:
        ManifestError, OSError: with a sentence for the user; nothing is left in the output then.
    """
    folder = folder_of(config, generation)
    storage.delete_folder(folder)
    source = _open(config)
    few = list(_first(source.tables, FEW_IMAGES + 1))
    rows = sum(map(len, few))
    more = waiting.in_background(lambda: list(_first(source.tables, _MANY + 1 - rows)))  # while Ray starts

    def write() -> Iterator[Range]:
        head = few + more.result()
        tables = itertools.chain(head, source.tables)
        yield from _write(config, folder, tables, generation, sum(map(len, head)))

    if source.is_table:
        try:
            ranges = list(write())
            _check_distinct(config.input, folder)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that ended the listing is the one to be told
                storage.delete_folder(folder)
                if not storage.folders(all_of_them := storage.join(config.output, FOLDER)):
                    storage.delete_folder(all_of_them)
            raise
        return _listed(folder, generation, ranges)
    return Manifest(
        generation=generation,
        folder=folder,
        ranges=write(),
        example=few[0]["uri"][0].as_py(),
        rows=rows if rows <= FEW_IMAGES else None,
    )


def proceed(config: PredictConfig, generation: int) -> Manifest:
    """Read the manifest of a run that goes on, and list the rest of its images if the listing was killed.

    Raises:
        ManifestError, OSError: with a sentence for the user.
    """
    folder = folder_of(config, generation)
    ranges = list(shards.ranges(folder))
    if shards.read_facts(folder) is not None:
        return _listed(folder, generation, ranges)
    last = shards.last_row(folder)
    if last is None:
        return begin(config, generation)
    log.info("the listing of %s goes on after %s", config.input, last[1])
    rest = _write(config, folder, _open(config).tables, generation, _MANY + 1, first_id=last[0], after=last[1])
    return Manifest(
        generation=generation, folder=folder, ranges=itertools.chain(ranges, rest), example=last[1], rows=None
    )


def update(config: PredictConfig, before: int, is_committed: Callable[[Range], bool]) -> Manifest | None:
    """Compare the input with the manifest of a run, and store that of the next generation.

    Images that are still there keep their ids and ranges. A range with an image that changed or is gone gets the next
    generation. New images get new ids, and ranges of their own. Images of a range without a part count as changed:
    the rows that an earlier part has of them may be of images before an update that was cut off.

    Args:
        config: of the run.
        before: generation of its manifest.
        is_committed: whether a range of that manifest has a part.

    Returns:
        None where nothing has changed, or nothing was listed yet.

    Raises:
        ManifestError, OSError: with a sentence for the user.
    """
    old, generation = folder_of(config, before), before + 1
    folder = folder_of(config, generation)
    storage.delete_folder(folder)
    ranges = list(shards.ranges(old))
    if not ranges:
        return None
    now = _open(config, shards.read(old, ranges[0]).schema).tables
    with database.compare((shards.read(old, range_) for range_ in ranges), now) as comparison:
        if comparison.repeated:
            raise _repeated(config.input, comparison.repeated)
        log.info(
            "%d images are new, %d have changed, %d are gone",
            comparison.new_rows,
            comparison.changed,
            comparison.gone,
        )
        if not (comparison.new_rows or comparison.changed or comparison.gone):
            return None

        def updated() -> Iterator[tuple[pa.Table, int]]:
            for range_ in ranges:
                kept = comparison.kept(range_.first, range_.last)
                is_same = len(kept) == range_.rows and not pc.any(kept[shards.CHANGED]).as_py()
                if len(kept):
                    rows = kept if is_committed(range_) else _marked(kept.drop_columns([shards.CHANGED]))
                    yield rows, range_.generation if is_same else generation

        new_ranges = list(shards.write_ranges(folder, updated()))
        facts = shards.read_facts(old) or {}
        next_id = max(ranges[-1].last + 1, facts.get(_NEXT_ID, 0))  # ids of images that are gone are not used again
        new = (_marked(table) for table in comparison.new())
        new_ranges += _write(config, folder, new, generation, comparison.new_rows, first_id=next_id)
    return _listed(folder, generation, new_ranges)


def sample(config: PredictConfig) -> tuple[int, pa.Table]:
    """The number of images of the input, and short runs of rows from all over it.

    Neighbouring rows are taken, because a run reads containers in order, too.

    Raises:
        ManifestError, OSError: with a sentence for the user.
    """
    rows, every, sampled = 0, 1, []
    for number, table in enumerate(_open(config).tables):
        ids = pa.array(np.arange(rows, rows + len(table)))
        rows += len(table)
        if number % every == 0:
            sampled.append(_runs_of(table.add_column(0, "id", ids)))
        if len(sampled) > _SAMPLED_TABLES:
            sampled, every = sampled[::2], 2 * every
    return rows, _runs_of(pa.concat_tables(sampled)).drop_columns([inputs.VERSION])


def _runs_of(table: pa.Table) -> pa.Table:
    starts = np.linspace(0, max(len(table) - _SAMPLE_ROWS, 0), _SAMPLE_RANGES).astype(np.int64)
    rows = np.unique(np.add.outer(starts, np.arange(_SAMPLE_ROWS)))
    return table.take(pa.array(rows[rows < len(table)]))


def _listed(folder: str, generation: int, ranges: list[Range]) -> Manifest:
    return Manifest(
        generation=generation,
        folder=folder,
        ranges=ranges,
        example=shards.read(folder, ranges[0])["uri"][0].as_py(),
        rows=sum(range_.rows for range_ in ranges),
        is_listed=True,
    )


def _write(
    config: PredictConfig,
    folder: str,
    tables: Iterator[pa.Table],
    generation: int,
    rows: int,
    first_id: int = 0,
    after: str | None = None,
) -> Iterator[Range]:
    """Store tables as shards, and mark the listing as complete.

    Args:
        config: of the run.
        folder: of the shards.
        tables: rows of the input.
        generation: of the ranges.
        rows: number of rows, or one from `_MANY` on.
        first_id, after: see `shards.write`.
    """
    last = first_id - 1
    for range_ in shards.write(
        folder,
        tables,
        rows_per_range=rows_per_range(rows, config.rows_per_part),
        generation=generation,
        first_id=first_id,
        after=after,
    ):
        last = range_.last
        yield range_
    shards.finish(folder, **{_NEXT_ID: last + 1})


def rows_per_range(rows: int, rows_per_part: int) -> int:
    """The number of rows of a range, but for the last.

    Args:
        rows: of the input, or one number from `_MANY` on.
        rows_per_part: of the run.
    """
    return rows_per_part if rows > _MANY else min(rows_per_part, max(_FEWEST_ROWS, math.ceil(rows / _RANGES)))


def _open(config: PredictConfig, before: pa.Schema | None = None) -> Input:
    """The first `config.limit` images of the input.

    Args:
        config: of the run.
        before: the columns of the manifest that is updated.

    Raises:
        ColumnError, ManifestError, OSError: with a sentence for the user, also while the tables are taken.
    """
    source = inputs.open_input(config.input)
    tables = _limited(source.tables, config.limit)
    return dataclasses.replace(source, tables=_storable(tables, before) if config.format == "delta" else tables)


def _storable(tables: Iterator[pa.Table], before: pa.Schema | None) -> Iterator[pa.Table]:
    """The same tables, whose columns a Delta table can have beside those of predictions, with the types of before."""
    for table in tables:
        columns = rename_reserved(table.slice(0, 0).drop_columns([inputs.VERSION])).schema
        predictions = [pa.field(name, pa.string()) for name in ("id", *RESERVED)]
        delta.storable(pa.schema([*columns, *predictions]))
        # Where the columns are others, all rows have changed.
        if before is not None and set(before.names) - {"id", shards.CHANGED} == set(table.column_names):
            delta.check_types(before, table.schema)
        yield table


def _limited(tables: Iterator[pa.Table], rows: int | None) -> Iterator[pa.Table]:
    """The first rows."""
    for table in tables:
        yield table if rows is None else table.slice(0, rows)
        if rows is not None and (rows := rows - len(table)) <= 0:
            return


def _first(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Tables until they have so many rows together."""
    for table in tables:
        yield table
        rows -= len(table)
        if rows <= 0:
            return


def _marked(table: pa.Table) -> pa.Table:
    return table.append_column(shards.CHANGED, pa.array(np.ones(len(table), bool)))


def _check_distinct(source: str, folder: str) -> None:
    """
    Raises:
        ManifestError: an image is listed more than once.
    """

    def uris() -> Iterator[pa.RecordBatch]:
        for range_ in shards.ranges(folder):
            yield from shards.read(folder, range_, columns=["uri"]).to_batches()

    if repeated := database.repeated_uris(uris):
        raise _repeated(source, repeated)


def _repeated(source: str, uris: list[str]) -> ManifestError:
    return ManifestError(f"{source}: the same image is listed more than once: {shorten(uris)}.")
