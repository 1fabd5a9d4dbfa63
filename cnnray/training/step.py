"""The compiled training and validation steps under `MultiWorkerMirroredStrategy`.

Keras 3's own `fit` does not run under it (its logs and its symbolic build fail), so this is a custom loop:
every worker takes gradients on its part of the global batch, the losses are divided by the global batch's
number of images, and `optimizer.apply_gradients` sums the gradients over the workers.
"""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from cnnray.models import architectures
from cnnray.training.config import TrainConfig
from cnnray.training.sums import TOP_K, Sums

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Steps:
    """The network, its optimizer, and what is done with them step by step.

    Attributes:
        model: the network that is trained.
        inference: the float32 network that goes into the bundle; `model` itself where it computes in float32.
        optimizer: a Keras optimizer, with loss scaling for float16.
    """

    def __init__(self, config: TrainConfig, classes: int, weights: str | None = None) -> None:
        """
        Args:
            config: architecture, sizes, precision, optimizer and seed.
            classes: number of classes.
            weights: local file of backbone weights.
        """
        keras.utils.set_random_seed(config.seed)
        self._strategy = tf.distribute.get_strategy()
        self.model = self._build(config, classes, _POLICIES[config.precision], weights)
        self.inference = self.model
        if config.precision != "float32":
            self.inference = self._build(config, classes, "float32", None)
        self.optimizer = _optimizer(config)
        self.optimizer.build(self.model.trainable_variables)
        self._network = keras.Model(self.model.inputs, self.model.get_layer("logits").output)
        # Keras's callbacks look for the optimizer at the model.
        self.model.compile(optimizer=self.optimizer)
        self._seeds = [v for v in self.model.variables if v.path.endswith("seed_generator_state")]
        self._seed = config.seed
        self._synchronized = config.synchronized_batch_norm
        self._statistics = [
            variable
            for layer in self.model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization)
            for variable in (layer.moving_mean, layer.moving_variance)
        ]
        self._top_k = min(TOP_K, classes)
        shape = (None, config.image_size, config.image_size, 3)
        signature = [
            tf.TensorSpec(shape, tf.uint8),
            tf.TensorSpec((None,), tf.int64),
            tf.TensorSpec((None,), tf.float32),
        ]
        # Nothing here needs AutoGraph, whose files a killed worker would leave in the temporary folder.
        self._compiled_train = tf.function(self._train, [*signature, tf.TensorSpec((), tf.float32)], autograph=False)
        self._compiled_reduce = tf.function(self._reduce, autograph=False)
        inference = keras.Model(self.inference.inputs, self.inference.get_layer("logits").output)
        self._compiled_evaluate = tf.function(
            lambda images, targets, weights: self._sums(inference(images, training=False), targets, weights),
            signature,
            autograph=False,
        )

    @staticmethod
    def _build(config: TrainConfig, classes: int, policy: str, weights: str | None) -> Any:
        return architectures.build(
            config.architecture,
            config.image_size,
            classes,
            dropout=config.dropout,
            synchronized=config.synchronized_batch_norm,
            weights=weights,
            dtype=policy,
        )

    # -- one step --------------------------------------------------------------------------------------

    def train(self, images: npt.NDArray[np.uint8], targets: npt.NDArray[np.int64], bad: int = 0) -> Sums:
        """Train on one global batch, of which this worker brings a part.

        Args:
            images: uint8 (n, size, size, 3), this worker's part without those that could not be read; n may
                differ between workers and steps, and may be 0.
            targets: int64 (n,), class indices.
            bad: how many of this worker's part could not be read.

        Returns:
            The sums over all workers' parts, before the update.
        """
        weights = np.ones(len(images), np.float32)
        kept = []
        if not len(images):
            # TensorFlow has no convolution of nothing, and batch norm no mean: one black image, which weighs
            # nothing, and leaves no trace in the statistics but where they are of all workers' images.
            images, targets, weights = _padding(images, 1), np.zeros(1, np.int64), np.zeros(1, np.float32)
            if not self._synchronized:
                kept = [variable.numpy() for variable in self._statistics]
        sums = Sums(*self._compiled_train(images, targets, weights, np.float32(bad)).numpy().tolist())
        for variable, value in zip(self._statistics, kept, strict=False):
            variable.assign(value)
        return sums

    def _train(self, images: Any, targets: Any, weights: Any, bad: Any) -> Any:
        return self._strategy.run(self._replica_step, args=(images, targets, weights, bad))

    def _replica_step(self, images: Any, targets: Any, weights: Any, bad: Any) -> Any:
        replica = tf.distribute.get_replica_context()
        # Waits for the other workers to begin the step, not for their forward pass as a sum of losses would.
        count = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.reduce_sum(weights))
        with tf.GradientTape() as tape:
            logits = self._network(images, training=True)
            loss = tf.reduce_sum(_cross_entropy(targets, logits) * weights) / tf.maximum(count, 1.0)
            if self._network.losses:
                # Weight penalties are the same on every worker, and the workers' gradients are summed.
                loss += tf.add_n(self._network.losses) / replica.num_replicas_in_sync
            loss = self.optimizer.scale_loss(loss)
        variables = self._network.trainable_variables
        gradients = tape.gradient(loss, variables)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = _overflow_everywhere(replica, gradients)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        sums = tf.concat([self._sums(logits, targets, weights), [bad]], 0)
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, sums)

    def _sums(self, logits: Any, targets: Any, weights: Any) -> Any:
        logits = tf.cast(logits, tf.float32)
        correct = tf.cast(tf.equal(tf.argmax(logits, -1), targets), tf.float32)
        in_top_k = tf.cast(keras.ops.in_top_k(targets, logits, self._top_k), tf.float32)
        per_image = tf.stack([tf.ones_like(weights), _cross_entropy(targets, logits), correct, in_top_k])
        return tf.reduce_sum(per_image * weights, axis=1)

    def evaluate(self, images: npt.NDArray[np.uint8], targets: npt.NDArray[np.int64], padded: int) -> Sums:
        """The sums over this worker's images alone, by the weights that would go into the bundle.

        Args:
            images: uint8 (n, size, size, 3).
            targets: int64 (n,).
            padded: number of images that the network is given, for the same shape in every call; at least n.
        """
        short = padded - len(images)
        weights = np.concatenate([np.ones(len(images), np.float32), np.zeros(short, np.float32)])
        targets = np.concatenate([targets, np.zeros(short, np.int64)])
        images = np.concatenate([images, _padding(images, short)])
        return Sums(*self._compiled_evaluate(images, targets, weights).numpy().tolist())

    # -- between the steps -----------------------------------------------------------------------------

    def reduce(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum of an int64 or float array over all workers; each must call it."""

        return np.asarray(self._compiled_reduce(tf.constant(values)))

    def _reduce(self, values: Any) -> Any:
        def replica(value: Any) -> Any:
            # The copy is on the replica's device; all_reduce refuses a tensor without one.
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(value))

        return self._strategy.run(replica, args=(values,))

    def average_statistics(self) -> None:
        """Give all workers the mean of their batch norms' moving statistics, which else differ.

        It changes no gradient (these are read at inference only), and as moving averages are linear,
        averaging often gives what averaging once would.
        """
        if not self._statistics:
            return
        mine = np.concatenate([variable.numpy() for variable in self._statistics])
        mean = self.reduce(mine) / self._strategy.num_replicas_in_sync
        start = 0
        for variable in self._statistics:
            stop = start + variable.shape[0]
            variable.assign(mean[start:stop])
            start = stop

    def seed_dropout(self, epoch: int, step: int, rank: int) -> None:
        """Make the random layers a function of (seed, epoch, step, worker), different on every worker."""
        for index, state in enumerate(self._seeds):
            entropy = np.random.SeedSequence([self._seed, epoch, rank, index]).generate_state(1)[0]
            state.assign([int(entropy), step])

    def update_inference(self) -> None:
        """Bring the float32 network up to date with the trained one."""
        if self.inference is not self.model:
            self.inference.set_weights(self.model.get_weights())

    def load(self, model_file: str, optimizer: dict[str, npt.NDArray[Any]]) -> None:
        """Take the weights of a `.keras` file and the optimizer's variables (see `optimizer_state`)."""
        self.inference.load_weights(model_file)
        if self.inference is not self.model:
            self.model.set_weights(self.inference.get_weights())
        for index, variable in enumerate(self.optimizer.variables):
            variable.assign(optimizer[str(index)])

    def optimizer_state(self) -> dict[str, npt.NDArray[Any]]:
        """The optimizer's variables in their order."""
        return {str(index): variable.numpy() for index, variable in enumerate(self.optimizer.variables)}


def _optimizer(config: TrainConfig) -> Any:
    if config.optimizer == "adam":
        optimizer = keras.optimizers.Adam(config.learning_rate)
    else:
        optimizer = keras.optimizers.SGD(config.learning_rate, momentum=0.9)
    if config.precision == "float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _overflow_everywhere(replica: Any, gradients: list[Any]) -> list[Any]:
    """Make all workers' gradients infinite where those of one have overflowed.

    Keras's loss scaling looks at its own worker's gradients, and skips the update, with the all-reduce in it, where
    they are not finite: a worker that skipped alone would leave the others waiting.
    """
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
    overflows = replica.all_reduce(tf.distribute.ReduceOp.SUM, 1.0 - tf.cast(finite, tf.float32))
    return [tf.where(overflows > 0, tf.constant(np.inf, gradient.dtype), gradient) for gradient in gradients]


def _cross_entropy(targets: Any, logits: Any) -> Any:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, tf.cast(logits, tf.float32))


def _padding(images: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    return np.zeros((count, *images.shape[1:]), np.uint8)
