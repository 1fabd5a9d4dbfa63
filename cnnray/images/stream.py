"""Read manifest rows into a Ray Dataset of decoded images: the only module that reads with Ray Data."""

import logging

import pyarrow as pa
import ray.data

from cnnray.images import checks, reading
from cnnray.images.geometry import Geometry
from cnnray.images.ranges import ROWS_PER_BLOCK, rows_per_block, split_rows

log = logging.getLogger(__name__)


def decoded(
    manifest: pa.Table,
    geometry: Geometry,
    *,
    cpus_per_task: float = 1.0,
    keep_unavailable: bool = False,
) -> ray.data.Dataset:
    """Stream the images of a manifest, one row out for each row in, in the manifest's order.

    A task reads and decodes a block of `ROWS_PER_BLOCK` rows (fewer of large images), so that pixels are only
    produced where memory is reserved for them. A row group of a Parquet file is one task; Ray cuts its rows into
    blocks of its target size.

    Args:
        manifest: rows with `id` and `uri`; its other columns pass through.
        geometry: see `decode`.
        cpus_per_task: CPUs that Ray reserves for a task; less than 1 if few CPUs are free. (A stream whose task can
            never be scheduled waits for ever, without a message.)
        keep_unavailable: see `reading.decoded_blocks`; without it, trouble of storage fails the dataset.

    Returns:
        A dataset with the manifest's columns; `image`, uint8 (height, width, 3), zeros where decoding failed; and
        `error`, a string, empty where decoding succeeded.
    """
    rows = rows_per_block(geometry.image_size)
    return from_ranges(manifest, split_rows(manifest["uri"], rows)).map_batches(
        reading.decoded_blocks,
        fn_kwargs={
            "geometry": geometry,
            "rows_per_block": rows,
            "keep_unavailable": keep_unavailable,
        },
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus_per_task,
        zero_copy_batch=True,
    )


def check(manifest: pa.Table, cpus_per_task: float = 1.0, *, keep_unavailable: bool = False) -> checks.CheckResult:
    """Read all images of a manifest and say what is wrong with them.

    Args:
        manifest: rows with `id`, `uri`, `label` and `split`.
        cpus_per_task: see `decoded`.
        keep_unavailable: whether images whose storage is in trouble count as unreadable.

    Raises:
        UnavailableError: storage is in trouble, and `keep_unavailable` is not set.
    """
    rows = manifest.select(["id", "uri"])
    if (parts := reading.loaded_if_few(rows)) is not None:
        tables = [table for part, encoded in parts for table in checks.examine(part, iter(encoded))]
        examined = pa.concat_tables(tables)
    else:
        dataset = from_ranges(rows, split_rows(rows["uri"], ROWS_PER_BLOCK)).map_batches(
            checks.examine, batch_size=None, batch_format="pyarrow", num_cpus=cpus_per_task
        )
        examined = pa.concat_tables(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    return checks.check(manifest, examined, keep_unavailable=keep_unavailable)


def check_if_small(
    manifest: pa.Table, cpus_per_task: float = 1.0, *, keep_unavailable: bool = False
) -> checks.CheckResult | None:
    """Run `check` as part of another job, if there are at most `checks.MAX_AUTOMATIC` images.

    Returns:
        The result; None, after a log line that says why, if there are more images, or if the check fails in
        Ray, for example because an image crashes its worker.

    Raises:
        UnavailableError: see `check`.
    """
    if len(manifest) > checks.MAX_AUTOMATIC:
        log.info("%d images are too many to check here: run jobs/evaluate.py --check-data", len(manifest))
        return None
    log.info("checking %d images", len(manifest))
    try:
        return check(manifest, cpus_per_task, keep_unavailable=keep_unavailable)
    except ray.exceptions.RayError as error:
        log.warning("the images could not be checked: %s", str(error).strip().splitlines()[-1])
        return None


def from_ranges(manifest: pa.Table, ranges: list[tuple[int, int]]) -> ray.data.Dataset:
    """A dataset of a manifest's rows with one block, and so one task, for each range."""
    # from_arrow would run a task of one CPU for the metadata, which may wait for ever.
    return ray.data.from_blocks([manifest.slice(start, stop - start).combine_chunks() for start, stop in ranges])


def silence_progress() -> None:
    """Stop Ray Data in this process from logging each execution: the jobs show progress of their own."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
