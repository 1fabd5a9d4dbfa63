"""Where a worker's images come from: streamed anew each epoch, or decoded once into Ray's object store."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data

from cnnray.images import stream
from cnnray.images.decode import ResizeRule
from cnnray.images.reading import Batch


class Source(Protocol):
    """Gives the images of chosen rows of a manifest, in order."""

    def batches(self, rows: npt.NDArray[np.int64], sizes: list[int]) -> Iterator[Batch]:
        """The rows' images in batches of `sizes`: dicts of `id` int64 (n,), `target` int64 (n,) (the class's
        index), `image` uint8 (n, size, size, 3), `error` (n,) strings and `uri` (n,) strings."""
        ...


@dataclass(frozen=True, kw_only=True)
class StreamedSource:
    """Reads and decodes in Ray tasks while the network trains.

    Each worker runs its own pipeline over its own rows: Ray Train's shared one (`streaming_split`) drops rows
    to make equal shards, and gives a block to whoever asks first, so that no two runs are the same.
    """

    manifest: pa.Table
    image_size: int
    resize: ResizeRule
    cpus_per_task: float
    memory_bytes: int
    """Share of the object store that the pipeline may fill ahead of the training."""

    def batches(self, rows: npt.NDArray[np.int64], sizes: list[int]) -> Iterator[Batch]:
        """See `Source`."""
        if not len(rows):
            return  # a worker without a validation image
        dataset = stream.decoded(
            self.manifest.take(pa.array(rows)),
            self.image_size,
            resize=self.resize,
            cpus_per_task=self.cpus_per_task,
        )
        options = dataset.context.execution_options
        options.resource_limits = options.resource_limits.copy(object_store_memory=self.memory_bytes)
        yield from stream.batches_of(stream.in_order(dataset), iter(sizes))


class CachedSource:
    """Takes images from blocks in Ray's object store, in shared memory with the other workers of a node."""

    def __init__(self, blocks: list[Any]) -> None:
        """
        Args:
            blocks: references to the blocks that `decode_into_memory` made.
        """
        self._blocks = [_columns(table) for table in ray.get(blocks)]
        lengths = [len(block["id"]) for block in self._blocks]
        self._block_of = np.repeat(np.arange(len(lengths)), lengths)
        self._row_of = np.concatenate([np.arange(length) for length in lengths])

    def batches(self, rows: npt.NDArray[np.int64], sizes: list[int]) -> Iterator[Batch]:
        """See `Source`."""
        start = 0
        for size in sizes:
            places = [(self._blocks[self._block_of[row]], self._row_of[row]) for row in rows[start : start + size]]
            start += size
            yield {
                name: np.stack([block[name][row] for block, row in places]) if places else column[:0]
                for name, column in self._blocks[0].items()
            }


def decode_into_memory(manifest: pa.Table, image_size: int, resize: ResizeRule, cpus_per_task: float) -> list[Any]:
    """Decode a whole manifest into the object store.

    Returns:
        References to the blocks, in the manifest's order.
    """
    dataset = stream.decoded(manifest, image_size, resize=resize, cpus_per_task=cpus_per_task)
    dataset.context.execution_options.preserve_order = True
    return list(dataset.materialize().to_arrow_refs())


def _columns(table: pa.Table) -> Batch:
    # Tensor columns come as one fixed-shape chunk a block; their NumPy views share the store's memory.
    columns = {}
    for name in ("id", "target", "image", "error", "uri"):
        column = table[name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        columns[name] = column.to_numpy(zero_copy_only=False)
    return columns
