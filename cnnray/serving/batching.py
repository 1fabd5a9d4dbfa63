"""Images of many requests in one call of an engine."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from cnnray.models.runtimes import Images, Probabilities


class Batcher:
    """Gives an engine all images that wait for it, whenever it is free.

    So an image that comes alone does not wait, and under load batches grow by themselves. (`ray.serve.batch` takes
    images out of its queue also while the engine is busy: its batches only grow if each waits for a time.)
    """

    def __init__(
        self, run: Callable[[Images], Probabilities], size: int, executor: Executor, observe: Callable[[int], None]
    ) -> None:
        """
        Args:
            run: the engine: uint8 (N, size, size, 3) to float32 (N, classes).
            size: images in one call, at most.
            executor: in which the engine runs.
            observe: is told the size of each batch.
        """
        self._run, self._size, self._executor, self._observe = run, size, executor, observe
        self._waiting: deque[tuple[Images, asyncio.Future[Probabilities]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, image: Images) -> Probabilities:
        """The probabilities, float32 (classes,), of an image, uint8 (size, size, 3)."""
        future: asyncio.Future[Probabilities] = asyncio.get_running_loop().create_future()
        self._waiting.append((image, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            try:
                images = np.stack([image for image, _ in batch])
                rows = await loop.run_in_executor(self._executor, self._run, images)
                answered = list(zip(batch, rows, strict=True))
            except Exception as error:  # whatever the engine raises, its callers must not wait for ever
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                self._observe(len(batch))
                for (_, future), row in answered:
                    if not future.done():
                        future.set_result(row)
        self._task = None

    def _next(self) -> list[tuple[Images, "asyncio.Future[Probabilities]"]]:
        """Up to `size` images whose callers are still waiting."""
        batch: list[tuple[Images, asyncio.Future[Probabilities]]] = []
        while self._waiting and len(batch) < self._size:
            if not (waiting := self._waiting.popleft())[1].done():
                batch.append(waiting)
        return batch
