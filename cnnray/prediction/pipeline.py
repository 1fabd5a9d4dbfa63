"""Runs a plan on the rows of a manifest: with Ray Data on a pool of workers.

Output rows come in any order; `worker` says which columns they have.
"""

import math

import pyarrow as pa
import ray.data

from cnnray.images import stream
from cnnray.images.ranges import rows_per_block, split_rows
from cnnray.prediction.ledger import create_ledger
from cnnray.prediction.plan import Plan
from cnnray.prediction.pool import Pool
from cnnray.prediction.worker import Worker, decode_rows

_MIN_ROWS_PER_TASK, _MAX_ROWS_PER_TASK = 32, 512


def predict(manifest: pa.Table, plan: Plan, ranges: list[tuple[int, int]] | None = None) -> ray.data.Dataset:
    """Lazily classify the images of a manifest: a dataset with one row for each row of the manifest.

    Args:
        manifest: rows with `id` and `uri`, in the order in which images are read.
        plan: the engine and the workers.
        ranges: the row range of each task: its first row, and the row after its last; None: tasks of equal size
            over all rows.
    """
    size, resize, pool = plan.bundle.info.image_size, plan.bundle.info.resize, plan.pool
    if ranges is None:
        ranges = split_rows(manifest["uri"], rows_per_task(len(manifest), pool))
    dataset, ledger = stream.from_ranges(manifest, ranges), create_ledger()
    block = rows_per_block(size) if pool.decode_cpus else max((end - start for start, end in ranges), default=1)
    if pool.decode_cpus:
        dataset = dataset.map_batches(
            decode_rows,
            fn_kwargs={
                "size": size, "resize": resize, "rows_per_block": rows_per_block(size), "ledger": ledger,
            },
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=pool.decode_cpus,
            zero_copy_batch=True,
        )  # fmt: skip
    return dataset.map_batches(
        Worker,
        fn_constructor_kwargs={"plan": plan, "model": plan.bundle.version, "ledger": ledger},
        # A batch is a block. With GPUs Ray Data wants a number, by which it joins blocks that are shorter.
        batch_size=block if pool.gpus else None,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.smallest,
            max_size=pool.largest,
            initial_size=pool.first,
            max_tasks_in_flight_per_actor=2,
        ),
        zero_copy_batch=True,
    )


def rows_per_task(rows: int, pool: Pool) -> int:
    """Rows of one task: few enough that each worker gets several tasks, enough that starting a task costs little."""
    return min(_MAX_ROWS_PER_TASK, max(_MIN_ROWS_PER_TASK, math.ceil(rows / (4 * pool.first))))
