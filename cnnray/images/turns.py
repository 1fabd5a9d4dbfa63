"""What processes that decode images are given (see `decoders`): batches, cut into turns."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cnnray.images import reading

Lanes = Callable[[int], npt.NDArray[np.int64]]
"""The lane of each image of a batch, by the batch's number: int64 (n,)."""
LENGTH = {"local": 16, "remote": 32}
"""Images that a process is given at once."""


class PendingBatch:
    """A batch that is being decoded."""

    def __init__(self, rows: pa.Table, slot: int) -> None:
        self.rows, self.slot = rows, slot
        self.errors = np.full(len(rows), "", object)
        self.turns_left = 0
        self.error: Exception | None = None
        """Ends the stream."""
        self.is_dropped = False


@dataclass(eq=False)
class Turn:
    """Images of a batch that one process decodes."""

    batch: PendingBatch
    places: list[int]
    """Of the images in the batch."""
    uris: list[str]
    process: int | None = None
    """Which one; None: any."""
    lanes: list[int] | None = None
    """Of each image, in ascending order; None: of no lanes."""
    crashes: int = 0

    def single(self, index: int) -> "Turn":
        """The turn of one of the images, which may have ended its process."""
        lanes = None if self.lanes is None else [self.lanes[index]]
        return Turn(self.batch, [self.places[index]], [self.uris[index]], self.process, lanes, self.crashes - 1)


@dataclass(eq=False)
class Stream:
    """Batches that are asked for one after another."""

    rows: Callable[[int], pa.Table]
    """Of each batch, by its number."""
    batches: int
    """Their number."""
    lanes: Lanes | None
    """See `Decoders.batches`."""
    begun: int = 0
    """Batches that have a place in memory."""


def of(batch: PendingBatch, lanes: npt.NDArray[np.int64] | None, processes: int) -> list[Turn]:
    """The turns of a batch: neighbours, or the images of a process's lanes, lane after lane."""
    uris = batch.rows["uri"].to_pylist()
    length = LENGTH[reading.place_of(uris[0])] if uris else 1
    shares: list[tuple[int | None, list[int]]] = [(None, list(range(len(uris))))]
    if lanes is not None:
        ordered = np.argsort(lanes, kind="stable")
        shares = [(process, ordered[lanes[ordered] % processes == process].tolist()) for process in range(processes)]
    parts = [
        (process, places[start : start + length])
        for process, places in shares
        for start in range(0, len(places), length)
    ]
    return [
        Turn(batch, part, [uris[place] for place in part], process, None if lanes is None else lanes[part].tolist())
        for process, part in parts
    ]
