"""Collects images of many requests into micro-batches for an engine."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cnnray.models.runtimes import Images, Probabilities


class Batcher:
    """Gives an engine all waiting images whenever it is free. The engine runs in a thread of its own.

    A single image is therefore not delayed, and micro-batches grow with the load. (`ray.serve.batch` takes images out
    of its queue even while the engine is busy, so its batches grow only if each waits for a fixed time.)
    """

    def __init__(self, run: Callable[[Images], Probabilities], size: int, observe: Callable[[int], None]) -> None:
        """
        Args:
            run: the engine: uint8 (N, height, width, 3) to float32 (N, classes).
            size: largest number of images in a micro-batch.
            observe: called with the size of each micro-batch.
        """
        self._run, self._size, self._observe = run, size, observe
        self._executor = ThreadPoolExecutor(1, "engine")  # its thread ends when nobody holds the batcher any more
        self._began: float | None = None
        """When the engine began with the present micro-batch."""
        self._waiting: deque[tuple[Images, asyncio.Future[Probabilities]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, image: Images) -> Probabilities:
        """The probabilities, float32 (classes,), for an image, uint8 (height, width, 3)."""
        future: asyncio.Future[Probabilities] = asyncio.get_running_loop().create_future()
        self._waiting.append((image, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    @property
    def seconds_at_work(self) -> float:
        """How long the engine has been at the present micro-batch; 0 where it waits for images."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            self._began = time.monotonic()
            try:
                images = np.stack([image for image, _ in batch])
                rows = await loop.run_in_executor(self._executor, self._run, images)
                answers = list(zip(batch, rows, strict=True))
            except Exception as error:  # whatever the engine raises, the callers must not wait for ever
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                self._observe(len(batch))
                for (_, future), row in answers:
                    if not future.done():
                        future.set_result(row)
        self._task = self._began = None

    def _next_batch(self) -> list[tuple[Images, "asyncio.Future[Probabilities]"]]:
        """Up to `size` images whose callers still wait."""
        batch: list[tuple[Images, asyncio.Future[Probabilities]]] = []
        while self._waiting and len(batch) < self._size:
            if not (waiting := self._waiting.popleft())[1].done():
                batch.append(waiting)
        return batch
