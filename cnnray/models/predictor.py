"""Predictor: encoded images in, predictions out, the same answers as every other path of the project."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnray.images.decode import BadImage, decode
from cnnray.models.bundle import Bundle

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batches are padded up to one of these, so that the compiled function meets few shapes."""

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
    """Classifies encoded images with a bundle.

    The network runs as one compiled TensorFlow function. Probabilities are softmax(logits / temperature);
    they depend on the grouping into batches by less than 1e-5.
    """

    def __init__(self, bundle: Bundle, *, top_k: int = 5) -> None:
        """
        Args:
            bundle: what `Bundle.load` gave.
            top_k: length of `Prediction.top_k`, cut to the number of classes.
        """
        import keras
        import tensorflow as tf

        self.bundle = bundle
        self._top_k = min(top_k, len(bundle.info.class_names))
        network = keras.Model(bundle.model.inputs, bundle.model.get_layer("logits").output)
        temperature = bundle.info.temperature
        size = bundle.info.image_size

        def run(images: Any) -> Any:
            return tf.nn.softmax(tf.cast(network(images, training=False), tf.float32) / temperature)

        self._run = tf.function(run, [tf.TensorSpec((None, size, size, 3), tf.uint8)], autograph=False)

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
        results = np.empty((len(images), len(self.bundle.info.class_names)), np.float32)
        largest = BATCH_SIZES[-1]
        for start in range(0, len(images), largest):
            batch = images[start : start + largest]
            padded = next(size for size in BATCH_SIZES if size >= len(batch))
            if padded > len(batch):
                batch = np.concatenate([batch, np.zeros((padded - len(batch), *batch.shape[1:]), np.uint8)])
            results[start : start + largest] = self._run(batch).numpy()[: len(images) - start]
        return results

    def _prediction(self, probabilities: npt.NDArray[np.float32]) -> Prediction:
        names = self.bundle.info.class_names
        order = np.argsort(-probabilities, kind="stable")[: self._top_k]
        top_k = tuple((names[index], float(probabilities[index])) for index in order)
        return Prediction(top_k[0][0], top_k[0][1], top_k, probabilities)
