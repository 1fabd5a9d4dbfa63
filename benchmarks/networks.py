"""Networks that are compared with cnnray's own: changed ones, and airbench's."""

from collections.abc import Callable
from typing import Any

import numpy as np

Variant = Callable[[Any], Any]
"""Gives another network in place of one."""


def usual_first_kernels(model: Any) -> Any:
    """Random first kernels as Keras draws them, whose mean is not zero."""
    import keras

    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    first.kernel.assign(first.kernel_initializer(first.kernel.shape, first.kernel.dtype))
    return model


def with_layers(change: Callable[[Any], Any]) -> Variant:
    """The network with other layers; each new layer begins with the weights of the one that it takes the place of.

    Args:
        change: gives a layer's replacement, or None to keep the layer.
    """

    def variant(model: Any) -> Any:
        import keras

        def clone(layer: Any) -> Any:
            return change(layer) or layer.__class__.from_config(layer.get_config())

        cloned = keras.models.clone_model(model, clone_function=clone)
        for layer, original in zip(cloned.layers, model.layers, strict=True):
            if layer.weights and [w.shape for w in layer.weights] == [w.shape for w in original.weights]:
                layer.set_weights(original.get_weights())
        return cloned

    return variant


def with_settings(kind: str, **changes: Any) -> Variant:
    """Other settings for the layers of a kind."""

    def change(layer: Any) -> Any:
        if type(layer).__name__ != kind:
            return None
        return layer.__class__.from_config(layer.get_config() | changes)

    return with_layers(change)


def with_pooling(kind: str) -> Variant:
    """Another global pooling."""

    def change(layer: Any) -> Any:
        import keras

        return getattr(keras.layers, kind)(name=layer.name) if type(layer).__name__.startswith("Global") else None

    return with_layers(change)


def without(kind: str) -> Variant:
    """Without the layers of a kind; of several inputs, the last one is passed on."""

    def change(layer: Any) -> Any:
        import keras

        class PassOn(keras.layers.Layer):
            def call(self, inputs: Any, mask: Any = None) -> Any:
                return inputs[-1] if isinstance(inputs, list) else inputs

        return PassOn(name=layer.name) if type(layer).__name__ == kind else None

    return with_layers(change)


def with_activation(name: str) -> Variant:
    """Another activation in place of ReLU."""

    def change(layer: Any) -> Any:
        import keras

        return keras.layers.Activation(name, name=layer.name) if isinstance(layer, keras.layers.ReLU) else None

    return with_layers(change)


def haar(model: Any) -> Any:
    """The Haar wavelet of 2x2 pixels in front, its details as strong as its averages; then usual first kernels."""

    def change(layer: Any) -> Any:
        import keras

        if type(layer).__name__ != "Rescaling":
            return None
        averages, edges = np.array([1.0, 1.0]) / np.sqrt(2), np.array([1.0, -1.0]) / np.sqrt(2)
        pairs = ((averages, averages), (averages, edges), (edges, averages), (edges, edges))
        kernels = np.stack([gain * np.outer(*pair) for gain, pair in zip((1.25, 16, 16, 32), pairs, strict=True)], -1)
        wavelet = keras.layers.DepthwiseConv2D(2, padding="same", depth_multiplier=4, use_bias=False, trainable=False)
        front = keras.Sequential([keras.layers.Rescaling(1 / 255, offset=-0.5), wavelet], name=layer.name)
        front.build((None, *model.input_shape[1:]))
        wavelet.set_weights([np.repeat(kernels[:, :, None], 3, 2)])
        return front

    return with_layers(change)(model)


def airbench(images: Any, classes: int) -> Any:
    """The network of airbench94 (Jordan, 94 % on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024).

    Its first kernels whiten patches of 2x2 pixels and stay as they are. Its other kernels begin as identities, as far
    as they go. Left out: the first epochs' training of the whitening's bias alone, and that batch norms' biases learn
    64 times as fast.

    Args:
        images: training images, uint8 (N, size, size, 3), for the whitening.
        classes: number of classes.
    """
    import keras
    from keras import layers

    patches = np.lib.stride_tricks.sliding_window_view(images[:5000], (2, 2), axis=(1, 2))[:, ::2, ::2]
    patches = (patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12) / 255 - 0.5).astype(np.float64)
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    kernels = (directions / np.sqrt(variances + 5e-4)).reshape(2, 2, 3, 12)[..., ::-1]

    def identity(shape: tuple[int, ...], dtype: Any = None) -> Any:
        kernel = np.array(keras.initializers.HeUniform()(shape))
        same = min(shape[-2:])
        kernel[..., :same] = 0
        kernel[1, 1, np.arange(same), np.arange(same)] = 1
        return kernel

    def convolution(x: Any, filters: int, pool: bool) -> Any:
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, kernel_initializer=identity)(x)
        x = layers.MaxPooling2D(2)(x) if pool else x
        return layers.Activation("gelu")(layers.BatchNormalization(momentum=0.6, epsilon=1e-5, scale=False)(x))

    pixels = keras.Input(images.shape[1:], dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, offset=-0.5)(pixels)
    whitening = layers.Conv2D(24, 2, use_bias=False, trainable=False)
    x = layers.Activation("gelu")(whitening(x))
    whitening.set_weights([np.concatenate([kernels, -kernels], -1)])
    for filters in (64, 256, 256):
        x = convolution(convolution(x, filters, pool=True), filters, pool=False)
    x = layers.GlobalMaxPooling2D()(x)  # of 3x3 for images of 32x32
    logits = layers.Rescaling(1 / 9, dtype="float32", name="logits")(
        layers.Dense(classes, use_bias=False, dtype="float32")(x)
    )
    return keras.Model(pixels, layers.Softmax(dtype="float32", name="probabilities")(logits), name="airbench")
