"""Grad-CAM: where in an image a convolutional network sees the class that it answers.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, 2017: the last
convolutional features, each weighted by the mean of the class's gradient over it, added up; what is negative is left
out.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cnnray.models.bundle import Bundle, BundleError

if TYPE_CHECKING:
    import keras


def heat_maps(
    bundle: Bundle, images: npt.NDArray[np.uint8], classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Heat maps of a class in each image.

    Args:
        bundle: of a network whose features are maps up to a last layer.
        images: uint8 (N, size, size, 3).
        classes: int64 (N,), the class that each is asked about.

    Returns:
        float32 (N, size, size), 0 to 1 in each image; all 0 where nothing speaks for the class.

    Raises:
        BundleError: the network has no convolutional features, or none that can be trained.
    """
    import tensorflow as tf

    network = _features_and_logits(bundle)
    maps = []
    for image, index in zip(images, classes, strict=True):
        with tf.GradientTape() as tape:
            features, logits = network(image[None], training=False)
            score = logits[0, index]
        # Features are no variable, but what trainable ones have made, and so the tape knows them.
        gradient = tape.gradient(score, features)
        if gradient is None:
            raise BundleError(f"{bundle.uri}: nothing in the network can be trained, so that it has no gradients.")
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(tf.cast(weights * features, tf.float32), axis=-1, keepdims=True))
        maps.append(tf.image.resize(heat, images.shape[1:3])[0, ..., 0].numpy())
    found = np.stack(maps)
    return np.asarray(found / np.maximum(found.max(axis=(1, 2), keepdims=True), 1e-12), np.float32)


def _features_and_logits(bundle: Bundle) -> "keras.Model":
    import keras

    model = bundle.model
    if not any(isinstance(layer, keras.layers.Conv2D) for layer in model._flatten_layers()):
        raise BundleError(f"{bundle.uri}: the network has no convolutional features to look at.")
    (features,) = [layer.input for layer in model.layers if _is_maps(layer.input) and not _is_maps(layer.output)][-1:]
    # Pooling has only made them coarser.
    coarser = (keras.layers.MaxPooling2D, keras.layers.AveragePooling2D, keras.layers.Dropout)
    while isinstance(made_by := features._keras_history.operation, coarser):
        features = made_by.input
    return keras.Model(model.inputs[0], [features, model.get_layer("logits").output])


def _is_maps(tensor: Any) -> bool:
    return len(getattr(tensor, "shape", ())) == 4
