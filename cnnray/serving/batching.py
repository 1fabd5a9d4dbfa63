"""Collects images of many requests into micro-batches for an engine."""

import asyncio
import bisect
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def batch_sizes(largest: int) -> list[int]:
    """The sizes of micro-batches: powers of two, one and a half times each, and the largest; ascending.

    Engines may compile, and keep memory, for each size that they see (OpenVINO: 1 MiB). A replica warms up these, and
    no other one comes.
    """
    powers = [1 << power for power in range(largest.bit_length())]
    return sorted({size for power in powers for size in (power, power + power // 2) if size < largest} | {largest})


class Batcher(Generic[Input, Output]):
    """Computes micro-batches in threads of its own: what waits whenever a thread is free, down to the next of
    `batch_sizes`.

    A single image is therefore not delayed, and micro-batches grow with the load. (`ray.serve.batch` takes images out
    of its queue even while the engine is busy, so its batches grow only if each waits for a fixed time.)
    """

    def __init__(
        self,
        run: Callable[[Sequence[Input]], Sequence[Output]],
        size: int,
        observe: Callable[[list[float]], None],
        *,
        threads: int = 1,
    ) -> None:
        """
        Args:
            run: computes a micro-batch, in a thread: one output for each input.
            size: largest number of inputs in a micro-batch.
            observe: called for each micro-batch with the seconds that its inputs have waited.
            threads: number of micro-batches that are computed at once.
        """
        self._run, self._sizes, self._observe = run, batch_sizes(size), observe
        # Its threads end when nobody holds the batcher any more.
        self._executor = ThreadPoolExecutor(threads, "engine")
        self._free = threads
        self._waiting: deque[tuple[Input, asyncio.Future[Output], float]] = deque()
        """Inputs, each with the future of its output, and when it came."""

    def submit(self, value: Input) -> "asyncio.Future[Output]":
        """Have the output for an input computed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Output] = loop.create_future()
        self._waiting.append((value, future, time.monotonic()))
        if self._free:
            self._free -= 1
            loop.call_soon(self._start)  # so that what is submitted in this turn of the loop comes along
        return future

    def forget_cancelled(self) -> None:
        """Drop the inputs whose futures were cancelled, which would be kept until their turn comes."""
        self._waiting = deque(waiting for waiting in self._waiting if not waiting[1].done())

    @property
    def is_busy(self) -> bool:
        """Whether all threads are at work, so that an input would wait."""
        return not self._free

    def _start(self) -> None:
        """Give a thread the next micro-batch, if there is one."""
        batch = self._next_batch()
        if not batch:
            self._free += 1
            return
        now = time.monotonic()
        values, futures = [value for value, _, _ in batch], [future for _, future, _ in batch]
        self._executor.submit(self._compute, values, futures, asyncio.get_running_loop())
        self._observe([now - came for _, _, came in batch])

    def _compute(
        self, values: list[Input], futures: list["asyncio.Future[Output]"], loop: asyncio.AbstractEventLoop
    ) -> None:
        outputs: Sequence[Output] | Exception
        try:
            outputs = self._run(values)
            if len(outputs) != len(values):
                raise ValueError(f"{len(values)} inputs have {len(outputs)} outputs")
        except Exception as error:  # whatever it is, the callers must not wait for ever
            outputs = error
        loop.call_soon_threadsafe(self._deliver, futures, outputs)

    def _deliver(self, futures: list["asyncio.Future[Output]"], outputs: Sequence[Output] | Exception) -> None:
        try:
            for index, future in enumerate(futures):
                if future.done():
                    continue
                if isinstance(outputs, StopIteration):  # no future takes it
                    future.set_exception(RuntimeError(repr(outputs)))
                elif isinstance(outputs, Exception):
                    future.set_exception(outputs)
                else:
                    future.set_result(outputs[index])
        finally:
            self._start()

    def _next_batch(self) -> list[tuple[Input, "asyncio.Future[Output]", float]]:
        """Inputs whose callers still wait, as many as the largest of the sizes that they fill."""
        batch: list[tuple[Input, asyncio.Future[Output], float]] = []
        while self._waiting and len(batch) < self._sizes[-1]:
            if not (waiting := self._waiting.popleft())[1].done():
                batch.append(waiting)
        size = self._sizes[bisect.bisect(self._sizes, len(batch)) - 1] if batch else 0
        self._waiting.extendleft(reversed(batch[size:]))
        return batch[:size]
