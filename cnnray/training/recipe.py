"""From flags to Keras objects: learning rate schedule, optimizer and class weights of a phase."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.special

from cnnray import flags
from cnnray.errors import BadInputError
from cnnray.images import manifest as manifests
from cnnray.models import architectures, bundle
from cnnray.training import epoch
from cnnray.training.decided import DecidedConfig
from cnnray.training.phases import Phase
from cnnray.training.recipe_config import SELECTIONS

if TYPE_CHECKING:
    import keras

_GUESSING = 0.99
"""Share of the loss of guessing below which a network has learned something."""
MOST_BALANCED = 2**24
"""Training images of `--sampling balanced`, whose order takes 16 bytes for each in every worker."""
_MOST_WEIGHT = 100.0
"""Of an image that has a label, where few have it, and the inverse of the least, where nearly all have it: the
gradients of a few images would drown all others."""
_NO_DECAY = ("bias", "gamma", "beta")
"""Names of variables without weight decay, which is meant for kernels."""


class RecipeError(BadInputError, ValueError):
    """A recipe that does not fit the data; the message is one sentence for the user."""


def check(config: DecidedConfig, manifest: pa.Table) -> None:
    """Check, before anything starts, that the flags fit the images.

    Raises:
        RecipeError, BundleError, OSError: with a sentence.
    """
    _check_labels(config)
    images = manifests.count_split(manifest, "train")
    per_epoch = epoch.steps(images, config.batch_size)
    for phase in config.resolved_phases:
        if config.schedule == "cosine":
            lengths(config, phase, per_epoch)
        if config.accumulate > per_epoch * phase.passes:
            raise RecipeError(f"--accumulate {config.accumulate} is more than all {per_epoch * phase.passes} steps.")
    if config.sampling == "balanced" and images > MOST_BALANCED:
        raise RecipeError(f"--sampling balanced is for at most {MOST_BALANCED:,} training images, not {images:,}.")
    if config.keep_head:
        names = manifests.class_names(manifest)
        if not set(names).intersection(bundle.read_info(config.weights).class_names):
            raise RecipeError(f"--keep-head: {config.weights} knows none of the classes of the images.")
    if config.teacher is not None:
        teacher = bundle.read_info(config.teacher)
        if teacher.is_multi_label != config.multi_label:
            kind = "several labels for an image" if teacher.is_multi_label else "one label for each image"
            raise RecipeError(f"--teacher {config.teacher} has {kind}, and these images have not.")
        if teacher.class_names != manifests.class_names(manifest):
            raise RecipeError(f"--teacher {config.teacher} knows other classes than the images have.")
        taken, given = teacher.geometry.image_size, config.geometry.image_size
        if taken != given:
            raise RecipeError(f"--teacher {config.teacher} takes images of {taken} pixels, not of {given}.")


def _check_labels(config: DecidedConfig) -> None:
    """
    Raises:
        RecipeError: a flag is for images with several labels, or for those of one.
    """
    if config.select not in SELECTIONS[config.multi_label]:
        kind = "several labels" if config.multi_label else "one label each"
        allowed = ", ".join(SELECTIONS[config.multi_label])
        raise RecipeError(f"--select {config.select} is not for images with {kind}; expected one of {allowed}.")
    if config.multi_label and config.sampling == "balanced":
        raise RecipeError("--sampling balanced is for images of one label each: use --class-weights balanced.")
    for name, default in (("loss", "cross_entropy"), ("label_precision", None)):
        if not config.multi_label and getattr(config, name) != default:
            raise RecipeError(f"{flags.flag_name(name)} {getattr(config, name)} is for images with several labels.")


def lengths(config: DecidedConfig, phase: Phase, steps_per_epoch: int) -> tuple[int, int]:
    """The steps of a phase's warm-up, and of the cosine decay that follows it.

    Defaults: a tenth of the phase, at most five epochs, for the warm-up, and all the rest for the decay.

    Raises:
        RecipeError: they are longer than the phase.
    """
    total = phase.passes * steps_per_epoch

    def in_steps(steps: int | None, epochs: float | None) -> int | None:
        return round(epochs * steps_per_epoch) if epochs is not None else steps

    warmup = in_steps(config.warmup_steps, config.warmup_epochs)
    decay = in_steps(config.decay_steps, config.decay_epochs)
    if warmup is None:
        warmup = min(total // 10, 5 * steps_per_epoch, total - (decay or 1))
    if decay is None:
        decay = total - warmup
    if warmup < 0 or decay < 1 or warmup + decay > total:
        raise RecipeError(
            f"--schedule cosine: a warm-up of {max(warmup, 0)} and a decay of {max(decay, 0)} steps do not fit "
            f"into the {total} steps of {phase.passes} epochs."
        )
    return warmup, decay


def learning_rate(config: DecidedConfig, phase: Phase, steps_per_epoch: int) -> Any:
    """A phase's learning rate: a number, which callbacks may change, or a Keras schedule over its steps."""
    import keras

    assert phase.learning_rate is not None
    if config.schedule != "cosine":
        return phase.learning_rate
    # Schedules count updates.
    warmup, decay = (length // config.accumulate for length in lengths(config, phase, steps_per_epoch))
    decay = max(1, decay)
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(phase.learning_rate, decay)
    return keras.optimizers.schedules.CosineDecay(0.0, decay, warmup_target=phase.learning_rate, warmup_steps=warmup)


def optimizer(config: DecidedConfig, phase: Phase, steps_per_epoch: int) -> "keras.optimizers.Optimizer":
    """The optimizer of a phase, for gradients that are summed over the workers already."""
    import keras

    options: dict[str, Any] = {
        "learning_rate": learning_rate(config, phase, steps_per_epoch),
        "global_clipnorm": config.clip_norm,
    }
    optimizer: Any
    if config.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(momentum=0.9, weight_decay=config.weight_decay or None, **options)
    elif config.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(weight_decay=config.weight_decay, **options)
    else:
        optimizer = keras.optimizers.Adam(**options)
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=list(_NO_DECAY))
    # Keras would sum the workers' gradients after clipping and checking them for overflow. `Steps` sums them before
    # that, as it should be.
    optimizer._all_reduce_sum_gradients = list
    if config.precision == "float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def head_of(config: DecidedConfig, names: list[str]) -> tuple[list[str], list[str]] | None:
    """The classes, and those that the bundle of `weights` knows, if its head is kept; else None (see `Steps`).

    Raises:
        BundleError, OSError: the bundle cannot be read.
    """
    return (names, bundle.read_info(config.weights).class_names) if config.keep_head else None


def guessing_loss(config: DecidedConfig, counts: list[int], images: int | None = None) -> float:
    """The lowest training loss in nats of a network that gives each image the same answer.

    It is the entropy of the classes' shares of the loss, after label smoothing; with several labels, the mean over
    the labels of the entropy of having one. A teacher's part of the loss is left out.

    Args:
        config: sampling, class weights and label smoothing.
        counts: training images of each class.
        images: all training images, where they may have several labels.
    """
    if config.multi_label:
        assert images is not None
        has = np.asarray(counts, np.float64) / images
        weights = class_weights(config, counts, images)
        smoothed = [(1 - config.label_smoothing) * label + config.label_smoothing / 2 for label in (1, 0)]
        positive = weights * has * smoothed[0] + (1 - has) * smoothed[1]
        negative = weights * has * (1 - smoothed[0]) + (1 - has) * (1 - smoothed[1])
        shares = np.stack([positive, negative]) / (positive + negative)
        return float(((positive + negative) * scipy.special.entr(shares).sum(0)).mean())
    if config.sampling == "balanced":
        counts = [min(count, 1) for count in counts]
    shares = np.asarray(counts, np.float64) * class_weights(config, counts, images)
    weight = shares.sum() / sum(counts)
    shares = shares / shares.sum() * (1 - config.label_smoothing) + config.label_smoothing / len(counts)
    shares = shares[shares > 0]
    return float(-weight * (shares * np.log(shares)).sum())


def has_learned(config: DecidedConfig, loss: float, counts: list[int], images: int | None = None) -> bool:
    """Whether a training loss is below that of guessing (see `guessing_loss`). True where that is not known: with a
    teacher, or another loss than cross-entropy."""
    if config.teacher is not None or config.loss != "cross_entropy":
        return True
    return loss < _GUESSING * guessing_loss(config, counts, images)


def advice(config: DecidedConfig) -> str:
    """What to change where a network does not learn: a sentence."""
    is_plain = config.architecture in architectures.PLAIN
    network = f"--architecture resnet9_small (it was {config.architecture}), " if is_plain else ""
    return (
        f"Try {network}more --epochs (it was {config.epochs}), or another --learning-rate (it was "
        f"{config.learning_rate:g}; --find-learning-rate shows what is possible). --sanity tells in seconds whether "
        "the network can learn these images at all."
    )


def class_weights(config: DecidedConfig, counts: list[int], images: int | None = None) -> npt.NDArray[np.float32]:
    """The weight of an image of each class in the loss: float32 (classes,).

    Args:
        config: `none` gives ones; `balanced` images / (classes * images of the class), so that all classes weigh the
            same and the mean over the images is 1. With several labels, images without the label / images with it,
            from 0.01 to 100.
        counts: training images of each class; of balanced ones each at least 1.
        images: all training images, where they may have several labels.
    """
    if config.class_weights == "none":
        return np.ones(len(counts), np.float32)
    if config.multi_label:
        assert images is not None
        has = np.asarray(counts, np.float64)
        return np.clip((images - has) / has, 1 / _MOST_WEIGHT, _MOST_WEIGHT).astype(np.float32)
    from sklearn.utils.class_weight import compute_class_weight

    classes = np.arange(len(counts))
    return np.asarray(compute_class_weight("balanced", classes=classes, y=np.repeat(classes, counts)), np.float32)
