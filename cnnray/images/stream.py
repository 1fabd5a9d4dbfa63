"""Manifest rows to decoded images: the only place that reads with Ray Data."""

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray.data

from cnnray.images import containers, reading
from cnnray.images.decode import ResizeRule
from cnnray.images.reading import Batch

ROWS_PER_BLOCK = 256
"""Rows that one task reads and decodes; a block of 224x224 images then holds 37 MiB."""

_BLOCK_BYTES = 64 * 2**20


def decoded(
    manifest: pa.Table, size: int, *, resize: ResizeRule = "stretch", cpus_per_task: float = 1.0
) -> ray.data.Dataset:
    """Stream the images of a manifest, one row out for each row in, in the manifest's order.

    Reading and decoding are fused in one task a block of `ROWS_PER_BLOCK` rows (fewer where images are
    large), so that pixels are only ever produced where memory for them is budgeted. A row group of a Parquet file
    that holds images is one task; Ray cuts its rows into blocks of its target size.

    Args:
        manifest: rows with `id` and `uri`; its other columns pass through.
        size: height and width in pixels.
        resize: see `decode`.
        cpus_per_task: CPUs that Ray reserves for a task; below 1 where few CPUs are free (a stream whose task
            can never be scheduled waits for ever, and says nothing).

    Returns:
        A dataset of the manifest's columns and `image`, uint8 (size, size, 3), zeros where it could not be
        decoded, and `error`, a string, empty where it could.
    """
    rows = rows_per_block(size)
    return tasks(manifest, pieces(manifest["uri"].to_pylist(), rows)).map_batches(
        reading.decoded_blocks,
        fn_kwargs={"size": size, "resize": resize, "rows_per_block": rows},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus_per_task,
        zero_copy_batch=True,
    )


def rows_per_block(size: int) -> int:
    """Rows that are decoded at once, by the images' height and width."""
    return min(ROWS_PER_BLOCK, max(16, _BLOCK_BYTES // (size * size * 3)))


def pieces(uris: list[str], rows: int) -> list[tuple[int, int]]:
    """Cut a manifest every `rows` rows, but not within a row group, which is read as a whole.

    Returns:
        the first row of each piece, and that after its last.
    """
    cuts = [0]
    for index in range(1, len(uris)):
        if index - cuts[-1] >= rows:
            group = containers.group_of(uris[index])
            if group is None or group != containers.group_of(uris[index - 1]):
                cuts.append(index)
    return list(itertools.pairwise([*cuts, len(uris)])) if uris else []


def tasks(manifest: pa.Table, ranges: list[tuple[int, int]]) -> ray.data.Dataset:
    """The given rows of a manifest as a dataset whose blocks, one a task, are these ranges."""
    # Not from_arrow, which runs a task of one CPU for its metadata, and so may wait for ever.
    return ray.data.from_blocks([manifest.slice(start, stop - start).combine_chunks() for start, stop in ranges])


def be_quiet() -> None:
    """Keep Ray Data in this process from announcing each execution; the jobs show progress of their own."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def in_order(dataset: ray.data.Dataset, prefetch_blocks: int = 2) -> Iterator[Batch]:
    """The dataset's blocks as NumPy batches, in order and of the size that the tasks gave them."""
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch_blocks)


def batches_of(blocks: Iterator[Batch], sizes: Iterator[int]) -> Iterator[Batch]:
    """Cut a stream of blocks into batches of the given sizes.

    Raises:
        RuntimeError: the blocks hold fewer or more rows than the sizes ask for.
    """
    held = next(blocks, {"id": np.empty(0, np.int64)})
    for size in sizes:
        parts = []
        while size > len(held["id"]):
            parts.append(held)
            size -= len(held["id"])
            block = next(blocks, None)
            if block is None:
                raise RuntimeError(f"The stream ended {size} rows early.")
            held = block
        parts.append({name: values[:size] for name, values in held.items()})
        held = {name: values[size:] for name, values in held.items()}
        yield _concatenated(parts)
    if len(held["id"]) or next(blocks, None) is not None:
        raise RuntimeError("The stream holds more rows than were asked for.")


def _concatenated(parts: list[Batch]) -> Batch:
    filled = [part for part in parts if len(part["id"])] or parts[-1:]
    if len(filled) == 1:
        return filled[0]
    return {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}
