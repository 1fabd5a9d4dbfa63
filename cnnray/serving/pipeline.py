"""Decodes and classifies the micro-batches of one version of a model."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import Geometry
from cnnray.models.answers import Answer, Rules, find_unusable
from cnnray.models.runtimes import Images, Probabilities


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image as it was sent."""

    data: bytes
    max_pixels: int
    """Largest image that is decoded."""


Image = Encoded | Images | BadImage
"""An image of a request: encoded, pixels, or why it could not be read from the request."""


def size_of(image: Image) -> int:
    """The bytes that an image holds."""
    if isinstance(image, Encoded):
        return len(image.data)
    return 0 if isinstance(image, BadImage) else image.nbytes


class Pipeline:
    """Decodes images and runs the network, in the thread that calls it.

    With several CPU threads, two micro-batches may be in it at once: the images of one are decoded, by all threads,
    while the network runs on the other.
    """

    def __init__(
        self,
        predict: Callable[[Images], Probabilities],
        rules: Rules,
        geometry: Geometry,
        observe: Callable[[str, Sequence[float]], None],
        *,
        threads: int,
    ) -> None:
        """
        Args:
            predict: the network: uint8 (N, height, width, 3) to float32 (N, classes).
            rules: make the answers of them.
            geometry: sizes that images are decoded for.
            observe: called with a stage, `decode` or `predict`, and its time in seconds for each image.
            threads: number of images decoded at once.
        """
        self.predict, self.rules = predict, rules
        self._geometry, self._observe = geometry, observe
        self._decoders = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._predicting = threading.Lock()
        self._calls: dict[int, float] = {}
        """By thread that has a micro-batch, when it last made progress."""

    @property
    def seconds_without_progress(self) -> float:
        """How long a micro-batch has been at one image, or at the network; 0 where there is none."""
        return max((time.monotonic() - moment for moment in list(self._calls.values())), default=0.0)

    def __call__(self, images: Sequence[Encoded | Images]) -> list[Answer | BadImage]:
        """Classify a micro-batch.

        Args:
            images: encoded, or pixels, uint8 (height, width, 3) as the network takes them.

        Returns:
            In order, the answers, or why an image has none.
        """
        try:
            return self._classify(images)
        finally:
            self._calls.pop(threading.get_ident(), None)

    def _classify(self, images: Sequence[Encoded | Images]) -> list[Answer | BadImage]:
        decoded: list[Images | BadImage] = []
        self._report_progress()
        mapped = self._decoders.map if self._decoders and len(images) > 1 else map
        for pixels in mapped(self._decode, images):
            self._report_progress()
            decoded.append(pixels)
        usable = [pixels for pixels in decoded if not isinstance(pixels, BadImage)]
        if not usable:
            return [error for error in decoded if isinstance(error, BadImage)]
        # In the place of the others, so that the batch keeps its size; see `batching.batch_sizes`.
        black = np.zeros_like(usable[0])
        pixels = np.stack([black if isinstance(image, BadImage) else image for image in decoded])
        with self._predicting:
            self._report_progress()
            start = time.perf_counter()
            rows = self.predict(pixels)
            seconds = time.perf_counter() - start
        if len(rows) != len(pixels):
            raise ValueError(f"The engine gave {len(rows)} rows for {len(pixels)} images.")
        self._observe("predict", [seconds] * len(usable))
        unusable = find_unusable(rows, multi_label=self.rules.multi_label)
        return [
            image if isinstance(image, BadImage) else unusable.get(index, answer)
            for index, (image, answer) in enumerate(zip(decoded, self.rules(rows), strict=True))
        ]

    def _report_progress(self) -> None:
        self._calls[threading.get_ident()] = time.monotonic()

    def _decode(self, image: Encoded | Images) -> Images | BadImage:
        if not isinstance(image, Encoded):
            return image
        start = time.perf_counter()
        try:
            return decode(image.data, self._geometry, max_pixels=image.max_pixels)
        except BadImage as error:
            return error
        finally:
            self._observe("decode", [time.perf_counter() - start])
