"""Pictures that show which regions of an image support its answer, by Grad-CAM."""

import asyncio
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image as PillowImage

from cnnray.images.decode import decode
from cnnray.models.bundle import BundleError
from cnnray.models.heat_maps import HeatMapProcess, HeatMapsLostError, overlay
from cnnray.serving.bodies import RequestError
from cnnray.serving.models import ServedModel
from cnnray.serving.pipeline import Encoded

_IDLE_SECONDS = 600.0
"""After which the process, with its TensorFlow, is ended."""
_MOST_WAITING = 4
"""Requests that it works for, or that wait for it; more are refused."""
_NICENESS = 10
_LONGEST_SECONDS = 120.0
"""After which a process that does not answer is ended."""
_LONGER_SIDE = 320
"""Of a picture, in pixels, where the network takes smaller ones."""


class Explanations:
    """Explains answers, in a process that is started when it is needed, for one version of a model at a time.

    It takes only the CPU time that the replica's engine leaves.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[list[bytes]]] = set()
        """What is computed, or waits."""
        self._explained: tuple[str, str] | None = None
        """Uri and version of the bundle that the process explains."""
        self._process: HeatMapProcess | None = None
        self._ending: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """Check that there is room for a request.

        Raises:
            RequestError: 503, too many wait.
        """
        if len(self._tasks) >= _MOST_WAITING:
            raise RequestError(503, "Too many requests wait for an explanation.")

    async def explain(
        self, served: ServedModel, images: Sequence[Encoded], classes: Sequence[int], seconds: float
    ) -> list[bytes]:
        """Make a picture of each image: what the network sees of it, overlaid with the regions that support a class.

        Args:
            served: whose network.
            images: that have answers.
            classes: the class of each.
            seconds: that it may take.

        Returns:
            PNG files.

        Raises:
            RequestError: 422, the network has no heat maps; 503, too many requests wait, or it takes too long.
        """
        self.check()
        task = asyncio.create_task(self._compute(served, images, classes))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        try:
            async with asyncio.timeout(seconds):
                # The process goes on when a client leaves: the next one would wait for its start again.
                return await asyncio.shield(task)
        except TimeoutError:
            raise RequestError(503, f"The explanation takes longer than {seconds:g} seconds.") from None
        except HeatMapsLostError:
            raise RequestError(503, "The process that explains answers has ended; try again.") from None
        except BundleError as error:
            raise RequestError(422, str(error)) from None

    def _forget(self, task: asyncio.Task[list[bytes]]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # else the event loop would log it where nobody waits any more

    async def _compute(self, served: ServedModel, images: Sequence[Encoded], classes: Sequence[int]) -> list[bytes]:
        async with self._lock:
            if self._ending:
                self._ending.cancel()
            explained = served.bundle.uri, served.version
            if self._explained != explained:
                self.end()
            if self._process is None:
                self._explained = explained
                self._process = HeatMapProcess(served.bundle, served.version, niceness=_NICENESS)
            try:
                async with asyncio.timeout(_LONGEST_SECONDS):
                    return await asyncio.to_thread(_draw, self._process, served, images, classes)
            except (TimeoutError, HeatMapsLostError):
                self.end()
                raise
            finally:
                self._ending = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._end_idle)

    def end(self) -> None:
        """End the process."""
        if process := self._let_go():
            process.end()

    def _end_idle(self) -> None:
        if process := self._let_go():
            asyncio.get_running_loop().run_in_executor(None, process.end)

    def _let_go(self) -> HeatMapProcess | None:
        process, self._process, self._explained = self._process, None, None
        return process


def _draw(
    heat_maps: HeatMapProcess, served: ServedModel, images: Sequence[Encoded], classes: Sequence[int]
) -> list[bytes]:
    geometry, pictures = served.bundle.info.geometry, []
    pixels = np.stack([decode(image.data, geometry, max_pixels=image.max_pixels) for image in images])
    heats = heat_maps(pixels, np.asarray(classes, np.int64))
    larger = geometry.scaled(max(_LONGER_SIDE, *geometry.image_size))
    for image, heat in zip(images, heats, strict=True):
        buffer = io.BytesIO()
        seen = decode(image.data, larger, max_pixels=image.max_pixels)
        PillowImage.fromarray(overlay(seen, heat)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return pictures
