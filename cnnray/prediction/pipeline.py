"""Classifies the rows of a manifest as a Ray Dataset, for programs; jobs have `dispatch` and `ranges`.

Output rows come in any order; `worker` says which columns they have.
"""

import math

import pyarrow as pa
import ray.data

from cnnray.images import stream
from cnnray.images.ranges import rows_per_block, split_rows
from cnnray.prediction.plan import Plan
from cnnray.prediction.pool import Pool
from cnnray.prediction.worker import Worker

_MIN_ROWS_PER_TASK, _MAX_ROWS_PER_TASK = 32, 512


def predict(manifest: pa.Table, plan: Plan) -> ray.data.Dataset:
    """Lazily classify the images of a manifest: a dataset with one row for each row of the manifest.

    Args:
        manifest: rows with `id` and `uri`, in the order in which images are read.
        plan: the engine and the workers.
    """
    geometry, pool = plan.bundle.info.geometry, plan.pool
    rows = rows_per_block(geometry.image_size) if pool.decode_cpus else rows_per_task(len(manifest), pool)
    ranges = split_rows(manifest["uri"], rows)
    dataset = stream.from_ranges(manifest, ranges)
    block = max((end - start for start, end in ranges), default=1)
    if pool.decode_cpus:
        dataset = dataset.map_batches(
            Worker.decode_rows,
            fn_kwargs={"geometry": geometry},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=pool.decode_cpus,
            zero_copy_batch=True,
        )
    return dataset.map_batches(
        Worker,
        fn_constructor_kwargs={"plan": plan},
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
