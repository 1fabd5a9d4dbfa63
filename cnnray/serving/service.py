"""Decodes and classifies images in a replica, for all protocols."""

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
from cnnray.models.predictor import NO_PROBABILITIES, find_unusable
from cnnray.models.runtimes import Images, Probabilities
from cnnray.serving.bodies import NOT_BASE64, RequestError
from cnnray.serving.models import Loader, Models, NoSuchModelError, ServedModel
from cnnray.serving.schema import CANARY_KEY
from cnnray.serving.settings import Settings
from cnnray.tracking.prometheus import ServingMetrics

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
"""Seconds before a change of the settings that failed is tried again; each pause is twice the one before."""

Read = TypeVar("Read")

STATUS_BY_REASON = {
    "empty": 400, NOT_BASE64: 400, "too large": 413, "too many pixels": 413, "not an image": 415, "unsupported": 415,
    NO_PROBABILITIES: 500,
}  # fmt: skip
"""HTTP status for an image that cannot be used, by `BadImage.reason`; 422 for other reasons."""


class Service:
    """The models of a replica, and the threads that decode images.

    Attributes:
        settings: the present settings; None before the first.
        models: the models that are served; None before the first settings.
        problem: why the last change of the settings failed, which is tried again; None if it did not.
        metrics: counts requests, images and predictions.
    """

    def __init__(self, *, threads: int, gpus: bool = False) -> None:
        """
        Args:
            threads: CPU threads of the engine, and number of images decoded in parallel.
            gpus: whether this process has a GPU.
        """
        self.settings: Settings | None = None
        self.models: Models | None = None
        self.problem: str | None = None
        self.metrics = ServingMetrics()
        self._decoding = ThreadPoolExecutor(threads, "decode")
        self._load = Loader(threads=threads, gpus=gpus, observe=self.metrics.record_batch)
        self._changing = asyncio.Lock()
        self._wanted: Settings | None = None
        self._trying_again: asyncio.Task[None] | None = None
        """Held, because the event loop holds no task."""

    async def change_settings(self, settings: Settings) -> None:
        """Load and warm up the models of new settings, then switch to them.

        The present models answer requests meanwhile. If loading fails, they go on to do so, `problem` says why, and
        loading is tried again after a pause, until it succeeds or there are other settings: an exception would make
        Serve stop the replica.

        Raises:
            BundleError, OSError: loading failed, and there are no present models.
        """
        self._wanted = settings
        if not await self._change(settings):
            self._trying_again = asyncio.create_task(self._try_again(settings))

    async def _change(self, settings: Settings) -> bool:
        """Try to change the settings, and return whether there is nothing left to try."""
        async with self._changing:
            if self._wanted is not settings:  # others came meanwhile
                return True
            try:
                models = await asyncio.to_thread(self._load, settings)
            except Exception as error:  # an engine's library may raise anything
                if self.models is None:
                    raise
                self.problem = str(error)
                log.exception("the new settings cannot be loaded; the present models stay")
            else:
                self.settings, self.models, self.problem = settings, models, None
            self.metrics.record_change(failed=self.problem is not None)
            return self.problem is None

    async def _try_again(self, settings: Settings) -> None:
        pause = _FIRST_PAUSE
        await asyncio.sleep(pause)
        while not await self._change(settings):
            pause = min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def check_health(self) -> None:
        """Check that each engine computes, without waiting behind the images of requests.

        An engine that is at work must not have been at its micro-batch for longer than an answer may take. One that
        waits for images is given a black one.

        Raises:
            RequestError: 503, an engine takes too long, or no model is loaded.
            Exception: what an engine raises.
        """
        models = self.ready_models()
        assert self.settings is not None
        for served in models.all:
            seconds = served.batcher.seconds_at_work
            if seconds > self.settings.timeout_seconds:
                raise RequestError(
                    503, f"{served.name} {served.version} has been at one micro-batch for {seconds:.0f} seconds."
                )
            if not seconds:
                async with self._answer_timeout():
                    await served.batcher(np.zeros(served.bundle.info.geometry.image_size.shape, np.uint8))

    def ready_models(self) -> Models:
        """The models that are served.

        Raises:
            RequestError: 503, they are being loaded.
        """
        if self.models is None:
            raise RequestError(503, "The models are being loaded.")
        return self.models

    def choose_model(
        self, name: str | None = None, version: str | None = None, key: str | None = None
    ) -> ServedModel:
        """The version of a model that answers a request; see `Models.choose`.

        Raises:
            RequestError: 404, it is not served; 503, the models are being loaded.
        """
        try:
            return self.ready_models().choose(name, version, key)
        except NoSuchModelError as error:
            raise RequestError(404, str(error)) from None

    async def read(self, reader: Callable[[Request, Settings], Awaitable[Read]], request: Request) -> Read:
        """Read a request's body with a reader such as `bodies.read_images`.

        Raises:
            RequestError: the reader raised it; 408, the body did not arrive in time.
        """
        assert self.settings is not None
        start = time.perf_counter()
        async with _timeout(self.settings.timeout_seconds, 408, "The body did not arrive in time."):
            content = await reader(request, self.settings)
        self.metrics.record_stage("read", time.perf_counter() - start)
        return content

    async def classify(
        self, served: ServedModel, images: Sequence[bytes | BadImage]
    ) -> list[Probabilities | BadImage]:
        """Classify encoded images: in order, the probabilities, float32 (classes,), or why an image has none.

        An image that could not be read from the request keeps its place and its error.

        Raises:
            RequestError: 503, it takes longer than the settings allow.
        """
        async with self._answer_timeout():
            return await asyncio.gather(*(self._classify(served, image) for image in images))

    async def classify_all(self, served: ServedModel, images: Sequence[bytes | BadImage]) -> Probabilities:
        """Classify encoded images, all of which must be usable: probabilities, float32 (N, classes).

        Raises:
            RequestError: an image cannot be used, the message says at which index; 503, it takes longer than the
                settings allow.
        """
        rows = await self.classify(served, images)
        for index, row in enumerate(rows):
            if isinstance(row, BadImage):
                raise _refusal(index, row)
        return np.stack([row for row in rows if not isinstance(row, BadImage)])

    async def classify_pixels(self, served: ServedModel, images: Images) -> Probabilities:
        """Classify decoded images, uint8 (N, height, width, 3): probabilities, float32 (N, classes).

        Raises:
            RequestError: 500, the network gives no probabilities for an image; 503, it takes longer than the settings
                allow.
        """
        start = time.perf_counter()
        async with self._answer_timeout():
            rows = np.stack(await asyncio.gather(*(served.batcher(image) for image in images)))
        self.metrics.record_stage("predict", time.perf_counter() - start)
        for index, error in find_unusable(rows).items():
            raise _refusal(index, error)
        for row in rows:
            self._record_prediction(served, row)
        return rows

    def _answer_timeout(self) -> contextlib.AbstractAsyncContextManager[None]:
        assert self.settings is not None
        seconds = self.settings.timeout_seconds
        return _timeout(seconds, 503, f"The answer takes longer than {seconds:g} seconds.")

    async def _classify(self, served: ServedModel, image: bytes | BadImage) -> Probabilities | BadImage:
        if isinstance(image, BadImage):
            return image
        start = time.perf_counter()
        pixels = await asyncio.get_running_loop().run_in_executor(self._decoding, self._decode, served, image)
        decoded = time.perf_counter()
        self.metrics.record_stage("decode", decoded - start)
        if isinstance(pixels, BadImage):
            return pixels
        row = await served.batcher(pixels)
        self.metrics.record_stage("predict", time.perf_counter() - decoded)
        if error := find_unusable(row[None]).get(0):
            return error
        self._record_prediction(served, row)
        return row

    def _decode(self, served: ServedModel, image: bytes) -> Images | BadImage:
        settings = self.settings
        assert settings is not None
        try:
            return decode(image, served.bundle.info.geometry, max_pixels=settings.max_pixels)
        except BadImage as error:
            return error

    def _record_prediction(self, served: ServedModel, row: Probabilities) -> None:
        best = int(row.argmax())
        label = served.bundle.info.class_names[best]
        self.metrics.record_prediction(served.name, served.version, label, float(row[best]))


def canary_key(request: Request) -> str | None:
    """The key of whoever asks: `CANARY_KEY`, or the client that a proxy names; None for neither.

    Ray's HAProxy names no clients, and all of them have its address.
    """
    forwarded: str = request.headers.get("x-forwarded-for", "").partition(",")[0].strip()
    return request.headers.get(CANARY_KEY) or forwarded or None


def _refusal(index: int, error: BadImage) -> RequestError:
    """The error of a request that has an image which cannot be used, and a response without a place to say so."""
    return RequestError(
        STATUS_BY_REASON.get(error.reason, 422), f"The image at index {index} cannot be used: {error}."
    )


@contextlib.asynccontextmanager
async def _timeout(seconds: float, status: int, sentence: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RequestError(status, sentence) from None
