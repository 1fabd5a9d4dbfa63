"""Predictor: encoded images in, predictions out. Its answers equal those of every other path of the project."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnnray.images.decode import BadImage, decode
from cnnray.models import engines
from cnnray.models.answers import Answer, find_unusable, rank_classes
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
    group: str | None = None
    """Where the bundle is unsure of the class, and not of its group, that group."""


class Predictor:
    """Classifies encoded images with a bundle.

    Attributes:
        bundle: the bundle.
        rules: make answers of the probabilities.
    """

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
        self.rules = engines.find_rules(bundle, engine, withholds=withholds)
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
        errors = find_unusable(probabilities, multi_label=self.rules.multi_label)
        answers = (
            errors.get(index) or self._make_prediction(answer)
            for index, answer in enumerate(self.rules(probabilities))
        )
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

    def _make_prediction(self, answer: Answer) -> Prediction:
        names, probabilities = self.bundle.info.class_names, answer.probabilities
        (order,) = rank_classes(probabilities[None], self._top_k)
        return Prediction(
            label=None if answer.prediction is None else names[answer.prediction],
            confidence=answer.confidence,
            top_k=tuple((names[index], float(probabilities[index])) for index in order),
            probabilities=probabilities,
            labels=tuple(names[index] for index in answer.labels) if self.rules.multi_label else (),
            candidates=tuple(names[index] for index in answer.candidates),
            group=self.rules.group_name(answer),
        )
