"""Grad-CAM: the regions of an image that support a class in a convolutional network.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, 2017: the sum of
the last convolutional feature maps, each weighted by the mean of the class score's gradient over it. Negative values
become 0.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cnnray.models import averaging
from cnnray.models.bundle import Bundle, BundleError

if TYPE_CHECKING:
    import keras

_IMAGES_AT_ONCE = 16
"""Images of one gradient, whose feature maps are all in memory."""


def heat_maps(
    bundle: Bundle, images: npt.NDArray[np.uint8], classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Compute the heat map of one class for each image.

    Args:
        bundle: its network must end with convolutional feature maps before the head.
        images: uint8 (N, height, width, 3).
        classes: the index of the class for each image, int64 (N,).

    Returns:
        float32 (N, height, width), scaled to 0...1 for each image; all 0 if no region supports the class.

    Raises:
        BundleError: the network has no convolutional features, or no trainable layers.
    """
    import tensorflow as tf

    network = _features_and_logits(bundle)
    maps = []
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        batch = slice(start, start + _IMAGES_AT_ONCE)
        with tf.GradientTape() as tape:
            features, logits = network(images[batch], training=False)
            # The score of one image depends on the features of that image alone, and so does its gradient.
            score = tf.reduce_sum(tf.gather(logits, classes[batch], axis=1, batch_dims=1))
        # The tape records the features because trainable variables produced them.
        gradient = tape.gradient(score, features)
        if gradient is None:
            raise BundleError(f"{bundle.uri}: the network has no trainable layers, so it has no gradients.")
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(tf.cast(weights * features, tf.float32), axis=-1, keepdims=True))
        maps.append(tf.image.resize(heat, images.shape[1:3])[..., 0].numpy())
    heat_maps = np.concatenate(maps)
    return np.asarray(heat_maps / np.maximum(heat_maps.max(axis=(1, 2), keepdims=True), 1e-12), np.float32)


def _features_and_logits(bundle: Bundle) -> "keras.Model":
    import keras

    model = averaging.explained_network(bundle.model)
    if not any(isinstance(layer, keras.layers.Conv2D) for layer in model._flatten_layers()):
        raise BundleError(f"{bundle.uri}: the network has no convolutional features.")
    (features,) = [
        layer.input for layer in model.layers if _is_feature_map(layer.input) and not _is_feature_map(layer.output)
    ][-1:]
    # Go back before pooling, which only lowers the resolution.
    pooling = (keras.layers.MaxPooling2D, keras.layers.AveragePooling2D, keras.layers.Dropout)
    while isinstance(layer := features._keras_history.operation, pooling):
        features = layer.input
    return keras.Model(model.inputs[0], [features, model.get_layer("logits").output])


def _is_feature_map(tensor: Any) -> bool:
    return len(getattr(tensor, "shape", ())) == 4
