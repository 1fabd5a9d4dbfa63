"""The bundle that an evaluation publishes: with a fitted temperature, or with confidence thresholds."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from cnnray import cluster
from cnnray.evaluation import metrics, selective
from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.metrics import Predictions
from cnnray.evaluation.rows import Measured, make_predictions, measured, read_rows
from cnnray.models import bundle as bundles
from cnnray.models import engines, runtimes
from cnnray.models.answers import Decision
from cnnray.models.bundle import Bundle, BundleError, BundleInfo
from cnnray.models.drift import BINS, Distribution
from cnnray.models.groups import Groups
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.job import run as predict

log = logging.getLogger(__name__)

_MIN_FITTED = 50


def check_images(images: int, of_training: Mapping[str, int], config: EvaluateConfig) -> None:
    """Check that images can show `config.target_precision`.

    Args:
        images: their number.
        of_training: number of those that the network's training had, by split.
        config: of the evaluation.

    Raises:
        EvaluationError: there are too few, whatever the predictions are, or the network was trained on some.
    """
    if config.target_precision is None:
        return
    if count := of_training.get("train", 0):
        raise EvaluationError(
            f"The network was trained on {count} of these {images} images, which cannot show --target-precision: use "
            "others, such as a split test."
        )
    if count := of_training.get("validation", 0):
        log.warning(
            "Training chose its weights by %d of these %d images, so the precision may be lower for others: use "
            "images by which nothing was chosen, such as a split test.",
            count, images,
        )  # fmt: skip
    needed = selective.images_needed(config.target_precision, config.certainty)
    if config.calibrate and selective.split(images).sum() < _MIN_FITTED:
        raise EvaluationError(
            f"With --target-precision, --calibrate fits to a quarter of the images, and needs {_MIN_FITTED}: these "
            f"are {images} images."
        )
    if images < needed:
        raise EvaluationError(
            f"--target-precision {config.target_precision:g} with --certainty {config.certainty:g} cannot be shown "
            f"on {images} images: at least {needed} are needed, and more where confident predictions are wrong."
        )


def other_engines(config: EvaluateConfig, bundle: Bundle, engine: str) -> list[str]:
    """The engines for which the bundle to be published needs thresholds of their own, besides `engine`."""
    if config.target_precision is None or config.engine != "auto":
        return []
    # On a CPU, bfloat16 is not the arithmetic that Keras has with it on a GPU.
    seen, others = {engines.arithmetic(engine), *(() if cluster.may_have_gpus() else (engines.KERAS_BFLOAT16,))}, []
    for name in bundle.info.exports:
        if name in engines.ENGINES and engines.arithmetic(name) not in seen and not engines.why_unavailable(name):
            seen.add(engines.arithmetic(name))
            others.append(name)
    return others


def predict_with_other_engines(
    config: EvaluateConfig, bundle: Bundle, first: PredictConfig, engine: str
) -> dict[str, PredictConfig]:
    """Classify the images with each engine that needs a threshold of its own: the configs of the runs, by engine."""
    runs = {}
    for name in other_engines(config, bundle, engine):
        run = dataclasses.replace(first, engine=name, output=f"{first.output}-{name}")
        try:
            predict(run, withholds=False)
        except BundleError as error:
            log.warning("%s gets no threshold: %s", name, error)
        else:
            runs[name] = run
    return runs


def publish(
    config: EvaluateConfig,
    bundle: Bundle,
    target: str,
    first: Measured,
    others: Mapping[str, PredictConfig],
    images: int,
    *,
    groups: dict[str, str] | None,
    of_training: bool,
) -> Bundle:
    """Publish the bundle that the config asks for.

    Args:
        config: of the evaluation.
        bundle: from which it is published.
        target: folder of the new bundle.
        first: what the engine of the evaluation gave.
        others: from `predict_with_other_engines`.
        images, groups, of_training: see `published_info`.

    Returns:
        The new bundle.

    Raises:
        EvaluationError, BundleError, OSError: with a sentence for the user.
    """
    all_measured = [first]
    for name, run in others.items():
        rows, probabilities = read_rows(run.output)
        all_measured.append(measured(name, rows, probabilities, make_predictions(rows, probabilities, bundle)))
    info = published_info(config, bundle, all_measured, images, groups=groups, of_training=of_training)
    published = bundles.publish(bundle, info, target, overwrite=config.overwrite)
    log.info("published %s as %s", published.version, published.uri)
    return published


def published_info(
    config: EvaluateConfig,
    bundle: Bundle,
    all_measured: Sequence[Measured],
    images: int,
    *,
    groups: dict[str, str] | None = None,
    of_training: bool,
) -> BundleInfo:
    """The metadata of the bundle to publish.

    Args:
        config: says what it gets.
        bundle: from which it is published.
        all_measured: of the engine of the evaluation, and of `other_engines`.
        images: number of images in the manifest of the evaluation.
        groups: by class, its group; None: there are none.
        of_training: whether the images are those by which the training chose its weights.

    Raises:
        EvaluationError: the predictions do not determine a temperature, or show no threshold.
    """
    info, first, learnt = bundle.info, all_measured[0], selective.split(images)
    if config.calibrate:
        predictions = Predictions(info.class_names, first.targets, metrics.normalise(first.probabilities))
        fitted = predictions
        if config.target_precision is not None:  # which is shown on the other images
            fitted = predictions.take(np.flatnonzero(learnt[first.ids]))
        info = _calibrated(bundle, predictions, fitted, of_training)
        log.info("the temperature becomes %.4f", info.temperature)
    if config.target_precision is None:
        if info.decision is not None:
            log.warning("With another temperature, the thresholds of %s are void: the bundle that is published "
                        "answers for every image. Give --target-precision, too.", bundle.uri)  # fmt: skip
        return dataclasses.replace(info, decision=None, groups=None)
    thresholds = {}
    for one in all_measured:
        threshold = selective.find_threshold(
            one.probabilities
            if info.temperature == bundle.info.temperature
            else runtimes.rescale(one.probabilities, bundle.info.temperature / info.temperature),
            one.targets,
            precision=config.target_precision,
            certainty=config.certainty,
            learnt=learnt[one.ids],
            groups=Groups.of(groups, info.class_names) if groups else None,
        )
        if threshold is not None:
            export = engines.export_id(bundle, one.engine)
            thresholds[engines.arithmetic(one.engine)] = dataclasses.replace(threshold, export=export)
            log.info(
                "%s answers from a confidence of %.6g on: %.1f %% of the images, of whose answers %.2f %% are right",
                one.engine, threshold.confidence, 100 * threshold.coverage, 100 * threshold.observed_precision,
            )  # fmt: skip
            if groups and threshold.group is None:
                log.warning(
                    "%s names no groups: these images show no such precision for them, as too few are left without a "
                    "class, or their groups are wrong too often", one.engine,
                )  # fmt: skip
            elif groups:
                log.info("%s names the group of %.1f %% of the others", one.engine, 100 * threshold.group_coverage)
        elif one is first:
            raise EvaluationError(
                f"No threshold shows a precision of {config.target_precision:g} on these {len(one.targets)} images "
                "with the certainty asked for: confident predictions are wrong too often, or there are too few "
                "images. No bundle was published."
            )
        else:
            log.warning("no threshold gives %s that precision, so it cannot run the published bundle", one.engine)
    decision = Decision(
        precision=config.target_precision,
        certainty=config.certainty,
        candidate_coverage=config.certainty,
        thresholds=thresholds,
    )
    return dataclasses.replace(info, decision=decision, groups=groups)


def _calibrated(bundle: Bundle, predictions: Predictions, fitted: Predictions, of_training: bool) -> BundleInfo:
    """The metadata of a bundle with a fitted temperature.

    Args:
        bundle: the bundle that made the predictions.
        predictions: for all images.
        fitted: those that the temperature is fitted to.
        of_training: whether they are of the training's validation images.

    Raises:
        EvaluationError: the predictions do not determine a temperature.
    """
    factor = metrics.fit_temperature(fitted)
    count, wrong = len(fitted.targets), int((~fitted.correct).sum())
    inside = metrics.MIN_TEMPERATURE * 1.01 < factor < metrics.MAX_TEMPERATURE / 1.01
    if count < _MIN_FITTED or not 0 < wrong < count or not inside:
        raise EvaluationError(
            f"{count} predictions, {wrong} of them wrong, do not determine a temperature (at least {_MIN_FITTED} are "
            "needed, with some correct and some wrong): no bundle was published."
        )
    # The classes of the reference stay, but the confidences of all answers become others.
    reference = bundle.info.reference
    if reference:
        calibrated = metrics.apply_temperature(predictions, factor)
        known = _answers(calibrated) if of_training else {"confidences": [0] * BINS}
        reference = reference | {"confidences": known["confidences"]}
    return dataclasses.replace(bundle.info, temperature=bundle.info.temperature * factor, reference=reference)


def _answers(predictions: Predictions) -> dict[str, list[int]]:
    """For `BundleInfo.reference`."""
    classes = len(predictions.class_names)
    return Distribution.of(predictions.classes, predictions.confidences, classes).as_dict()
