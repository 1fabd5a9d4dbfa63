"""Predictor: encoded images in, predictions out, the same answers as every other path of the project."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnnray.images.decode import BadImage, decode
from cnnray.models import engines
from cnnray.models.bundle import Bundle, BundleError

_DECODING_THREADS = 4


@dataclass(frozen=True)
class Prediction:
    """The answer for one image."""

    label: str
    """The most probable class."""
    confidence: float
    """Its probability."""
    top_k: tuple[tuple[str, float], ...]
    """Classes and probabilities, highest first."""
    probabilities: npt.NDArray[np.float32]
    """float32 (classes,), in the order of the bundle's class names."""


class Predictor:
    """Classifies encoded images with a bundle."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        engine: str = engines.KERAS,
        top_k: int = 5,
        threads: int | None = None,
        batch_size: int = engines.BATCH_SIZE,
    ) -> None:
        """
        Args:
            bundle: what `Bundle.load` gave.
            engine: one of `engines.ENGINES`; the bundle must have been exported to it (`keras` is always there).
            top_k: length of `Prediction.top_k`, cut to the number of classes.
            threads: CPU threads of the engine; None: as many as this process may use.
            batch_size: images that the network is given at once, at most.

        Raises:
            BundleError: the bundle cannot be loaded, or was not exported to this engine.
        """
        self.bundle = bundle
        self._top_k = top_k
        self._engine = engines.engine_of(bundle, engine, threads)
        self._batch_size = batch_size

    def __call__(self, images: Sequence[bytes]) -> list[Prediction | BadImage]:
        """Classify encoded images: for each, in order, its prediction, or why it has none."""
        info = self.bundle.info

        def pixels(data: bytes) -> npt.NDArray[np.uint8] | BadImage:
            try:
                return decode(data, info.image_size, info.resize)
            except BadImage as error:
                return error

        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            decoded = list(pool.map(pixels, images))
        good = [image for image in decoded if not isinstance(image, BadImage)]
        if not good:
            return [image for image in decoded if isinstance(image, BadImage)]
        rows = iter(self.probabilities(np.stack(good)))
        return [image if isinstance(image, BadImage) else self._prediction(next(rows)) for image in decoded]

    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities of decoded images.

        Args:
            images: uint8 (N, size, size, 3), RGB.

        Returns:
            float32 (N, classes).
        """
        return engines.in_batches(self._engine, images, self._batch_size)

    def in_full(self, images: npt.NDArray[np.uint8]) -> engines.InFull:
        """Probabilities of decoded images, with the raw logits and the embeddings that they are made of.

        Args:
            images: uint8 (N, size, size, 3), RGB.

        Raises:
            BundleError: another engine than `keras`, which alone has them.
        """
        if not isinstance(self._engine, engines.KerasEngine):
            raise BundleError("Logits and embeddings can only be had with the engine keras.")
        starts = range(0, max(len(images), 1), self._batch_size)
        parts = [self._engine.in_full(images[start : start + self._batch_size]) for start in starts]
        return engines.InFull(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _prediction(self, probabilities: npt.NDArray[np.float32]) -> Prediction:
        names = self.bundle.info.class_names
        (order,) = ranked(probabilities[None], self._top_k)
        top_k = tuple((names[index], float(probabilities[index])) for index in order)
        return Prediction(top_k[0][0], top_k[0][1], top_k, probabilities)


def ranked(probabilities: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.int64]:
    """The classes of each image by probability, highest first; of equal ones, that which comes first.

    Args:
        probabilities: float32 (N, classes).
        top_k: how many; cut to the number of classes.

    Returns:
        int64 (N, min(top_k, classes)), indices of classes.
    """
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
