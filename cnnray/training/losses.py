"""The loss that training minimises, and the sums over images that metrics are made of. All is computed in float32."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from cnnray.training.decided import PlannedConfig
from cnnray.training.epoch import TOP_K
from cnnray.training.recipe_config import GAMMAS

_MARGIN, _TINY = 0.05, 1e-8


class Losses:
    """Of images of one label each: cross-entropy with class weights and label smoothing, and a teacher's part."""

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
        self._top_k = min(TOP_K, classes)

    def __call__(self, images: Any, labels: Any, logits: Any) -> Any:
        """The loss of each image in nats, float32 (n,).

        Args:
            images: as the network gets them, for the teacher.
            labels: the shares of each class, float32 (n, classes).
            logits: float32 (n, classes).
        """
        losses = self._of_labels(labels, logits)
        if self._teacher is None:
            return losses
        share = self._config.distillation
        return (1 - share) * losses + share * self._of_teacher(self._teacher(images, training=False), logits)

    def _of_labels(self, labels: Any, logits: Any) -> Any:
        importance = tf.linalg.matvec(labels, self._class_weights)
        smoothing = self._config.label_smoothing
        labels = labels * (1 - smoothing) + smoothing / self._classes
        return importance * tf.nn.softmax_cross_entropy_with_logits(labels, logits)

    def _of_teacher(self, taught: Any, logits: Any) -> Any:
        # Given by its name, "kl_divergence", Keras would apply it to the logits as if they were probabilities. Its
        # result is a mean over the images.
        temperature = self._config.distillation_temperature
        distillation = keras.distillation.LogitsDistillation(temperature, keras.losses.KLDivergence())
        return distillation.compute_loss(taught, logits)

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


class MultiLabelLosses(Losses):
    """Of images with several labels: the mean over the labels of a loss of having each or not.

    It is binary cross-entropy, the focal loss (Lin et al., Focal Loss for Dense Object Detection, 2017), or the
    asymmetric one (Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2021, with gamma+ = 0). With p the
    probability of a label, the focal loss is |label - p|^gamma times the binary cross-entropy. The asymmetric loss of
    a label that an image does not have is -q^gamma log(1 - q), with q = max(p - 0.05, 0); that of one that it has is
    the cross-entropy. The loss of a label that an image has is multiplied by the weight of its class.
    """

    def _of_labels(self, labels: Any, logits: Any) -> Any:
        importance = 1 + (self._class_weights - 1) * labels
        smoothing = self._config.label_smoothing
        labels = labels * (1 - smoothing) + smoothing / 2
        return tf.reduce_mean(importance * self._of_each(labels, logits), -1)

    def _of_each(self, labels: Any, logits: Any) -> Any:
        loss, gamma = self._config.loss, self._config.loss_gamma
        if loss == "cross_entropy":
            return tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
        gamma, probabilities = GAMMAS[loss] if gamma is None else gamma, tf.sigmoid(logits)
        if loss == "focal":
            wrong = tf.maximum(tf.abs(labels - probabilities), _TINY)
            return wrong**gamma * tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
        shifted = tf.maximum(probabilities - _MARGIN, _TINY)
        return labels * tf.nn.softplus(-logits) - (1 - labels) * shifted**gamma * tf.math.log1p(-shifted)

    def _of_teacher(self, taught: Any, logits: Any) -> Any:
        """The divergence of the labels' probabilities, both at the temperature, times its square (Hinton, Vinyals and
        Dean, Distilling the Knowledge in a Neural Network, 2015)."""
        temperature = self._config.distillation_temperature
        logits, taught = logits / temperature, taught / temperature
        labels = tf.sigmoid(taught)
        entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels, taught)
        divergence = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits) - entropy
        return temperature**2 * tf.reduce_mean(divergence, -1)

    def sums(self, losses: Any, logits: Any, targets: Any, weights: Any) -> Any:
        """The first fields of `epoch.Sums`: float32 (4,). An image is right where each of its labels is.

        Args:
            losses: of the images, float32 (n,).
            logits: float32 (n, classes).
            targets: 1 for each class that an image has, else 0, float32 (n, classes).
            weights: 1 or 0 for each image, float32 (n,).
        """
        right = tf.reduce_all(tf.equal(logits > 0, targets > 0), -1)
        fields = [tf.ones_like(weights), losses, tf.cast(right, tf.float32), tf.zeros_like(weights)]
        return tf.reduce_sum(tf.stack(fields) * weights, axis=1)

    def validation_sums(self, logits: Any, targets: Any, weights: Any) -> Any:
        """`sums` of the plain binary cross-entropy."""
        losses = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(targets, logits), -1)
        return self.sums(losses, logits, targets, weights)
