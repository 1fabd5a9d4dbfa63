"""The ranges of a run, taken while the manifest is still being listed."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable

from cnnray.images.shards import Range
from cnnray.prediction.ranges import Task

_AHEAD = 10_000
"""Ranges that are listed, and not taken, at most."""


class ListedTasks:
    """Tasks for the ranges of a manifest, in order. A thread lists them from `start` on.

    Attributes:
        ranges: that were listed so far; all of them once `is_complete`.
        rows: of these ranges.
        rows_done: of the ranges that have no task.
        is_complete: whether the listing has ended.
    """

    def __init__(self, ranges: Iterable[Range], plan: Callable[[Range], Task | None]) -> None:
        """
        Args:
            ranges: of the manifest.
            plan: gives the task for a range; None where there is nothing to do.
        """
        self.ranges: list[Range] = []
        self.rows = self.rows_done = 0
        self.is_complete = False
        self._plan = plan
        self._queue: queue.Queue[Task | Exception | None] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._list, args=[ranges], daemon=True)
        self.ended = False

    @property
    def known(self) -> int:
        """Tasks that have been listed, and not taken."""
        end = self.is_complete and not self.ended  # is in the queue, too
        return max(self._queue.qsize() - end, 0)

    def start(self) -> None:
        """Begin to list."""
        self._thread.start()

    def _list(self, ranges: Iterable[Range]) -> None:
        try:
            for range_ in ranges:
                self.ranges.append(range_)
                self.rows += range_.rows
                if (task := self._plan(range_)) is not None:
                    self._put(task)
                else:
                    self.rows_done += range_.rows
                if self._stopped.is_set():
                    return
            self.is_complete = True
            self._put(None)
        except Exception as error:  # raised again where tasks are taken
            self._put(error)

    def _put(self, item: Task | Exception | None) -> None:
        is_put = False
        while not is_put and not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=1.0)
                is_put = True

    def take(self, seconds: float = 0.0) -> Task | None:
        """The next task; None where there is none after so many seconds.

        Raises:
            CnnrayError: the listing failed.
        """
        if self.ended:
            return None
        try:
            item = self._queue.get(timeout=seconds) if seconds else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        self.ended = item is None
        return item

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
