"""Predictor: encoded images in, predictions out. Its answers equal those of every other path of the project."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnnray.images.decode import BadImage, decode
from cnnray.models import engines
from cnnray.models.answers import find_labels, find_unusable, rank_classes
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.runtimes import KerasEngine, NetworkOutputs

_DECODING_THREADS = 4


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    label: str | None
    """The most probable class; None: the bundle is unsure, or, with several labels, the image has none."""
    confidence: float
    """Probability of the most probable class."""
    top_k: tuple[tuple[str, float], ...]
    """Classes and probabilities, highest first."""
    probabilities: npt.NDArray[np.float32]
    """float32 (classes,), in the order of the bundle's class names."""
    labels: tuple[str, ...] = ()
    """Of a bundle with several labels, those that the image has, most probable first."""
    candidates: tuple[str, ...] = ()
    """Where the bundle is unsure, classes that the image may have, most probable first."""


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
        withholds: bool = True,
    ) -> None:
        """
        Args:
            bundle: from `Bundle.load`.
            engine: one of `engines.ENGINES`; except for `keras`, the bundle must have been exported to it.
            top_k: length of `Prediction.top_k`, at most the number of classes.
            threads: CPU threads of the engine; None: all that this process may use.
            batch_size: largest batch that the network gets.
            withholds: False: each image gets its most probable class, also below the threshold of the bundle.

        Raises:
            BundleError: the model cannot be loaded, the bundle was not exported to this engine, or has no threshold
                for it.
        """
        self.bundle = bundle
        self._threshold = engines.find_threshold(bundle, engine) if withholds else None
        self._top_k = top_k
        self._engine = engines.load_engine(bundle, engine, threads)
        self._batch_size = batch_size

    def __call__(self, images: Sequence[bytes]) -> list[Prediction | BadImage]:
        """Classify encoded images.

        Returns:
            For each image, in order, its prediction, or why it has none.
        """
        geometry = self.bundle.info.geometry

        def decode_or_error(data: bytes) -> npt.NDArray[np.uint8] | BadImage:
            try:
                return decode(data, geometry)
            except BadImage as error:
                return error

        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            decoded = list(pool.map(decode_or_error, images))
        readable = [image for image in decoded if not isinstance(image, BadImage)]
        if not readable:
            return [image for image in decoded if isinstance(image, BadImage)]
        probabilities = self.probabilities(np.stack(readable))
        errors = find_unusable(probabilities, multi_label=self.bundle.info.is_multi_label)
        answers = iter([errors.get(index) or self._make_prediction(row) for index, row in enumerate(probabilities)])
        return [image if isinstance(image, BadImage) else next(answers) for image in decoded]

    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Compute the probabilities of decoded images.

        Args:
            images: uint8 (N, height, width, 3), RGB.

        Returns:
            float32 (N, classes), as the engine gives them: `find_unusable` says which rows must not be used.
        """
        return engines.predict_in_batches(self._engine, images, self._batch_size)

    def all_outputs(self, images: npt.NDArray[np.uint8]) -> NetworkOutputs:
        """Compute the probabilities of decoded images, with logits and embeddings.

        Args:
            images: uint8 (N, height, width, 3), RGB.

        Raises:
            BundleError: the engine is not `keras`; only that one gives logits and embeddings.
        """
        if not isinstance(self._engine, KerasEngine):
            raise BundleError("Only the engine keras gives logits and embeddings.")
        return self._engine.outputs_in_batches(images, self._batch_size)

    def _make_prediction(self, probabilities: npt.NDArray[np.float32]) -> Prediction:
        names = self.bundle.info.class_names
        (order,) = rank_classes(probabilities[None], self._top_k)
        top_k = tuple((names[index], float(probabilities[index])) for index in order)
        label, confidence = top_k[0]
        if (thresholds := self.bundle.info.thresholds) is not None:
            (found,) = find_labels(probabilities[None], thresholds)
            labels = tuple(names[index] for index in found)
            return Prediction(labels[0] if labels else None, confidence, top_k, probabilities, labels)
        if self._threshold and self._threshold.is_unsure(probabilities[None])[0]:
            candidates = tuple(names[index] for index in self._threshold.candidates(probabilities))
            return Prediction(None, confidence, top_k, probabilities, candidates=candidates)
        return Prediction(label, confidence, top_k, probabilities)
