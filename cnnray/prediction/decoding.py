"""Reads and decodes the images of a range in Ray tasks, on nodes that have CPUs to spare."""

import collections
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cnnray.errors import TransientError
from cnnray.images.ranges import rows_per_block
from cnnray.prediction.plan import Plan
from cnnray.prediction.worker import Worker

_AHEAD = 4
"""Blocks of a range that are decoded, or wait for it, at once."""


class CrashedError(TransientError):
    """A task that ended its process, each time that it was tried."""


def in_tasks(plan: Plan, rows: pa.Table, worker: Worker) -> Iterator[pa.Table]:
    """Classify rows of a manifest whose images are decoded in tasks.

    Args:
        plan: of the run.
        rows: with `id` and `uri`.
        worker: classifies them.

    Raises:
        CrashedError: an image ended the process that decoded it.

    Yields:
        the rows with their predictions, in their order.
    """
    import ray

    decode = ray.remote(num_cpus=plan.pool.decode_cpus, max_retries=1)(worker.decode_rows)
    geometry = plan.bundle.info.geometry
    pending: collections.deque[Any] = collections.deque()
    starts = collections.deque(range(0, len(rows), step := rows_per_block(geometry.image_size)))
    while starts or pending:
        while starts and len(pending) < _AHEAD:
            block = rows.slice(starts.popleft(), step).combine_chunks()
            pending.append((block, decode.remote(block, geometry)))
        block, reference = pending.popleft()
        try:
            decoded = ray.get(reference)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise CrashedError("an image ended the process that decoded it, or memory ran out") from error
        except (ray.exceptions.ObjectLostError, ray.exceptions.NodeDiedError):  # with its node, also when tried again
            decoded = worker.decode_rows(block, geometry)
        yield from worker(decoded)
