"""The training loop of a Ray Train worker, from the last checkpoint to the end."""

import contextlib
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt
import ray.train
import tensorflow as tf

from cnnray.errors import CnnrayError
from cnnray.images import storage
from cnnray.images.lease import LeaseLostError, check_holder
from cnnray.images.reading import Batch
from cnnray.models import drift
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.own_network import NetworkError
from cnnray.models.transfer import WeightsError
from cnnray.tracking.prometheus import TrainingMetrics
from cnnray.training import callbacks, checkpoint, epoch, memory, recipe, selection
from cnnray.training.checkpoint import BadImages
from cnnray.training.decided import PlannedConfig
from cnnray.training.epoch import Sums
from cnnray.training.feed import Feed
from cnnray.training.output import HISTORY, TENSORBOARD, TrainingError
from cnnray.training.plan import Assignment
from cnnray.training.selection import ClassCounts, LabelCounts
from cnnray.training.step import Started, Steps, Targets

log = logging.getLogger(__name__)


def run(assignment: Assignment) -> CnnrayError | None:
    """Train, as one worker of the group that Ray Train made.

    Returns:
        Why the run had to stop; None if it did not. (It is not raised, because Ray Train would take it for a lost
        worker and try again.)
    """
    _set_up(assignment)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = None
    try:
        _check_devices(assignment.config, strategy)
        with strategy.scope():
            worker = _Worker(assignment, strategy)
        # Outside the scope: inside it, saving a model makes variables that wait for the other workers.
        with storage.guarded(assignment.config.output, worker.check_lease):
            worker.run()
    except (TrainingError, WeightsError, BundleError, NetworkError, LeaseLostError) as error:
        return error
    except tf.errors.OpError as error:
        if worker is None or not memory.is_out_of_memory(error):
            raise
        # Others may wait for this worker in the middle of a step, so that it must not simply end.
        raise memory.halve(assignment.config, worker.at_once) from None
    return None


def _check_devices(config: PlannedConfig, strategy: tf.distribute.Strategy) -> None:
    """Check that TensorFlow computes on what Ray gave this worker.

    Raises:
        TrainingError: it does not.
    """
    gpus, workers = len(tf.config.list_logical_devices("GPU")), ray.train.get_context().get_world_size()
    if gpus != config.gpus:
        raise TrainingError(
            f"TensorFlow finds {gpus} GPU(s) on a worker that was to have {config.gpus:g}: NVIDIA's driver and the "
            "packages of requirements-gpu.lock are needed, or use --gpus-per-worker 0."
        )
    if strategy.num_replicas_in_sync != workers:
        raise TrainingError(
            f"TensorFlow trains on {strategy.num_replicas_in_sync} device(s), and the run has {workers} worker(s) of "
            "one device each."
        )


def _set_up(assignment: Assignment) -> None:
    """Configure this process, which runs nothing but this worker."""
    # Ray Train has given the root logger its handlers, and the level INFO.
    for name, level in (("", logging.WARNING), ("cnnray", logging.INFO)):
        logging.getLogger(name).setLevel(level)
    tf.config.threading.set_intra_op_parallelism_threads(assignment.threads)
    tf.config.threading.set_inter_op_parallelism_threads(2)


class _Worker:
    def __init__(self, assignment: Assignment, strategy: tf.distribute.Strategy) -> None:
        self.assignment = assignment
        self.strategy = strategy
        self.config = assignment.config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.at_once = memory.images_at_once(self.config, self.world)
        self.feed = Feed(assignment, self.rank, self.world, self.at_once)
        self.bad_images: BadImages = {}
        self.compiled = False
        self.overlaps = self.config.gpus > 0
        """Whether the images of a step are brought to the device while it computes the one before."""
        self.metrics = TrainingMetrics(self.config.output) if self.rank == 0 else None
        self.phases = self.config.resolved_phases
        names, counts = assignment.info.class_names, assignment.info.class_counts
        self.classes = len(names)
        self.counts = [counts.get(name, 0) for name in names]
        self.thresholds: list[float] | None = None
        self.has_learned = False
        self.answers = drift.Distribution.empty(self.classes)  # to the validation images, at the last epoch's end
        teacher = None if self.config.teacher is None else Bundle.load(self.config.teacher).model
        source = assignment.weights
        with storage.local_copy(source) if source else contextlib.nullcontext() as weights:
            self.steps = Steps(
                self.config,
                len(names),
                weights=weights,
                head_of=recipe.head_of(self.config, names),
                teacher=teacher,
                class_weights=recipe.class_weights(self.config, self.counts, self.feed.images),
            )

    def check_lease(self) -> None:
        """
        Raises:
            LeaseLostError: the run has lost its lease on the output.
        """
        check_holder(self.config.output, self.assignment.lease_holder)

    # -- the run ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: on all workers alike.
        """
        # Workers that Ray kills leave their folders behind.
        temporary = tempfile.TemporaryDirectory(prefix="cnnray-tensorboard-") if self.rank == 0 else None
        with temporary or contextlib.nullcontext("") as events:
            shown: list[keras.callbacks.Callback] = []
            self.lines = callbacks.ProgressLogger(self.config.all_epochs, self.feed.steps, self.feed.images)
            if self.rank == 0:
                shown = [keras.callbacks.TensorBoard(events, write_graph=False), self.lines]
            try:
                self._run(keras.callbacks.CallbackList(shown, model=self.steps.model), events)
            finally:
                self.feed.close()

    def _run(self, shown: keras.callbacks.CallbackList, events: str) -> None:
        self._restore()
        shown.on_train_begin()
        while not self._is_over():
            progress = self.progress
            number = progress.epoch
            shown.on_epoch_begin(number)
            self._train_epoch(shown)
            logs = self._end_epoch()
            self.deciding.on_epoch_end(number, logs)
            shown.on_epoch_end(number, logs)
            progress.stopped = bool(self.steps.model.stop_training)
            if self.metrics:
                self.metrics.epoch(progress.epoch, logs)
            if self.rank == 0:
                callbacks.write_history(progress.history, storage.join(self.config.output, HISTORY))
                storage.copy_folder(events, storage.join(self.config.output, TENSORBOARD))
            score = self._score(logs)
            over = progress.stopped or progress.phase_epoch >= self.phases[progress.phase].passes
            if over and progress.phase + 1 < len(self.phases):
                # The next phase begins with the weights that this phase ends with.
                progress.phase, progress.phase_epoch, progress.stopped = progress.phase + 1, 0, False
            self._checkpoint(logs, score)
            if progress.begins_phase:
                self._begin_phase()
        shown.on_train_end()
        if self.rank == 0:
            storage.copy_folder(events, storage.join(self.config.output, TENSORBOARD))

    def _is_over(self) -> bool:
        progress = self.progress
        return progress.stopped or progress.phase_epoch >= self.phases[progress.phase].passes

    def _begin_phase(self) -> None:
        phase = self.phases[self.progress.phase]
        with self.strategy.scope():
            self.steps.begin(phase, self.feed.steps)
        self.steps.model.stop_training = False
        self.compiled = False
        self.deciding = keras.callbacks.CallbackList(
            callbacks.deciding_callbacks(self.config), model=self.steps.model
        )
        self.deciding.on_train_begin()
        if len(self.phases) > 1:
            self.lines.phase = phase.name
            if self.rank == 0:
                log.info(
                    "phase %d/%d: %s; %d weights are trained", self.progress.phase + 1, len(self.phases), phase.name,
                    sum(math.prod(variable.shape) for variable in self.steps.model.trainable_variables),
                )  # fmt: skip

    def _score(self, logs: dict[str, float]) -> float:
        """The quantity that selects the best epoch (lower is better).

        Epochs count from the one on that has all the zeros that the last phase asks for.
        """
        phase, before = self.phases[self.progress.phase], self._zeros_before()
        reached = phase.sparsity == before or self.progress.phase_epoch > phase.passes / 2
        counts = reached and phase.sparsity == self.phases[-1].sparsity
        return selection.epoch_score(self.config.select, logs) if counts else sys.float_info.max

    def _zeros_before(self) -> float:
        """The share of zeros at the beginning of the phase."""
        return self.phases[self.progress.phase - 1].sparsity if self.progress.phase else 0.0

    def _restore(self) -> None:
        if self.rank == 0 and self.config.is_elastic:
            log.info("training on %d worker(s)", self.world)
        saved = ray.train.get_checkpoint()
        self.progress = checkpoint.TrainingState(order=self.feed.order, lanes=self.feed.lanes)
        if saved is None:
            self._begin_phase()
            return
        with saved.as_directory() as folder:
            self.progress = checkpoint.read_progress(Path(folder))
            self.feed.keep_order(self.progress.order, self.progress.lanes)
            self._begin_phase()
            checkpoint.restore(Path(folder), self.steps, self.progress)
            if self.rank == 0:
                files = sorted(Path(folder).glob("bad_images-*.jsonl"))
                self.bad_images = checkpoint.read_bad_images(file.read_bytes() for file in files)
        if self.progress.callbacks and not self.progress.begins_phase:
            callbacks.restore(self.deciding.callbacks, self.progress.callbacks)
        if self.rank == 0:
            log.info("going on from epoch %d, step %d", self.progress.epoch + 1, self.progress.step)
        else:
            self.progress.seen = [0, 0, 0]

    def _train_epoch(self, shown: keras.callbacks.CallbackList) -> None:
        progress, every = self.progress, self.config.checkpoint_every_steps
        batches = self.feed.training(progress.epoch, progress.step)
        phase = self.phases[progress.phase]
        before = self._zeros_before()
        per_epoch = self.feed.steps
        self.clock = time.monotonic()
        running: tuple[Started, Batch] | None = None
        for step, batch in enumerate(batches, progress.step):
            images, targets, bad = self._good(batch)
            self.steps.prune_at(progress.phase_epoch * per_epoch + step, per_epoch, phase, before)
            position = (progress.epoch, step, self.rank)
            parts = math.ceil(self.feed.share(step) / self.at_once)
            started = self.steps.start(images, targets, bad, position, parts)
            if running:
                self._end_step(*running, shown)
            running = started, batch
            is_checkpoint = every and (step + 1) % every == 0 and step + 1 < per_epoch
            if is_checkpoint or not (self.overlaps and self.compiled):
                self._end_step(*running, shown)
                running = None
            self.feed.ask_other_nodes()
            if is_checkpoint:
                self._checkpoint(None, sys.float_info.max)
                self.clock = time.monotonic()
        if running:
            self._end_step(*running, shown)

    def _end_step(self, started: Started, batch: Batch, shown: keras.callbacks.CallbackList) -> None:
        progress = self.progress
        shown.on_train_batch_begin(progress.step)
        sums = started.result()
        now = time.monotonic()
        took, self.clock = now - self.clock, now
        progress.sums += sums
        if self.metrics:
            self.metrics.step(sums.count, sums.bad, self._means(progress.sums))
        progress.seen = (np.asarray(progress.seen) + epoch.tally(batch["id"])).tolist()
        progress.step += 1
        progress.epoch_seconds += took
        if self.compiled:
            progress.images += sums.count
            progress.seconds += took
        elif not progress.seconds_to_first_step:
            progress.seconds_to_first_step = time.time() - self.assignment.started
        self.compiled = True
        rate = progress.images / max(progress.seconds, 1e-9)
        logs = self._means(progress.sums) | {"images_per_second": rate}
        shown.on_train_batch_end(progress.step - 1, logs)
        self._check_bad(progress.sums.bad)

    def _end_epoch(self) -> dict[str, float]:
        progress = self.progress
        seen = self.steps.reduce(np.asarray(progress.seen, np.int64))
        expected = self.feed.tally(progress.epoch)
        if not np.array_equal(seen, expected):
            raise RuntimeError(
                f"Epoch {progress.epoch + 1} did not see every image of the manifest once: tally {seen.tolist()}, "
                f"expected {expected.tolist()}."
            )
        self.steps.average_statistics()
        self.steps.update_inference()
        trained = progress.sums
        is_last = progress.phase + 1 == len(self.phases) and progress.phase_epoch + 1 >= self.phases[-1].passes
        validation, others = self._validate(self.feed.validation(None if is_last else progress.epoch + 1))
        self._check_bad(trained.bad + validation.bad)
        for what, sums in (("", trained), ("validation ", validation)):
            if not math.isfinite(sums.loss):
                raise TrainingError(
                    f"The {what}loss became {sums.loss} in epoch {progress.epoch + 1}: {self._cure()}"
                )
        logs = self._means(trained) | self._means(validation, "val_") | others
        logs |= {
            "learning_rate": float(keras.ops.convert_to_numpy(self.steps.optimizer.learning_rate)),
            "images": trained.count,
            "bad_images": trained.bad,
            "images_per_second": trained.count / max(progress.epoch_seconds, 1e-9),
            "seconds": progress.epoch_seconds,
        }
        named = {"phase": self.phases[progress.phase].name} if len(self.phases) > 1 else {}
        self._check_learning(logs["loss"])
        progress.history.append({"epoch": progress.epoch + 1, **named, **logs, "workers": self.world})
        progress.epoch += 1
        progress.phase_epoch += 1
        progress.step = 0
        progress.sums, progress.seen, progress.epoch_seconds = Sums(), [0, 0, 0], 0.0
        return logs

    def _means(self, sums: Sums, prefix: str = "") -> dict[str, float]:
        return sums.metrics(self.classes, prefix, multi_label=self.config.multi_label)

    def _check_learning(self, loss: float) -> None:
        """Warn where the loss is still that of guessing after the warm-up of the first phase."""
        progress, per_epoch = self.progress, self.feed.steps
        if progress.phase or self.has_learned or self.rank:
            return
        self.has_learned = recipe.has_learned(self.config, loss, self.counts, self.feed.images)
        warmup = recipe.lengths(self.config, self.phases[0], per_epoch)[0] if self.config.schedule == "cosine" else 0
        first = math.ceil(warmup / per_epoch)  # the first epoch without warm-up
        if not self.has_learned and progress.phase_epoch == first and first + 1 < self.phases[0].passes:
            guessing = recipe.guessing_loss(self.config, self.counts, self.feed.images)
            log.warning(
                "After the warm-up, the training loss is still that of guessing (%.4f; guessing: %.4f): the network "
                "has learned nothing yet. %s",
                loss, guessing, recipe.advice(self.config),
            )  # fmt: skip

    def _cure(self) -> str:
        """What to do about a loss that is not finite. The output refuses to go on with another recipe."""
        phase = self.phases[self.progress.phase]
        flag = "--learning-rate" if self.config.phases is None else f"learning_rate of {phase.name!r} in --phases"
        precision = "" if self.config.precision == "float32" else ", or --precision float32"
        return (
            f"begin anew, with --overwrite or another --output, with a lower {flag} (it was {phase.learning_rate:g})"
            f"{precision}."
        )

    def _validate(self, batches: Iterator[Batch]) -> tuple[Sums, dict[str, float]]:
        """The sums over the validation images of all workers, and the metrics that are made of more than sums."""
        sums, config = Sums(), self.config
        classes = (
            LabelCounts(config.select, self.classes, config.label_precision)
            if config.multi_label
            else ClassCounts(config.select, self.classes)
        )
        answers = drift.Distribution.empty(self.classes)
        for batch in batches:
            images, targets, bad = self._good(batch)
            batch_sums, logits = self.steps.evaluate(images, targets, self.feed.validation_batch)
            sums += batch_sums + Sums(bad=bad)
            classes.add(logits, targets)
            if not config.multi_label:
                answers += drift.Distribution.of_logits(logits)
        # Together, as each reduction waits for all workers.
        mine = np.concatenate([sums.values, answers.classes, answers.confidences], dtype=np.float64)
        totals, *counts = np.split(self.steps.reduce(mine), np.cumsum([len(sums.values), self.classes]))
        self.answers = drift.Distribution(*(values.astype(np.int64) for values in counts))
        of_all = self.steps.reduce(classes.counts) if classes.counts.size else classes.counts
        self.thresholds = classes.thresholds(of_all)
        return Sums(*totals.tolist()), classes.metrics(of_all)

    # -- bad images and checkpoints --------------------------------------------------------------------

    def _good(self, batch: Batch) -> tuple[npt.NDArray[np.uint8], Targets, int]:
        """The images of a batch that could be read, and their targets; and the number of the others, which go to the
        list of bad images."""
        bad = np.flatnonzero(batch["error"] != "")
        for index in bad:
            row = {"id": int(batch["id"][index]), "uri": batch["uri"][index], "error": batch["error"][index]}
            self.bad_images[row["id"]] = row
        images, targets = batch["image"], batch["target"]
        if len(bad):
            images, targets = np.delete(images, bad, 0), np.delete(targets, bad)
        sets = self.feed.label_sets
        return images, targets if sets is None else sets.multi_hot(targets), len(bad)

    def _check_bad(self, bad: float) -> None:
        images = self.feed.images + self.feed.validation_images
        if bad <= self.config.max_bad_fraction * images:
            return
        example = next(iter(self.bad_images.values()), None)
        shown = f", such as {example['uri']} ({example['error']})" if example else ""
        raise TrainingError(
            f"{bad:.0f} of {images} images could not be read{shown}: more than "
            f"--max-bad-fraction {self.config.max_bad_fraction} allows."
        )

    def _checkpoint(self, logs: dict[str, float] | None, score: float) -> None:
        """Report a checkpoint; at the end of an epoch with its logs, inside an epoch without.

        Ray keeps the checkpoint of the lowest score; checkpoints inside an epoch have the largest float. (Ray's
        snapshot would turn nan and infinity into null, and fail when it is read again.)
        """
        progress = self.progress
        if logs is None:
            self.steps.average_statistics()
            self.steps.update_inference()
        seen = self.steps.reduce(np.asarray(progress.seen, np.int64)).tolist()
        progress.callbacks = callbacks.get_state(self.deciding.callbacks)
        metrics = {name: value for name, value in (logs or {}).items() if name.startswith("val_")}
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder)
            if self.rank == 0:
                info = replace(self.assignment.info, metrics=metrics)
                if logs and self.config.multi_label:
                    info = replace(info, thresholds=self.thresholds)
                elif logs:
                    info = replace(info, reference=self.answers.as_dict())
                checkpoint.write(written, self.steps, info, replace(progress, seen=seen))
            if self.bad_images:
                checkpoint.write_bad_images(written, self.rank, self.bad_images)
            saved = ray.train.Checkpoint.from_directory(folder) if any(written.iterdir()) else None
            report = {"epoch": progress.epoch, "step": progress.step, "score": score}
            self.check_lease()  # Ray Train writes the checkpoint
            ray.train.report(report | metrics, checkpoint=saved)
