"""Grad-CAM: where in an image a convolutional network sees the class that it answers.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, 2017: the last
convolutional features, each weighted by the mean of the class's gradient over it, added up; what is negative is left
out.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cnnray.models.bundle import Bundle, BundleError

if TYPE_CHECKING:
    import keras


def heat_maps(bundle: Bundle, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Heat maps of the most probable class.

    Args:
        bundle: of a network whose features are maps up to a last layer.
        images: uint8 (N, size, size, 3).

    Returns:
        float32 (N, size, size), 0 to 1 in each image; all 0 where nothing speaks for the class.

    Raises:
        BundleError: the network has no convolutional features.
    """
    import tensorflow as tf

    network = _features_and_logits(bundle)
    maps = []
    for image in images:
        with tf.GradientTape() as tape:
            features, logits = network(image[None], training=False)
            tape.watch(features)
            score = tf.reduce_max(logits)
        gradient = tape.gradient(score, features)
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(tf.cast(weights * features, tf.float32), axis=-1, keepdims=True))
        maps.append(tf.image.resize(heat, images.shape[1:3])[0, ..., 0].numpy())
    found = np.stack(maps)
    return np.asarray(found / np.maximum(found.max(axis=(1, 2), keepdims=True), 1e-12), np.float32)


def _features_and_logits(bundle: Bundle) -> "keras.Model":
    import keras

    model = bundle.model
    with_maps = [layer for layer in model.layers if len(getattr(layer.output, "shape", ())) == 4]
    # The first has the pixels themselves.
    if len(with_maps) < 2 or not any(isinstance(one, keras.layers.Conv2D) for one in model._flatten_layers()):
        raise BundleError(f"{bundle.uri}: the network has no convolutional features to look at.")
    return keras.Model(model.inputs[0], [with_maps[-1].output, model.get_layer("logits").output])
