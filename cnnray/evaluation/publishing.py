"""The bundle that an evaluation publishes: with a fitted temperature, or with thresholds that keep a promise."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cnnray.evaluation import metrics, selective
from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.metrics import Integers, Predictions
from cnnray.models import engines
from cnnray.models.answers import Decision, Probabilities, Threshold
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.drift import BINS, Distribution

log = logging.getLogger(__name__)

_MIN_FITTED = 50


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an engine gave for N labelled images."""

    engine: str
    probabilities: Probabilities
    """float32 (N, classes)."""
    targets: Integers
    """int64 (N,), the true classes."""


def check_number(images: int, config: EvaluateConfig) -> None:
    """
    Raises:
        EvaluationError: so few images cannot show `config.target_precision`, whatever the predictions are.
    """
    if config.target_precision is None:
        return
    needed = selective.images_needed(config.target_precision, config.certainty)
    if config.calibrate and len(selective.split(images)[0]) < _MIN_FITTED:
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
    seen, others = {engines.arithmetic(engine)}, []
    for name in bundle.info.exports:
        if name in engines.ENGINES and engines.arithmetic(name) not in seen and not engines.why_unavailable(name):
            seen.add(engines.arithmetic(name))
            others.append(name)
    return others


def published_info(
    config: EvaluateConfig, bundle: Bundle, measured: Sequence[Measured], *, of_training: bool
) -> BundleInfo:
    """The metadata of the bundle to publish.

    Args:
        config: says what it gets.
        bundle: from which it is published.
        measured: of the engine of the evaluation, and of `other_engines`.
        of_training: whether the images are those by which the training chose its weights.

    Raises:
        EvaluationError: the predictions do not determine a temperature, or show no threshold.
    """
    info, first = bundle.info, measured[0]
    if config.calibrate:
        predictions = Predictions(info.class_names, first.targets, metrics.normalise(first.probabilities))
        fitted = predictions
        if config.target_precision is not None:  # which is shown on the other images
            fitted = predictions.take(selective.split(len(first.targets))[0])
        info = _calibrated(bundle, predictions, fitted, of_training)
        log.info("the temperature becomes %.4f", info.temperature)
    if config.target_precision is None:
        if info.decision is not None:
            log.warning("With another temperature, the thresholds of %s are void: the bundle that is published "
                        "answers for every image. Give --target-precision, too.", bundle.uri)  # fmt: skip
        return dataclasses.replace(info, decision=None)
    if of_training:
        log.warning(
            "Training chose its weights by these images, so what --target-precision promises may not hold for "
            "others: use images by which nothing was chosen, such as a split test."
        )
    thresholds = {}
    for one in measured:
        threshold = _threshold(config, one, info.temperature / bundle.info.temperature)
        if threshold is not None:
            thresholds[engines.arithmetic(one.engine)] = threshold
            log.info(
                "%s answers from a confidence of %.6g on: %.1f %% of the images, of whose answers %.2f %% are right",
                one.engine, threshold.confidence, 100 * threshold.coverage, 100 * threshold.observed_precision,
            )  # fmt: skip
        elif one is first:
            raise EvaluationError(
                f"No threshold shows a precision of {config.target_precision:g} on these {len(one.targets)} images "
                "with the certainty asked for: confident predictions are wrong too often, or there are too few "
                "images. No bundle was published."
            )
        else:
            log.warning("%s has no threshold that keeps the promise, and cannot run the published bundle", one.engine)
    decision = Decision(
        precision=config.target_precision,
        certainty=config.certainty,
        candidate_coverage=config.certainty,
        thresholds=thresholds,
    )
    return dataclasses.replace(info, decision=decision)


def _threshold(config: EvaluateConfig, measured: Measured, factor: float) -> Threshold | None:
    """The threshold of an engine at a temperature that is `factor` times the one at which it was measured."""
    assert config.target_precision is not None
    probabilities = measured.probabilities
    if factor != 1:
        predictions = Predictions([], measured.targets, metrics.normalise(probabilities))
        probabilities = metrics.apply_temperature(predictions, factor).probabilities.astype(np.float32)
    return selective.find_threshold(
        probabilities, measured.targets, precision=config.target_precision, certainty=config.certainty
    )


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
