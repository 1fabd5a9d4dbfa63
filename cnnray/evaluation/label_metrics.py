"""Metrics of predictions with several labels for an image: thin functions over scikit-learn and NumPy."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn.metrics

from cnnray.evaluation.metrics import Curve, Floats, Integers, resampled_curve, wilson_interval
from cnnray.models.answers import label_masks
from cnnray.models.verification import average_precisions

Bools = npt.NDArray[np.bool_]

_RESAMPLES = 200


@dataclass(frozen=True)
class Decisions:
    """All labels of all images, as answers that are right where the image has the label."""

    correct: Bools
    """bool (N * classes,), whether the image has the label."""
    confidences: Floats
    """float64 (N * classes,), the probability of the label."""


@dataclass(frozen=True)
class LabelPredictions:
    """The predictions for N labelled images, without images that have an error."""

    class_names: list[str]
    truth: Bools
    """bool (N, classes), which labels each image has."""
    probabilities: Floats
    """float64 (N, classes)."""
    thresholds: list[float]
    """Lowest probability with which an image is given each label."""

    @functools.cached_property
    def given(self) -> Bools:
        """bool (N, classes), which labels each image is given."""
        return label_masks(self.probabilities.astype(np.float32), self.thresholds)

    @property
    def decisions(self) -> Decisions:
        """Whether images have labels, beside the probabilities of these."""
        return Decisions(self.truth.ravel(), self.probabilities.ravel())

    @functools.cached_property
    def present(self) -> Integers:
        """int64, the labels that some image has."""
        return np.flatnonzero(self.truth.any(0))


def overall_metrics(predictions: LabelPredictions) -> dict[str, float]:
    """Metrics over all labels.

    Returns:
        `mean_average_precision`, over the labels that some image has; precision, recall and F1 at the thresholds, as
        `macro_` means over the same labels, with precision 0 for one that no image is given, and as `micro_` ones,
        over all decisions together; `subset_accuracy`, the share of images that are given just their labels;
        `hamming_loss`, the share of wrong decisions; `log_loss`, the mean over the labels in nats;
        `labels_per_image` and `given_labels_per_image`.
    """
    truth, given, present = predictions.truth, predictions.given, predictions.present
    of_each = _shares(predictions)
    of_all = _ratios((truth & given).sum(), given.sum(), truth.sum())
    return {
        "mean_average_precision": _mean(average_precisions(truth, predictions.probabilities)[present]),
        **{f"macro_{name}": _mean(values[present]) for name, values in of_each.items()},
        **{f"micro_{name}": float(value) for name, value in of_all.items()},
        "subset_accuracy": float((truth == given).all(1).mean()),
        "hamming_loss": float((truth != given).mean()),
        "log_loss": float(_losses(predictions).mean()),
        "labels_per_image": float(truth.sum(1).mean()),
        "given_labels_per_image": float(given.sum(1).mean()),
    }


def _shares(predictions: LabelPredictions) -> dict[str, Floats]:
    """Precision, recall and F1 of each label, float64 (classes,); 0 where one is not defined. (scikit-learn takes a
    table of one label for another kind of data.)"""
    truth, given = predictions.truth, predictions.given
    return _ratios((truth & given).sum(0), given.sum(0), truth.sum(0))


def _ratios(right: Any, given: Any, has: Any) -> dict[str, Any]:
    return {
        "precision": right / np.maximum(given, 1),
        "recall": right / np.maximum(has, 1),
        "f1": 2 * right / np.maximum(given + has, 1),
    }


def confidence_intervals(predictions: LabelPredictions) -> dict[str, list[float]]:
    """95 % confidence intervals: Wilson's for `subset_accuracy`; for `mean_average_precision`, `macro_f1`, `micro_f1`
    and `log_loss` percentiles of 200 bootstrap samples of the images, moved by the difference between the figure and
    their mean (see `metrics.confidence_intervals`)."""
    count = len(predictions.truth)
    exact = (predictions.truth == predictions.given).all(1)
    intervals = {"subset_accuracy": list(wilson_interval(int(exact.sum()), count))}
    generator, figures, sample = np.random.default_rng(0), overall_metrics(predictions), _Resampled(predictions)
    names = ("mean_average_precision", "macro_f1", "micro_f1", "log_loss")
    samples = [sample(generator.integers(0, count, count)) for _ in range(_RESAMPLES if count > 1 else 0)]
    for name, values in zip(names, np.transpose(samples).tolist(), strict=False):
        bounds = np.percentile(values, [2.5, 97.5]) + figures[name] - np.mean(values)
        intervals[name] = np.clip(bounds, 0, np.inf if name == "log_loss" else 1).tolist()
    return intervals


class _Resampled:
    """Figures of samples of the images, for which the rows are sorted once."""

    def __init__(self, predictions: LabelPredictions) -> None:
        truth, given = predictions.truth, predictions.given
        self._orders = np.argsort(-predictions.probabilities, axis=0, kind="stable").T
        self._sorted = [truth[order, index] for index, order in enumerate(self._orders)]
        self._right = (truth & given).astype(np.float32)
        self._counted = given.astype(np.float32) + truth
        self._losses = _losses(predictions)

    def __call__(self, rows: Integers) -> tuple[float, float, float, float]:
        """The mean average precision, macro F1, micro F1 and log loss of images with these indices. Copies of an
        image, whose scores are equal, follow one another in the ranking."""
        weights = np.bincount(rows, minlength=len(self._losses)).astype(np.float32)
        averages = []
        for order, has in zip(self._orders, self._sorted, strict=True):
            drawn = weights[order]
            positive = drawn * has
            precisions = np.cumsum(positive, dtype=np.float64) / np.maximum(np.cumsum(drawn, dtype=np.float64), 1)
            averages.append((positive * precisions).sum() / positive.sum() if positive.any() else np.nan)
        present = np.isfinite(averages)
        right, counts = weights @ self._right, weights @ self._counted
        return (
            _mean(np.asarray(averages)[present]),
            _mean((2 * right / np.maximum(counts, 1))[present]),
            float(2 * right.sum() / max(counts.sum(), 1)),
            float(self._losses[rows].mean()),
        )


def class_metrics(predictions: LabelPredictions) -> list[dict[str, Any]]:
    """Metrics of each label.

    Returns:
        for each label `name`, `threshold`, `support` (images that have it), `predicted` (images that are given it),
        `precision`, `recall` and `f1` at the threshold, `roc_auc` and `average_precision`. Undefined values are None:
        `precision` of a label that no image is given, `roc_auc` of one that all or no images have, the rest of one
        that no image has.
    """
    truth, predicted, shares = predictions.truth, predictions.given.sum(0), _shares(predictions)
    averages, rows = average_precisions(truth, predictions.probabilities), []
    for index, name in enumerate(predictions.class_names):
        present, scores = bool(truth[:, index].any()), predictions.probabilities[:, index]
        both = present and not truth[:, index].all()
        rows.append(
            {
                "name": name,
                "threshold": predictions.thresholds[index],
                "support": int(truth[:, index].sum()),
                "predicted": int(predicted[index]),
                "precision": float(shares["precision"][index]) if predicted[index] else None,
                "recall": float(shares["recall"][index]) if present else None,
                "f1": float(shares["f1"][index]) if present else None,
                "roc_auc": float(sklearn.metrics.roc_auc_score(truth[:, index], scores)) if both else None,
                "average_precision": float(averages[index]) if present else None,
            }
        )
    return rows


def precision_recall_curves(predictions: LabelPredictions) -> dict[int, Curve]:
    """Curves of precision (`y`) by recall (`x`) of the labels that some image has, by index."""
    return {
        int(index): resampled_curve(predictions.truth[:, index], predictions.probabilities[:, index])
        for index in predictions.present
    }


def _losses(predictions: LabelPredictions) -> Floats:
    """float64 (N,), the mean over the labels of the log loss, with scikit-learn's bounds of probabilities."""
    epsilon = np.finfo(np.float64).eps
    true = np.where(predictions.truth, predictions.probabilities, 1 - predictions.probabilities)
    return np.asarray(-np.log(np.clip(true, epsilon, 1 - epsilon)).mean(1), np.float64)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0
