"""What a replica does with images, whatever protocol they come by."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from fastapi import Request

from cnnray.images.decode import BadImage, decode
from cnnray.models.runtimes import Images, Probabilities
from cnnray.serving.bodies import RequestError
from cnnray.serving.models import Loader, Models, NoSuchModelError, Served
from cnnray.serving.settings import Settings
from cnnray.tracking.prometheus import ServingMetrics

log = logging.getLogger(__name__)

Read = TypeVar("Read")

STATUS_OF = {"empty": 400, "too large": 413, "too many pixels": 413, "not an image": 415, "unsupported": 415}
"""HTTP's status of an image that cannot be used, by its reason; else 422."""


class Service:
    """Models, and the threads that images are decoded in and engines run in.

    Attributes:
        settings: those that hold.
        models: what is served; None before the first.
        problem: why the last change of the settings was not made, if it was not.
        meter: is told what happens.
    """

    def __init__(self, *, threads: int, gpus: bool = False) -> None:
        """
        Args:
            threads: CPU threads of the engine, and images decoded side by side.
            gpus: whether this process has a GPU.
        """
        self.settings: Settings | None = None
        self.models: Models | None = None
        self.problem: str | None = None
        self.meter = ServingMetrics()
        self._decoding = ThreadPoolExecutor(threads, "decode")
        engine = ThreadPoolExecutor(1, "engine")
        self._load = Loader(engine, threads=threads, gpus=gpus, observe=self.meter.batch)
        self._changing = asyncio.Lock()

    async def change(self, settings: Settings) -> None:
        """Load what is new beside what answers requests meanwhile, warm it up, and let it answer from then on.

        Where that fails, what was there goes on to answer, and `problem` says why: an exception would make Serve
        end the replica.

        Raises:
            BundleError, OSError: nothing was there before.
        """
        async with self._changing:
            try:
                models = await asyncio.to_thread(self._load, settings)
            except Exception as error:  # an engine's library raises what it likes
                if self.models is None:
                    raise
                self.problem = str(error)
                log.exception("the models stay as they were")
                return
            self.settings, self.models, self.problem = settings, models, None

    async def check(self) -> None:
        """Have the default model answer an image.

        Raises:
            RequestError: it does not in time, or nothing is served.
        """
        served = self.served()
        size = served.bundle.info.image_size
        async with self._in_time():
            await served.batcher(np.zeros((size, size, 3), np.uint8))

    def served(self, name: str | None = None, version: str | None = None) -> Served:
        """The version of a model that answers a request.

        Raises:
            RequestError: 404, it is not served; 503, nothing is yet.
        """
        if self.models is None:
            raise RequestError(503, "The models are being loaded.")
        try:
            return self.models.choose(name, version)
        except NoSuchModelError as error:
            raise RequestError(404, str(error)) from None

    async def read(self, reader: Callable[[Request, Settings], Awaitable[Read]], request: Request) -> Read:
        """What a reader of `bodies` makes of a request.

        Raises:
            RequestError: as it; 408, the body does not come in time.
        """
        assert self.settings is not None
        start = time.perf_counter()
        async with _within(self.settings.timeout_seconds, 408, "The body did not come in time."):
            found = await reader(request, self.settings)
        self.meter.stage("read", time.perf_counter() - start)
        return found

    async def classify(self, served: Served, images: Sequence[bytes]) -> list[Probabilities | BadImage]:
        """For each encoded image, in order, its probabilities, float32 (classes,), or why it has none.

        Raises:
            RequestError: 503, it takes longer than the settings allow.
        """
        async with self._in_time():
            return await asyncio.gather(*(self._classify(served, image) for image in images))

    async def classify_all(self, served: Served, images: Sequence[bytes]) -> Probabilities:
        """Probabilities, float32 (N, classes), of encoded images that must all be usable.

        Raises:
            RequestError: one is not; 503, it takes longer than the settings allow.
        """
        rows = await self.classify(served, images)
        for number, row in enumerate(rows):
            if isinstance(row, BadImage):
                raise RequestError(STATUS_OF.get(row.reason, 422), f"Image {number} cannot be used: {row}.")
        return np.stack([row for row in rows if not isinstance(row, BadImage)])

    async def classify_pixels(self, served: Served, images: Images) -> Probabilities:
        """Probabilities, float32 (N, classes), of decoded images, uint8 (N, size, size, 3).

        Raises:
            RequestError: 503, it takes longer than the settings allow.
        """
        start = time.perf_counter()
        async with self._in_time():
            rows = await asyncio.gather(*(served.batcher(image) for image in images))
        self.meter.stage("predict", time.perf_counter() - start)
        self._count(served, rows)
        return np.stack(rows)

    def _in_time(self) -> contextlib.AbstractAsyncContextManager[None]:
        assert self.settings is not None
        seconds = self.settings.timeout_seconds
        return _within(seconds, 503, f"The answer takes longer than {seconds:g} seconds.")

    async def _classify(self, served: Served, image: bytes) -> Probabilities | BadImage:
        start = time.perf_counter()
        pixels = await asyncio.get_running_loop().run_in_executor(self._decoding, self._decoded, served, image)
        decoded = time.perf_counter()
        self.meter.stage("decode", decoded - start)
        if isinstance(pixels, BadImage):
            return pixels
        row = await served.batcher(pixels)
        self.meter.stage("predict", time.perf_counter() - decoded)
        self._count(served, [row])
        return row

    def _decoded(self, served: Served, image: bytes) -> Images | BadImage:
        info, settings = served.bundle.info, self.settings
        assert settings is not None
        try:
            return decode(image, info.image_size, info.resize, max_pixels=settings.max_pixels)
        except BadImage as error:
            return error

    def _count(self, served: Served, rows: Sequence[Probabilities]) -> None:
        for row in rows:
            best = int(row.argmax())
            self.meter.answer(served.name, served.version, served.bundle.info.class_names[best], float(row[best]))


@contextlib.asynccontextmanager
async def _within(seconds: float, status: int, sentence: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RequestError(status, sentence) from None
