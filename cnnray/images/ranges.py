"""Row ranges of a manifest: how its rows are cut into blocks, tasks and parts."""

import math
from collections.abc import Iterable, Iterator

import pyarrow as pa

from cnnray.images import parquet
from cnnray.images.geometry import Size

ROWS_PER_BLOCK = 256
"""Rows that a task reads and decodes; a block of 224x224 images then has 37 MiB."""

_BLOCK_BYTES = 64 * 2**20
_LARGE_GROUP, _MAX_RANGES_OF_A_GROUP = 4096, 8


def rows_per_block(size: Size) -> int:
    """Rows of one block, for images of this size."""
    return min(ROWS_PER_BLOCK, max(16, _BLOCK_BYTES // size.bytes))


def split_rows(uris: pa.ChunkedArray, rows: int, *, cut_groups: bool = False) -> list[tuple[int, int]]:
    """Cut a manifest into ranges of `rows` rows. Row groups stay whole, because a group is read from its start.

    Args:
        uris: the manifest's column.
        rows: rows of a range; the last may have fewer, and ranges with row groups may have more.
        cut_groups: whether to cut row groups of more than 4096 rows into at most 8 ranges; each of these also reads
            the rows before it in the group.

    Returns:
        the first row of each range, and the row after its last.
    """
    return list(ranges_of_stream(uris.chunks, rows, cut_groups=cut_groups))


def ranges_of_stream(chunks: Iterable[pa.Array], rows: int, *, cut_groups: bool = False) -> Iterator[tuple[int, int]]:
    """`split_rows` for a column that comes in chunks.

    They are read no further than to the end of a range, or of the row group after it.
    """
    cut = start = 0
    for group, length in parquet.runs(chunks, parquet.groups_of):
        stop = start + length
        cuts: Iterable[int] = ()
        if group is None:
            cuts = range(max(cut + rows, start), stop, rows)
        else:
            large = cut_groups and length > max(rows, _LARGE_GROUP)
            if start > cut and (large or start - cut >= rows):
                cuts = [start]
            if large:
                step = max(rows, _LARGE_GROUP, math.ceil(length / _MAX_RANGES_OF_A_GROUP))
                cuts = [*cuts, *range(start + step, stop, step)]
        for new in cuts:
            yield cut, new
            cut = new
        start = stop
    if start:
        yield cut, start
