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
"""Requests that wait for it; more are refused."""
_NICENESS = 10
_LONGER_SIDE = 320
"""Of a picture, in pixels, where the network takes smaller ones."""


class Explanations:
    """Explains answers, in a process that is started when it is needed, for one version of a model at a time.

    It takes only the CPU time that the replica's engine leaves.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._waiting = 0
        self._served: ServedModel | None = None
        self._process: HeatMapProcess | None = None
        self._ending: asyncio.TimerHandle | None = None

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
        if self._waiting >= _MOST_WAITING:
            raise RequestError(503, "Too many requests wait for an explanation.")
        self._waiting += 1
        try:
            async with asyncio.timeout(seconds), self._lock:
                return await self._compute(served, images, classes)
        except TimeoutError:
            raise RequestError(503, f"The explanation takes longer than {seconds:g} seconds.") from None
        except HeatMapsLostError:
            self.end()
            raise RequestError(503, "The process that explains answers has ended; try again.") from None
        except BundleError as error:
            raise RequestError(422, str(error)) from None
        finally:
            self._waiting -= 1

    async def _compute(self, served: ServedModel, images: Sequence[Encoded], classes: Sequence[int]) -> list[bytes]:
        if self._ending:
            self._ending.cancel()
        if self._served is not served:
            self.end()
        if self._process is None:
            self._served, self._process = served, HeatMapProcess(served.bundle, _NICENESS)
        try:
            pictures = await asyncio.to_thread(_draw, self._process, served, images, classes)
        except asyncio.CancelledError:  # the thread still waits for the process: without it, it ends
            self.end()
            raise
        self._ending = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self.end)
        return pictures

    def end(self) -> None:
        """End the process."""
        process, self._process, self._served = self._process, None, None
        if process is not None:
            process.end()


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
