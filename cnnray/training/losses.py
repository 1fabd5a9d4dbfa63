"""The loss that training minimises, and the sums over images that metrics are made of."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from cnnray.training.decided import PlannedConfig
from cnnray.training.epoch import TOP_K


class Losses:
    """Cross-entropy with class weights and label smoothing, and a teacher's part. All is computed in float32."""

    def __init__(
        self,
        config: PlannedConfig,
        classes: int,
        teacher: keras.Model | None,
        class_weights: npt.NDArray[np.float32] | None,
    ) -> None:
        """
        Args:
            config: of the run.
            classes: number of classes.
            teacher: gives logits that the network learns, too.
            class_weights: float32 (classes,), the weight of an image of each class; None: 1.
        """
        self._config, self._classes, self._teacher = config, classes, teacher
        self._class_weights = np.ones(classes, np.float32) if class_weights is None else class_weights
        # Given by its name, "kl_divergence", Keras would apply it to the logits as if they were probabilities.
        self._distillation = keras.distillation.LogitsDistillation(
            config.distillation_temperature, keras.losses.KLDivergence()
        )
        self._top_k = min(TOP_K, classes)

    def __call__(self, images: Any, labels: Any, logits: Any) -> Any:
        """The loss of each image in nats, float32 (n,).

        Args:
            images: as the network gets them, for the teacher.
            labels: the shares of each class, float32 (n, classes).
            logits: float32 (n, classes).
        """
        importance = tf.linalg.matvec(labels, self._class_weights)
        smoothing = self._config.label_smoothing
        labels = labels * (1 - smoothing) + smoothing / self._classes
        losses = importance * tf.nn.softmax_cross_entropy_with_logits(labels, logits)
        if self._teacher is None:
            return losses
        share = self._config.distillation
        # Keras's is a mean over the images.
        taught = self._distillation.compute_loss(self._teacher(images, training=False), logits)
        return (1 - share) * losses + share * taught

    def sums(self, losses: Any, logits: Any, targets: Any, weights: Any) -> Any:
        """The first fields of `epoch.Sums`: float32 (4,).

        Args:
            losses: of the images, float32 (n,).
            logits: float32 (n, classes).
            targets: class indices, int64 (n,).
            weights: 1 or 0 for each image, float32 (n,).
        """
        correct = tf.cast(tf.equal(tf.argmax(logits, -1), targets), tf.float32)
        in_top_k = tf.cast(keras.ops.in_top_k(targets, logits, self._top_k), tf.float32)
        return tf.reduce_sum(tf.stack([tf.ones_like(weights), losses, correct, in_top_k]) * weights, axis=1)

    def validation_sums(self, logits: Any, targets: Any, weights: Any) -> Any:
        """`sums` of the plain cross-entropy, which needs no smoothing, weights or teacher."""
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
        return self.sums(losses, logits, targets, weights)
