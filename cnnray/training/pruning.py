"""Magnitude pruning: the smallest weights of each kernel become zero and stay zero; the others are trained on."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf


class Pruning:
    """Masks of the weights that are zero. To be created inside the strategy's scope."""

    def __init__(self, model: keras.Model, inference: keras.Model) -> None:
        """
        Args:
            model: the network that is trained; its trainable kernels are pruned.
            inference: that of the bundle, with the same layers.
        """
        pairs = [
            (variable, twin)
            for layer, other in zip(model._flatten_layers(), inference._flatten_layers(), strict=True)
            if not isinstance(layer, keras.Model) and layer.trainable
            for variable, twin in zip(layer.weights, other.weights, strict=True)
            if variable.trainable and len(variable.shape) > 1
        ]
        self._kernels = [kernel for kernel, _ in pairs]
        self._inference = [other for kernel, other in pairs if other is not kernel]
        self._masks = [tf.Variable(np.ones(kernel.shape, np.float32), trainable=False) for kernel in self._kernels]
        self.set_masks_from_weights()

    def set_masks_from_weights(self) -> None:
        """Take the zeros of the weights as the masks."""
        for kernel, mask in zip(self._kernels, self._masks, strict=True):
            mask.assign((kernel.numpy() != 0).astype(np.float32))

    def choose(self, sparsity: float) -> None:
        """Make this share of each kernel zero, the smallest weights."""
        for kernel, mask in zip(self._kernels, self._masks, strict=True):
            values = np.abs(kernel.numpy())
            smallest = np.argsort(values, axis=None, kind="stable")[: round(sparsity * values.size)]
            chosen = np.ones(values.size, np.float32)
            chosen[smallest] = 0
            mask.assign(chosen.reshape(values.shape))
        self.apply()

    def apply(self) -> None:
        """Set the chosen weights to zero again, after an update."""
        for index, mask in enumerate(self._masks):
            for kernels in (self._kernels, self._inference):
                if kernels:
                    kernel: Any = kernels[index]
                    kernel.assign(kernel * mask)
