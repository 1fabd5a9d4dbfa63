"""Decodes and classifies images in a replica, for all protocols."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from starlette.requests import Request

from cnnray.images.decode import BadImage
from cnnray.models.answers import NO_PROBABILITIES, Answer
from cnnray.models.runtimes import Images
from cnnray.serving.access_log import AccessLog
from cnnray.serving.admission import Admission, read_body
from cnnray.serving.bodies import LARGE_BODY, NOT_BASE64, RequestError, declared_length
from cnnray.serving.cache import Cache
from cnnray.serving.canaries import Canaries
from cnnray.serving.coordinator import Coordination
from cnnray.serving.explanations import Explanations
from cnnray.serving.job_queue import JobQueue
from cnnray.serving.keys import Key
from cnnray.serving.models import Loaded, Loader, Models, NoSuchModelError, ServedModel
from cnnray.serving.pipeline import Encoded, Image
from cnnray.serving.request_log import RequestLog
from cnnray.serving.schema import CANARY_KEY
from cnnray.serving.settings import Settings
from cnnray.tracking.prometheus import ServingMetrics

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
"""Seconds before a change of the settings that failed is tried again; each pause is twice the one before."""

Parsed = TypeVar("Parsed")
STATUS_BY_REASON = {
    "empty": 400, NOT_BASE64: 400, "too large": 413, "too many pixels": 413, "not an image": 415, "unsupported": 415,
    NO_PROBABILITIES: 500,
}  # fmt: skip
"""HTTP status for an image that cannot be used, by `BadImage.reason`; 422 for other reasons."""


class Service:
    """The models of a replica.

    Attributes:
        gpus: whether this process has a GPU.
        settings: the present settings; None before the first.
        models: the models that are served; None before the first settings.
        tried: the last settings that were to be changed to, whether that failed or not.
        change_problem: why the last change of the settings failed; None: it did not. It is tried again.
        problems: why versions are left out, by name and version. They are tried again.
        metrics: counts requests, images and predictions.
        admission: what the requests hold at present.
        canaries: compares canaries with the versions before them.
        coordination: changes what all replicas serve; None: there is no such way.
        queue: runs predictions as jobs; None: there is none.
    """

    def __init__(
        self,
        *,
        threads: int,
        gpus: bool = False,
        coordination: Coordination | None = None,
        queue: JobQueue | None = None,
    ) -> None:
        """
        Args:
            threads: CPU threads of the engine, and number of images decoded at once.
            gpus: whether this process has a GPU.
            coordination: the way to the coordinator of all replicas.
            queue: runs predictions as jobs.
        """
        self.gpus = gpus
        self.settings: Settings | None = None
        self.tried: Settings | None = None
        self.models: Models | None = None
        self.change_problem: str | None = None
        self.problems: dict[tuple[str, str | None], str] = {}
        self.admission = Admission()
        self.metrics = ServingMetrics(lambda: (self.admission.load, self.admission.bytes), self._drift)
        self.coordination, self.queue = coordination, queue
        self._cache = Cache()
        self._access_log = AccessLog()
        self._log: RequestLog | None = None
        self._explanations = Explanations()
        self.canaries = Canaries(self._compute, self.admission, self.metrics, coordination)
        self._load = Loader(threads=threads, gpus=gpus, metrics=self.metrics)
        self._changing, self._parsing = asyncio.Lock(), asyncio.Lock()
        self._wanted: Settings | None = None
        self._trying_again: asyncio.Task[None] | None = None
        """Held, because the event loop holds no task."""

    async def change_settings(self, settings: Settings) -> None:
        """Load and warm up the models of new settings, then switch to them.

        The present models answer requests meanwhile. If loading fails, they go on to do so, `problem` says why, and
        loading is tried again after a pause, until it succeeds or there are other settings: an exception would make
        Serve stop the replica.

        Raises:
            BundleError, OSError: a version that must not be left out cannot be loaded, and there are no present
                models.
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
                loaded = await asyncio.to_thread(self._load, settings, starts=self.models is None)
            except Exception as error:  # an engine's library may raise anything
                if self.models is None:
                    raise
                self.change_problem = str(error)
                log.exception("the new settings cannot be loaded; the present models stay")
            else:
                self._switch(loaded)
            self.tried = settings
            self.metrics.record_change(failed=self.problem is not None)
            return self.problem is None

    def _switch(self, loaded: Loaded) -> None:
        models, settings, decided = loaded.models, loaded.settings, set()
        if self.settings is not None:
            decided = {(model.name, model.version, model.verdict) for model in self.settings.models}
        for model in settings.models:
            if model.verdict is not None and (model.name, model.version, model.verdict) not in decided:
                log.warning("%s %s is %s", model.name, model.version, model.verdict)
        self.settings, self.models = settings, models
        self.change_problem, self.problems = None, loaded.problems
        self.canaries.follow(models, settings)
        self._cache = Cache()  # with other bounds for images, answers may be others
        if (self._log.settings if self._log else None) != settings.log:
            if self._log:
                threading.Thread(target=self._log.close, daemon=True).start()
            self._log = RequestLog(settings.log, self.metrics.record_log) if settings.log else None

    def close(self) -> None:
        """Write what is left of the logs and of the metrics, and end the process that explains."""
        self._access_log.flush()
        if self._log:
            self._log.close()
        self.metrics.flush()
        self._explanations.end()

    def log_access(
        self, request_id: str, method: str, path: str, status: int, seconds: float, key: Key | None
    ) -> None:
        """Log a request that was answered, if the settings say so."""
        which = self.settings.access_log if self.settings else "none"
        if which == "all" or (which == "errors" and status >= 400):
            self._access_log.record(request_id, method, path, status, seconds, key.name if key else None)

    def _drift(self) -> dict[tuple[str, str], dict[str, float]]:
        """By name and version of a model, how far the answers of the last hour have drifted."""
        served = self.models.all if self.models else []
        return {(model.name, model.version): model.recent.effect_sizes() for model in served if model.recent}

    @property
    def problem(self) -> str | None:
        """Why the last change of the settings failed, or why a version is left out; None: there is no problem."""
        return self.change_problem or next(iter(self.problems.values()), None)

    async def _try_again(self, settings: Settings) -> None:
        pause = _FIRST_PAUSE
        await asyncio.sleep(pause)
        while not await self._change(settings):
            pause = min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def check_health(self) -> None:
        """Check that the engines of versions with requests compute, without waiting behind the images of requests.

        One that is at work must have made progress, by an image decoded or a micro-batch computed, within the time
        that an answer may take. The engine of a model's main version, while it waits for images, is given a black
        one. That of a canary is not: if it fails, a new replica would fail, too, and its verdict deals with that.

        Raises:
            RequestError: 503, an engine takes too long, or no model is loaded.
            Exception: what an engine raises.
        """
        models = self.ready_models()
        assert self.settings is not None
        versions = [(served, share) for name in models.names for served, share in models.versions(name)]
        for served in (served for served, share in versions if share > 0):
            seconds = served.compute.seconds_without_progress
            if seconds > self.settings.timeout_seconds:
                raise RequestError(
                    503, f"{served.name} {served.version} has made no progress for {seconds:.0f} seconds."
                )
            if not served.batcher.is_busy and served is models.main(served.name):
                async with self._answer_timeout():
                    await served.batcher.submit(np.zeros(served.bundle.info.geometry.image_size.shape, np.uint8))

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

    def choose_named(self, request: Request) -> ServedModel:
        """The version of a model that answers a request whose path names the model, and may name the version.

        Raises:
            RequestError: see `choose_model`.
        """
        names = request.path_params
        return self.choose_model(names["model"], names.get("version"), canary_key(request))

    async def read(self, request: Request, parse: Callable[[bytes, Settings], Parsed]) -> Parsed:
        """Read a request's body, and parse it.

        The `Held` of the request, in its scope, holds the bytes.

        Raises:
            RequestError: 413, the body is too large; 503, the service has no room for it; 408, it does not arrive in
                time; and what `parse` raises.
            ClientDisconnect: the client has left.
        """
        settings = self.settings
        assert settings is not None
        self.admission.check_images(settings, 1)
        request.scope["held"].expect_bytes(declared_length(request, settings), settings)
        start = time.perf_counter()
        self.admission.requests += 1
        try:
            body = await read_body(request, settings)
            content = await self.parse(body, lambda body: parse(body, settings))
        finally:
            self.admission.requests -= 1
        self.metrics.record_stage("read", [time.perf_counter() - start])
        return content

    async def parse(self, body: bytes, parse: Callable[[bytes], Parsed]) -> Parsed:
        """Parse a request's body; a large one in a thread, and after other large ones.

        JSON of 32 MiB becomes objects of hundreds of MiB, until `parse` has made bytes or pixels of them.
        """
        if len(body) <= LARGE_BODY:
            return parse(body)
        async with self._parsing:
            return await asyncio.to_thread(parse, body)

    async def classify(
        self, served: ServedModel, images: Iterable[bytes | Images | BadImage]
    ) -> list[Answer | BadImage]:
        """Classify images: in order, the answers, or why an image has none.

        Args:
            served: the version of a model.
            images: encoded; or pixels, uint8 (height, width, 3) as the network takes them. An image that could not be
                read from the request keeps its place and its error.

        Raises:
            RequestError: 503, there are too many images in the service, or it takes longer than the settings allow.
        """
        settings = self.settings
        assert settings is not None
        start = time.perf_counter()
        values = [Encoded(image, settings.max_pixels) if isinstance(image, bytes) else image for image in images]
        self.admission.check_images(settings, len(values))
        if len(self.ready_models().all) > 1:
            self.admission.check_version(settings, served.key, len(values))
        answers = await self._answer(served, values, settings)
        for answer in answers:
            if not isinstance(answer, BadImage):
                confidence = answer.confidence
                self.metrics.record_prediction(
                    served.name, served.version, served.names(answer.labels), confidence,
                    unsure=answer.status == "unsure",
                )  # fmt: skip
                if served.recent:
                    served.recent.add(answer.best, confidence)
        if self._log:
            self._log.add(served, values, answers, time.perf_counter() - start)
        self.canaries.compare_later(served, values, answers)
        return answers

    def check_explains(self) -> None:
        """Check that answers can be explained, before they are computed.

        Raises:
            RequestError: 403, the settings do not allow it; 503, too many requests wait.
        """
        if self.settings is not None and not self.settings.explain:
            raise RequestError(403, "This service explains no answers: it was started with --explain false.")
        self._explanations.check()

    async def explain(self, served: ServedModel, images: Sequence[bytes], classes: Sequence[int]) -> list[bytes]:
        """Show which regions of images support classes; see `Explanations.explain`.

        Raises:
            RequestError: 403, the settings do not allow it; 422, the network has no heat maps; 503, too many requests
                wait, or it takes longer than the settings allow.
        """
        self.check_explains()
        settings = self.settings
        assert settings is not None
        encoded = [Encoded(image, settings.max_pixels) for image in images]
        return await self._explanations.explain(served, encoded, classes, settings.timeout_seconds)

    async def _answer(
        self, served: ServedModel, values: Sequence[Image], settings: Settings
    ) -> list[Answer | BadImage]:
        """The answers to images: those that are known, and the others computed."""
        if not settings.max_cache_bytes:
            return await self._compute(served, values)
        cache = self._cache  # there may be another one when the answers come
        keys = [cache.key(served, value.data) if isinstance(value, Encoded) else None for value in values]
        known = [None if key is None else cache.get(key) for key in keys]
        missing = [value for value, answer in zip(values, known, strict=True) if answer is None]
        self.metrics.record_cache(hits=len(values) - len(missing), misses=len(missing))
        computed = iter(await self._compute(served, missing) if missing else [])
        answers = []
        for key, answer in zip(keys, known, strict=True):
            answers.append(next(computed) if answer is None else answer)
            if answer is None and key is not None:
                cache.put(key, answers[-1], settings.max_cache_bytes)
        return answers

    async def _compute(self, served: ServedModel, values: Sequence[Image]) -> list[Answer | BadImage]:
        """The answers to images, and the record of how long they took."""
        futures = [served.batcher.submit(value) for value in values if not isinstance(value, BadImage)]
        self.admission.add_images(served.key, len(futures))
        start, usable, failed = time.perf_counter(), len(futures), True
        try:
            async with self._answer_timeout():
                computed = await asyncio.gather(*futures)
            usable = sum(not isinstance(one, BadImage) or one.reason == NO_PROBABILITIES for one in computed)
            failed = any(isinstance(one, BadImage) and one.reason == NO_PROBABILITIES for one in computed)
        except asyncio.CancelledError:  # the client has left: so long it took at least
            failed = False
            raise
        finally:
            self.admission.add_images(served.key, -len(futures))
            for future in futures:
                future.cancel()  # where another one failed, these still wait
            if any(future.cancelled() for future in futures):
                served.batcher.forget_cancelled()
            if usable:
                self.canaries.record(served, usable, time.perf_counter() - start, failed=failed)
        answers = iter(computed)
        return [value if isinstance(value, BadImage) else next(answers) for value in values]

    def _answer_timeout(self) -> contextlib.AbstractAsyncContextManager[None]:
        assert self.settings is not None
        seconds = self.settings.timeout_seconds
        return _timeout(seconds, 503, f"The answer takes longer than {seconds:g} seconds.")

    async def classify_all(self, served: ServedModel, images: Iterable[bytes | Images | BadImage]) -> list[Answer]:
        """Classify images, all of which must be usable.

        Raises:
            RequestError: an image cannot be used, the message says at which index; 503, it takes longer than the
                settings allow.
        """
        answers = []
        for index, answer in enumerate(await self.classify(served, images)):
            if isinstance(answer, BadImage):
                raise RequestError(
                    STATUS_BY_REASON.get(answer.reason, 422), f"The image at index {index} cannot be used: {answer}."
                )
            answers.append(answer)
        return answers


def canary_key(request: Request) -> str | None:
    """The key of whoever asks: `CANARY_KEY`, or the client that a proxy names; None for neither.

    Ray's HAProxy names no clients, and all of them have its address.
    """
    forwarded: str = request.headers.get("x-forwarded-for", "").partition(",")[0].strip()
    return request.headers.get(CANARY_KEY) or forwarded or None


@contextlib.asynccontextmanager
async def _timeout(seconds: float, status: int, sentence: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RequestError(status, sentence) from None
