"""The compiled training and validation steps under `MultiWorkerMirroredStrategy`.

Keras 3's own `fit` does not run under it (its logs and its symbolic build fail), so this is a custom loop:
every worker computes gradients on its part of the global batch, the losses are divided by the number of images
of the global batch, and the gradients are summed over the workers before the optimizer gets them. So clipping,
the check for overflow and accumulation do the same on every worker, and the same as in one process.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from cnnray.models import architectures, augment, transfer
from cnnray.models.augment import Augmenter
from cnnray.training import recipe
from cnnray.training.decided import PlannedConfig
from cnnray.training.epoch import Sums
from cnnray.training.losses import Losses, MultiLabelLosses
from cnnray.training.phases import Phase, prunes_at, sparsity_at
from cnnray.training.pruning import Pruning

Targets = npt.NDArray[Any]
"""Of images: class indices, int64 (n,); or, with several labels, 1 for each that an image has, else 0: float32
(n, classes)."""
_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Started:
    """A step that has begun, and that a GPU may be busy with."""

    def __init__(self, sums: Any) -> None:
        self._sums = sums

    def result(self) -> Sums:
        """Wait for its end.

        Returns:
            The sums over all workers' images, before the update; their loss is the one that is minimised.
        """
        return Sums(*self._sums.numpy().tolist())


class Steps:
    """The network, its optimizer, and the compiled steps.

    Attributes:
        model: the network that is trained.
        inference: the float32 network that goes into the bundle; `model` itself where it computes in float32 and its
            weights are not averaged.
        optimizer: a Keras optimizer, with loss scaling for float16.
    """

    def __init__(
        self,
        config: PlannedConfig,
        classes: int,
        *,
        weights: Path | None = None,
        head_of: tuple[Sequence[str], Sequence[str]] | None = None,
        teacher: keras.Model | None = None,
        class_weights: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """
        Args:
            config: architecture, sizes, precision, recipe and seed.
            classes: number of classes.
            weights: local file of weights for the backbone (see `transfer.load`).
            head_of: names of the classes, and of those that the file knows, if its head is to be kept, too.
            teacher: network of a bundle whose answers this network learns, too.
            class_weights: float32 (classes,), the weight of an image of each class in the loss; None: 1.
        """
        keras.utils.set_random_seed(config.seed)
        self._config = config
        self._strategy = tf.distribute.get_strategy()
        self.model = self._build(config, classes, _POLICIES[config.precision])
        if weights is not None:
            transfer.load(self.model, weights)
            if head_of is not None:
                transfer.load_head(self.model, weights, *head_of)
        self._averages = config.average > 0
        self.inference = self.model
        if config.precision != "float32" or self._averages:
            self.inference = self._build(config, classes, "float32")
            self.inference.set_weights(self.model.get_weights())
        self._network = _logits_of(self.model)
        losses = MultiLabelLosses if config.multi_label else Losses
        self._losses = losses(config, classes, None if teacher is None else _logits_of(teacher), class_weights)
        self._augmenter = Augmenter(augment.resolve(config.augment, config.augmentations), config.geometry)
        self._seeds = [v for v in self.model.variables if v.path.endswith("seed_generator_state")]
        self._seeds += self._augmenter.seeds
        self._classes = classes
        self._signature = [
            tf.TensorSpec((None, *config.geometry.decode_size.shape), tf.uint8),
            tf.TensorSpec((None, classes), tf.float32) if config.multi_label else tf.TensorSpec((None,), tf.int64),
            tf.TensorSpec((None,), tf.float32),
        ]
        # AutoGraph is not needed, and a killed worker would leave its files in the temporary folder.
        self._compiled_reduce = tf.function(self._reduce, autograph=False)
        inference = _logits_of(self.inference)
        self._compiled_evaluate = tf.function(
            functools.partial(self._evaluate, inference), self._signature, autograph=False
        )

    @staticmethod
    def _build(config: PlannedConfig, classes: int, policy: str) -> Any:
        return architectures.build(
            config.architecture,
            config.image_size,
            classes,
            head=config.head,
            dropout=config.dropout,
            synchronized=config.synchronized_batch_norm,
            multi_label=config.multi_label,
            dtype=policy,
        )

    def begin(self, phase: Phase, steps_per_epoch: int) -> None:
        """Begin a phase, with an optimizer of its own; to be called inside the strategy's scope.

        Args:
            phase: of `DecidedConfig.resolved_phases`.
            steps_per_epoch: steps of an epoch.
        """
        transfer.set_trainable(self.model, phase.trainable)
        self.optimizer = recipe.optimizer(self._config, phase, steps_per_epoch)
        self.optimizer.build(self.model.trainable_variables)
        # Keras's callbacks look for the optimizer at the model.
        self.model.compile(optimizer=self.optimizer)
        self._pruning = Pruning(self.model, self.inference) if phase.sparsity else None
        self._statistics = _moving_statistics(self.model)
        if self._averages:
            self._statistics += _moving_statistics(self.inference, like=self.model)
        self._waiting = 0
        if self._config.accumulate > 1:
            # Keras's own accumulation fails under the strategy (its `cond` holds a `merge_call`).
            self._accumulated = [
                tf.Variable(tf.zeros(v.shape), trainable=False) for v in self.model.trainable_variables
            ]
        number, seeds = tf.TensorSpec((), tf.float32), tf.TensorSpec((None, 2), tf.int64)
        signature = [*self._signature, seeds, number, number]
        self._compiled = {
            (updates, parts): tf.function(functools.partial(function, parts), signature, autograph=False)
            for updates, function in ((True, self._train), (False, self._accumulate))
            for parts in (False, True)
        }
        self._compiled_part = tf.function(self._part, signature[:-1], autograph=False)
        self._part_gradients: list[Any] = []

    # -- one step --------------------------------------------------------------------------------------

    def start(
        self,
        images: npt.NDArray[np.uint8],
        targets: Targets,
        bad: int = 0,
        position: tuple[int, int, int] = (0, 0, 0),
        parts: int = 1,
    ) -> Started:
        """Begin to train on one global batch, of which this worker has a share.

        Args:
            images: uint8 (n, height, width, 3), this worker's share without those that could not be read; n may
                differ between workers and steps, and may be 0. Not to be changed before the end of the step.
            targets: of the images.
            bad: number of images of this worker's share that could not be read.
            position: epoch, step and rank; with the run's seed they determine all that is random.
            parts: micro-batches that the share is cut into, whose gradients are summed. The same on all workers if
                batch norm is synchronized.
        """
        self._waiting = (self._waiting + 1) % self._config.accumulate
        count = np.float32(max(len(images), 1))
        pairs = list(zip(np.array_split(images, parts), np.array_split(targets, parts), strict=True))
        if parts > 1 and not self._part_gradients:
            self._begin_parts()
        for index, (part, labels) in enumerate(pairs[:-1]):
            self._run(self._compiled_part, part, labels, (*position, index + 1), count)
        last = self._compiled[not self._waiting, parts > 1]
        return Started(self._run(last, *pairs[-1], position, count, np.float32(bad)))

    def _run(
        self,
        step: Any,
        images: npt.NDArray[np.uint8],
        targets: Targets,
        position: tuple[int, ...],
        *numbers: np.float32,
    ) -> Any:
        weights = np.ones(len(images), np.float32)
        statistics = []
        if not len(images):
            # TensorFlow cannot convolve an empty batch, and batch norm has no mean of one: take one black image of
            # weight 0. It may change the statistics only where they are over the images of all workers.
            images, targets, weights = _padding(images, 1), _padding(targets, 1), np.zeros(1, np.float32)
            if not self._config.synchronized_batch_norm:
                statistics = [variable.numpy() for variable in self._statistics]
        entropy = np.random.SeedSequence([self._config.seed, *position])
        seeds = entropy.generate_state(2 * len(self._seeds)).reshape(-1, 2) >> 1  # Keras's are int32
        sums = step(images, targets, weights, seeds.astype(np.int64), *numbers)
        for variable, value in zip(self._statistics, statistics, strict=False):
            variable.assign(value)
        return sums

    def _begin_parts(self) -> None:
        """Make room for the sums of this worker over the micro-batches of a step."""
        local: dict[str, Any] = {
            "synchronization": tf.VariableSynchronization.ON_READ,
            "aggregation": tf.VariableAggregation.SUM,
        }
        shapes = [variable.shape for variable in self.model.trainable_variables]
        with self._strategy.scope():
            self._part_gradients = [tf.Variable(tf.zeros(shape), trainable=False, **local) for shape in shapes]
            self._part_sums = tf.Variable(tf.zeros(len(Sums().values) - 1), trainable=False, **local)

    def _part(self, *batch: Any) -> None:
        self._strategy.run(self._replica_part, args=batch)

    def _replica_part(self, images: Any, targets: Any, weights: Any, seeds: Any, count: Any) -> None:
        """Add up sums and gradients of a micro-batch. Without synchronized batch norm, no worker waits for others."""
        sums, gradients = self._gradients(images, targets, weights, seeds, count, 0.0)
        self._part_sums.assign_add(sums)
        for total, gradient in zip(self._part_gradients, gradients, strict=True):
            total.assign_add(gradient)

    def _train(self, is_last_part: bool, *batch: Any) -> Any:
        sums = self._strategy.run(functools.partial(self._replica_step, is_last_part), args=batch)
        with tf.control_dependencies([sums]):
            if self._config.accumulate > 1:
                for gradient in self._accumulated:
                    gradient.assign(tf.zeros_like(gradient))
            if self._pruning:
                self._pruning.apply()
            if self._averages:
                self._average()
        return sums

    def _accumulate(self, is_last_part: bool, *batch: Any) -> Any:
        sums, gradients = self._strategy.run(functools.partial(self._replica_gradients, is_last_part), args=batch)
        for accumulated, gradient in zip(self._accumulated, gradients, strict=True):
            accumulated.assign_add(gradient)
        return sums

    def _replica_step(self, is_last_part: bool, *batch: Any) -> Any:
        sums, gradients = self._replica_gradients(is_last_part, *batch)
        if self._config.accumulate > 1:
            pairs = zip(self._accumulated, gradients, strict=True)
            gradients = [(earlier + gradient) / self._config.accumulate for earlier, gradient in pairs]
        self.optimizer.apply_gradients(zip(gradients, self._network.trainable_variables, strict=True))
        return sums

    def _replica_gradients(
        self, is_last_part: bool, images: Any, targets: Any, weights: Any, seeds: Any, share: Any, bad: Any
    ) -> Any:
        """The step's sums and gradients, over all workers. Earlier parts of this worker's share are counted in."""
        replica = tf.distribute.get_replica_context()
        # Waits until the other workers begin the step; a sum of the losses would wait for their forward pass.
        mine = tf.reduce_sum(weights)
        if is_last_part:
            mine += tf.identity(self._part_sums)[0]
        count = tf.maximum(replica.all_reduce(tf.distribute.ReduceOp.SUM, mine), 1.0)
        # Weight penalties are the same on every worker, and the workers' gradients are summed.
        penalty = 1.0 / replica.num_replicas_in_sync
        if is_last_part:
            # The other parts are divided by the images of this worker, as they do not know those of all workers.
            sums, gradients = self._gradients(images, targets, weights, seeds, share, penalty * count / share)
            sums += tf.identity(self._part_sums)
            totals = zip(self._part_gradients, gradients, strict=True)
            gradients = [(earlier + gradient) * (share / count) for earlier, gradient in totals]
            for variable in (self._part_sums, *self._part_gradients):
                variable.assign(tf.zeros(variable.shape))
        else:
            sums, gradients = self._gradients(images, targets, weights, seeds, count, penalty)
        gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.concat([sums, [bad]], 0)), gradients

    def _gradients(
        self, images: Any, targets: Any, weights: Any, seeds: Any, divisor: Any, penalty: Any
    ) -> tuple[Any, list[Any]]:
        """This worker's sums over images, and the gradients of its loss: the images' losses by `divisor`, and the
        network's weight penalties times `penalty`."""
        for index, state in enumerate(self._seeds):
            state.assign(tf.cast(seeds[index], state.dtype))
        labels = targets if self._config.multi_label else tf.one_hot(targets, self._classes)
        images, labels = self._augmenter(images, labels)
        with tf.GradientTape() as tape:
            logits = tf.cast(self._network(images, training=True), tf.float32)
            losses = self._losses(images, labels, logits)
            loss = tf.reduce_sum(losses * weights) / divisor
            if self._network.losses:
                loss += tf.add_n(self._network.losses) * penalty
            loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, self._network.trainable_variables)
        return self._losses.sums(losses, logits, targets, weights), gradients

    def _average(self) -> None:
        """Update the moving average of the weights and statistics, which goes into the bundle."""
        # As TensorFlow's ExponentialMovingAverage with `num_updates`: soon away from the first weights.
        updates = tf.cast(self.optimizer.iterations, tf.float32)
        momentum = tf.minimum(self._config.average, (1 + updates) / (10 + updates))
        for average, variable in zip(self.inference.weights, self.model.weights, strict=True):
            average.assign(average + (1 - momentum) * (tf.cast(variable, tf.float32) - average))

    def _evaluate(self, inference: keras.Model, images: Any, targets: Any, weights: Any) -> Any:
        logits = tf.cast(inference(self._config.geometry.centre(images), training=False), tf.float32)
        return self._losses.validation_sums(logits, targets, weights), logits

    def evaluate(
        self, images: npt.NDArray[np.uint8], targets: Targets, padded: int
    ) -> tuple[Sums, npt.NDArray[np.float32]]:
        """Compute the sums over this worker's images only, with the weights that would go into the bundle.

        Args:
            images: uint8 (n, height, width, 3).
            targets: of the images.
            padded: number of images to pad to, at least n, so that every call has the same shape.

        Returns:
            The sums, and the logits, float32 (n, classes).
        """
        short = padded - len(images)
        weights = np.concatenate([np.ones(len(images), np.float32), np.zeros(short, np.float32)])
        targets = np.concatenate([targets, _padding(targets, short)])
        images = np.concatenate([images, _padding(images, short)])
        sums, logits = self._compiled_evaluate(images, targets, weights)
        return Sums(*sums.numpy().tolist()), logits.numpy()[: len(logits) - short]

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
        """Set the moving statistics of batch norm, which differ between the workers, to their mean.

        It changes no gradient, as the statistics are read at inference only. Moving averages are linear: averaging
        often gives the same as averaging once.
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

    def prune_at(self, step: int, steps_per_epoch: int, phase: Phase, before: float) -> None:
        """Choose again which weights are zero, if the phase prunes at this step.

        Args:
            step: the next step of the phase.
            steps_per_epoch: steps of an epoch.
            phase: the current one.
            before: share of zeros at the beginning of the phase.
        """
        steps = phase.passes * steps_per_epoch
        if self._pruning and prunes_at(step, steps):
            self._pruning.choose(sparsity_at(step, steps, before, phase.sparsity))

    def update_inference(self) -> None:
        """Copy the trained weights into the float32 network, unless that is their average."""
        if self.inference is not self.model and not self._averages:
            self.inference.set_weights(self.model.get_weights())

    # -- checkpoints -----------------------------------------------------------------------------------

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The state of a run besides `inference`: arrays by name."""
        arrays = {f"optimizer/{index}": variable.numpy() for index, variable in enumerate(self.optimizer.variables)}
        if self._averages:
            arrays |= {f"model/{index}": weight for index, weight in enumerate(self.model.get_weights())}
        if self._waiting:
            arrays |= {f"gradient/{index}": variable.numpy() for index, variable in enumerate(self._accumulated)}
            arrays["waiting"] = np.asarray(self._waiting)
        return arrays

    def load(self, model_file: str, state: dict[str, npt.NDArray[Any]], optimizer: bool) -> None:
        """Restore the weights of a `.keras` file and a `state`.

        Args:
            model_file: of `inference`.
            state: of this phase, or of the phase before.
            optimizer: whether to restore the optimizer's variables, too.
        """
        with warnings.catch_warnings():
            # The optimizer's variables are in `state`.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            self.inference.load_weights(model_file)
        if self._averages:
            self.model.set_weights([state[f"model/{index}"] for index in range(len(self.model.weights))])
        elif self.inference is not self.model:
            self.model.set_weights(self.inference.get_weights())
        if optimizer:
            for index, variable in enumerate(self.optimizer.variables):
                variable.assign(state[f"optimizer/{index}"])
            self._waiting = int(state.get("waiting", 0))
            for index, variable in enumerate(self._accumulated if self._waiting else ()):
                variable.assign(state[f"gradient/{index}"])
        if self._pruning:
            self._pruning.set_masks_from_weights()


def _logits_of(model: keras.Model) -> keras.Model:
    return keras.Model(model.inputs, model.get_layer("logits").output)


def _moving_statistics(model: keras.Model, like: keras.Model | None = None) -> list[Any]:
    """The moving statistics of the batch norms of `model` that are trained in `like`, which has the same layers."""
    return [
        variable
        for layer, other in zip(model._flatten_layers(), (like or model)._flatten_layers(), strict=True)
        if isinstance(layer, keras.layers.BatchNormalization) and other.trainable
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def _padding(like: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    return np.zeros((count, *like.shape[1:]), like.dtype)
