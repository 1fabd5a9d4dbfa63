"""Short trainings in this process, before a run: can the recipe learn (`--sanity`), and at which learning rates
(`--find-learning-rate`)?"""

import contextlib
import io
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cnnray.images import labels, reading, storage
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError
from cnnray.models import startup, transfer
from cnnray.models.augment import Augmentations
from cnnray.training import data, decisions, epoch, plan, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DecidedConfig, PlannedConfig
from cnnray.training.epoch import Epoch
from cnnray.training.output import IMAGENET, TrainingError
from cnnray.training.phases import Phase

if TYPE_CHECKING:
    from cnnray.training.step import Steps

log = logging.getLogger(__name__)

PLOT = "learning_rate.png"

_SANITY_IMAGES, _SANITY_STEPS = 64, 200
_LEARNT = 0.1
"""Share of the loss of guessing below which the images of the check count as learnt."""

_LOWEST_RATE, _HIGHEST_RATE, _RATES = 1e-5, 1.0, 120
_MOMENTUM = 0.9
"""Of the moving average of the losses."""
_DIVERGED = 1.5
"""The range test ends where the average loss is this many times its lowest value, or that of guessing."""
_LEAST_FALL = 0.02
"""Share of the loss of guessing by which the average has to fall before a learning rate is suggested."""
_MOST_IMAGES = 4096


@dataclass(frozen=True)
class _Sample:
    images: npt.NDArray[np.uint8]
    """uint8 (N, height, width, 3)."""
    targets: npt.NDArray[Any]
    """See `step.Targets`."""
    counts: list[int]
    """All training images of each class."""
    all_images: int
    """The number of all training images."""
    names: list[str]
    """Of the classes."""


def check_sanity(config: TrainConfig) -> dict[str, Any]:
    """Train on the first images alone, without augmentation, until the network knows them by heart.

    A network, a recipe and labels from which something can be learnt pass within seconds.

    Returns:
        `images`, `steps`, `loss` and `accuracy` on them, `guessing_loss`, and `seconds`.

    Raises:
        TrainingError: the network did not learn the images; with what to look at.
        ManifestError, OSError: with a sentence for the user.
    """
    started = time.monotonic()
    decided, sample = _prepare(config, _SANITY_IMAGES)
    if len(np.unique(sample.targets, axis=0)) < 2:
        what = "labels" if decided.multi_label else "label"
        raise ManifestError(f"All of the first {len(sample.targets)} training images have the same {what}.")
    # What makes memorising hard on purpose is left out.
    plain = replace(
        decided, augment="none", augmentations=Augmentations(), dropout=0.0, label_smoothing=0.0, average=0.0,
        weight_decay=0.0, accumulate=1, class_weights="none", teacher=None, schedule="constant", loss="cross_entropy",
        loss_gamma=None,
        warmup_epochs=None, warmup_steps=None, decay_epochs=None, decay_steps=None,
    )  # fmt: skip
    if decided.multi_label:
        counts = sample.targets.sum(0).astype(np.int64).tolist()
    else:
        counts = np.bincount(sample.targets.astype(np.int64), minlength=len(sample.counts)).tolist()
    guessing = recipe.guessing_loss(plain, counts, len(sample.targets))
    steps = _begin(plain, sample)
    for step in range(1, _SANITY_STEPS + 1):
        _set_learning_rate(steps, decided.learning_rate * min(1.0, step / 10))
        sums = steps.start(sample.images, sample.targets, position=(0, step, 0)).result()
        loss, accuracy = sums.loss / sums.count, sums.correct / sums.count
        learnt = accuracy == 1 and loss < _LEARNT * guessing
        if learnt or not math.isfinite(loss):
            break
    summary = f"{step} steps on the same {len(sample.targets)} images: loss {loss:.3g} (guessing: {guessing:.3g})"
    if not learnt:
        raise TrainingError(f"{summary}, accuracy {accuracy:.3g}: {_cause(sample, loss, decided)}")
    log.info("%s, accuracy %.3g: the network can learn", summary, accuracy)
    return {
        "images": len(sample.targets),
        "steps": step,
        "loss": round(loss, 6),
        "guessing_loss": round(guessing, 6),
        "seconds": round(time.monotonic() - started, 2),
    }


def _cause(sample: _Sample, loss: float, config: DecidedConfig) -> str:
    """What to look at where a network did not learn a few images by heart."""
    seen: dict[bytes, set[bytes]] = {}
    for image, target in zip(sample.images, sample.targets, strict=True):
        seen.setdefault(image.tobytes(), set()).add(target.tobytes())
    if any(len(targets) > 1 for targets in seen.values()):
        return "the same image has other labels elsewhere (jobs/evaluate.py --check-data lists such images)."
    if sample.images.std(axis=0).max() < 1:
        return "the images are all alike: look at them with --preview-augmentations 8."
    rate = f"--learning-rate (it was {config.learning_rate:g}; --find-learning-rate shows what is possible)"
    if not math.isfinite(loss):
        return f"lower {rate}."
    return f"try another {rate}, or another --architecture (it was {config.architecture})."


def find_learning_rate(config: TrainConfig) -> dict[str, Any]:
    """Train a few steps with a learning rate that rises from one to the next, until the loss grows.

    The range test of Smith, Cyclical Learning Rates for Training Neural Networks, 2017. The suggested rate is the one
    at which the average loss fell fastest. Writes a plot, and trains nothing that is kept.

    Returns:
        `learning_rate` (suggested; None where no rate lowered the loss), `highest_learning_rate` (where the loss
        began to grow; None where it did not), `plot` (its uri), `steps`, and `seconds`.

    Raises:
        ManifestError, OSError: with a sentence for the user.
    """
    started = time.monotonic()
    decided, sample = _prepare(config, _MOST_IMAGES)
    steps = _begin(replace(decided, schedule="constant", accumulate=1), sample)
    guessing = recipe.guessing_loss(decided, sample.counts, sample.all_images)
    rates = np.geomspace(_LOWEST_RATE, _HIGHEST_RATE, _RATES)
    per_epoch = epoch.steps(len(sample.targets), decided.batch_size)
    losses: list[float] = []
    averages: list[float] = []
    average = 0.0
    for step, rate in enumerate(rates):
        passed, place = divmod(step, per_epoch)
        rows = Epoch(decided.seed, passed, len(sample.targets), decided.batch_size).rows(place)
        _set_learning_rate(steps, float(rate))
        sums = steps.start(sample.images[rows], sample.targets[rows], position=(passed, place, 0)).result()
        loss = sums.loss / sums.count
        if not math.isfinite(loss):
            break
        losses.append(loss)
        average = _MOMENTUM * average + (1 - _MOMENTUM) * loss
        averages.append(average / (1 - _MOMENTUM ** (step + 1)))
        if averages[-1] > _DIVERGED * max(min(averages), guessing):
            break
    suggested, highest = _suggest(rates[: len(averages)], np.asarray(averages), guessing)
    uri = storage.join(config.output, PLOT)
    storage.write_bytes(uri, _plot(rates[: len(losses)], losses, averages, guessing, suggested))
    if suggested is None:
        log.warning(
            "No learning rate lowered the loss from that of guessing (%.3g) within %d steps, so none is suggested.",
            guessing, len(losses),
        )  # fmt: skip
    else:
        log.info("--learning-rate %.2g: there the loss fell fastest (see %s)", suggested, uri)
    return {
        "learning_rate": suggested,
        "highest_learning_rate": highest,
        "plot": uri,
        "steps": len(losses),
        "seconds": round(time.monotonic() - started, 2),
    }


def _suggest(
    rates: npt.NDArray[np.float64], averages: npt.NDArray[np.float64], guessing: float
) -> tuple[float | None, float | None]:
    """The rate at which the average loss falls fastest below that of guessing, and the one at which it is lowest."""
    lowest = int(averages.argmin())
    highest = float(f"{rates[lowest]:.2g}") if lowest + 1 < len(averages) else None
    if averages[lowest] > (1 - _LEAST_FALL) * guessing or lowest < 2:
        return None, highest
    # A network's first answers may be worse than guessing, and any learning rate mends that.
    below = np.minimum(averages[: lowest + 1], guessing)
    slope = np.gradient(below, np.log(rates[: lowest + 1]))
    return float(f"{rates[int(slope.argmin())]:.2g}"), highest


def _plot(
    rates: npt.NDArray[np.float64],
    losses: list[float],
    averages: list[float],
    guessing: float,
    suggested: float | None,
) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure((7, 4))
    axes = figure.add_subplot()
    axes.plot(rates, losses, color="#9ca3af", linewidth=0.8, label="loss of each step")
    axes.plot(rates, averages, color="#2563eb", label="moving average")
    axes.axhline(guessing, color="#b91c1c", linestyle=":", label="guessing")
    if suggested is not None:
        axes.axvline(suggested, color="#15803d", linestyle="--", label=f"suggested: {suggested:g}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1 * max(*averages, guessing))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def _prepare(config: TrainConfig, count: int) -> tuple[PlannedConfig, _Sample]:
    """Decide the config, and read the first training images of the first epoch.

    Raises:
        ManifestError: none of them can be read.
        CnnrayError, OSError: with a sentence for the user.
    """
    if config.weights not in ("none", "imagenet"):
        transfer.check(config.weights)
    manifest = data.build_run_manifest(config)
    decided = decisions.for_images(config, manifest)
    train = manifests.select_split(manifests.with_targets(manifest), "train")
    order = Epoch(decided.seed, 0, len(train), decided.batch_size).at(np.arange(min(count, len(train))))
    # Images in containers are read in the order of the file.
    rows = train.take(np.sort(order))
    blocks = list(reading.decoded_blocks(rows, decided.geometry.uncut, 256))
    position = np.argsort(np.argsort(order))
    images, targets, errors = (
        np.concatenate([block[name] for block in blocks])[position] for name in ("image", "target", "error")
    )
    good = errors == ""
    if not good.any():
        raise ManifestError(f"None of the first {len(order)} training images can be read: {errors[0]}.")
    counts = [*labels.count(train["label"]).values()]
    names = manifests.class_names(manifest)
    known: npt.NDArray[Any] = targets[good]
    if decided.multi_label:
        known = labels.multi_hot(rows["label"], names)[position][good]
    startup.load_tensorflow(gpus=False)
    alone = plan.planned(replace(decided, max_workers=None, min_workers=None, gpus_per_worker=None))
    return alone, _Sample(images[good], known, counts, len(train), names)


def _begin(config: PlannedConfig, sample: _Sample) -> "Steps":
    from cnnray.models.bundle import Bundle
    from cnnray.training.step import Steps

    teacher = None if config.teacher is None else Bundle.load(config.teacher).model
    class_weights = recipe.class_weights(config, sample.counts, sample.all_images)
    with _initial_weights(config) as weights:
        steps = Steps(
            config,
            len(sample.counts),
            weights=weights,
            head_of=recipe.head_of(config, sample.names),
            teacher=teacher,
            class_weights=class_weights,
        )
    steps.begin(Phase(name="probe", epochs=1, learning_rate=config.learning_rate), 1)
    return steps


@contextlib.contextmanager
def _initial_weights(config: DecidedConfig) -> Iterator[Path | None]:
    if config.weights == "none":
        yield None
    elif config.weights == "imagenet":
        with tempfile.TemporaryDirectory(prefix="cnnray-weights-") as folder:
            path = Path(folder, IMAGENET)
            transfer.write_imagenet_weights(config.architecture, config.image_size, path)
            yield path
    else:
        with storage.local_copy(transfer.weights_file(config.weights)) as path:
            yield path


def _set_learning_rate(steps: "Steps", rate: float) -> None:
    optimizer = getattr(steps.optimizer, "inner_optimizer", steps.optimizer)  # that of LossScaleOptimizer
    optimizer.learning_rate = rate
