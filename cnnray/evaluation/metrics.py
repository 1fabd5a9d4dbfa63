"""Metrics of predictions for labelled images: thin functions over scikit-learn and SciPy."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics

BINS = 15
"""Bins of a reliability diagram, of equal width."""
TOP_K = (2, 3, 5, 10)
"""Values of k for which there is a top-k accuracy, where there are more classes than k."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Bounds of a fitted temperature."""
_TINY, _TINY_STEP = float(np.finfo(np.float32).tiny), 1e-12
_CURVE_POINTS = 200
_COVERAGE_KEYS = ("threshold", "coverage", "accuracy")
_RESAMPLES, _MAX_FITTED = 200, 20_000

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Curve = dict[str, list[float]]


class Confident(Protocol):
    """Answers with confidences that ought to be the shares of right ones."""

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """bool (N,)."""
        ...

    @property
    def confidences(self) -> Floats:
        """float64 (N,)."""
        ...


@dataclass(frozen=True)
class Predictions:
    """The predictions for N labelled images, without images that have an error."""

    class_names: list[str]
    targets: Integers
    """int64 (N,), the true classes."""
    probabilities: Floats
    """float64 (N, classes); each row sums to 1."""

    @functools.cached_property
    def classes(self) -> Integers:
        """int64 (N,), the most probable class; on a tie the first."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @functools.cached_property
    def correct(self) -> npt.NDArray[np.bool_]:
        """bool (N,), whether the most probable class is the true one."""
        return np.asarray(self.classes == self.targets, np.bool_)

    @functools.cached_property
    def confidences(self) -> Floats:
        """float64 (N,), the probability of the most probable class."""
        return np.asarray(self.probabilities.max(1), np.float64)

    def take(self, rows: Integers) -> "Predictions":
        """The predictions with these indices."""
        return Predictions(self.class_names, self.targets[rows], self.probabilities[rows])


def normalise(probabilities: npt.NDArray[np.float32]) -> Floats:
    """Scale each row to sum 1, in float64.

    Args:
        probabilities: float32 (N, classes), none of whose rows `predictor.find_unusable` finds. They sum to 1 up to
            the engine's rounding.

    Returns:
        float64 (N, classes).
    """
    wide = probabilities.astype(np.float64)
    return np.asarray(wide / wide.sum(1, keepdims=True), np.float64)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share (SciPy's)."""
    interval = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def overall_metrics(predictions: Predictions) -> dict[str, Any]:
    """Metrics over all classes.

    Returns:
        `accuracy`, `top_K_accuracy`, `balanced_accuracy`, `matthews_correlation`, `log_loss` (nats), and the macro
        and weighted means of precision, recall and F1. There is a top-k accuracy for each k of `TOP_K` that is less
        than the number of classes. The means leave out classes without images, and count precision 0 for a class that
        was never predicted. A class is among the top k if fewer than k others have a higher probability, or the same
        probability and a smaller index, as everywhere in this project. The log loss takes probabilities below
        2.2e-16 as 2.2e-16 (the epsilon of float64), as scikit-learn's does.
    """
    targets, predicted = predictions.targets, predictions.classes
    present, every_class = np.unique(targets), np.arange(len(predictions.class_names))
    results: dict[str, Any] = {"accuracy": float(sklearn.metrics.accuracy_score(targets, predicted))}
    ranks = _ranks(predictions)
    results |= {f"top_{k}_accuracy": float((ranks < k).mean()) for k in TOP_K if k < len(every_class)}
    results |= {
        "balanced_accuracy": float(
            sklearn.metrics.recall_score(targets, predicted, labels=present, average="macro", zero_division=0)
        ),
        "matthews_correlation": float(sklearn.metrics.matthews_corrcoef(targets, predicted)),
        "log_loss": float(_losses(predictions).mean()),
    }
    for average in ("macro", "weighted"):
        values = sklearn.metrics.precision_recall_fscore_support(
            targets, predicted, labels=present, average=average, zero_division=0
        )
        names = (f"{average}_precision", f"{average}_recall", f"{average}_f1")
        results |= {name: float(value) for name, value in zip(names, values, strict=False)}
    return results


def _ranks(predictions: Predictions) -> Integers:
    """int64 (N,), the number of classes that rank before the true one."""
    true_scores = _true_class_values(predictions.probabilities, predictions.targets)[:, None]
    first = np.arange(len(predictions.class_names)) < predictions.targets[:, None]
    before = (predictions.probabilities > true_scores) | ((predictions.probabilities == true_scores) & first)
    return np.asarray(before.sum(1), np.int64)


def _losses(predictions: Predictions) -> Floats:
    """float64 (N,), the log loss of each image in nats, with scikit-learn's bounds of probabilities."""
    epsilon = np.finfo(np.float64).eps
    true_scores = _true_class_values(predictions.probabilities, predictions.targets)
    return np.asarray(-np.log(np.clip(true_scores, epsilon, 1 - epsilon)), np.float64)


def _true_class_values(values: Floats, targets: Integers) -> Floats:
    """(N,), of values (N, classes) those of the true classes."""
    return np.asarray(np.take_along_axis(values, targets[:, None], 1)[:, 0])


def confidence_intervals(predictions: Predictions) -> dict[str, list[float]]:
    """95 % confidence intervals: Wilson's for `accuracy` and `top_K_accuracy`; for `macro_f1`, `log_loss` and
    `expected_calibration_error` percentiles of 200 bootstrap samples of the images (SciPy's).

    The percentiles are moved by the difference between the figure and the mean of the samples. The calibration error
    of a sample is larger than that of all images, by so much that it would often lie outside its own interval.
    """
    count, ranks = len(predictions.targets), _ranks(predictions)
    intervals = {"accuracy": list(wilson_interval(int(predictions.correct.sum()), count))}
    for k in TOP_K:
        if k < len(predictions.class_names):
            intervals[f"top_{k}_accuracy"] = list(wilson_interval(int((ranks < k).sum()), count))
    losses = _losses(predictions)

    def macro_f1(rows: Integers) -> float:
        targets = predictions.targets[rows]
        return float(
            sklearn.metrics.f1_score(
                targets, predictions.classes[rows], labels=np.unique(targets), average="macro", zero_division=0
            )
        )

    for name, metric, largest in (
        ("macro_f1", macro_f1, 1.0),
        ("log_loss", lambda rows: float(losses[rows].mean()), np.inf),
        ("expected_calibration_error", lambda rows: _calibration_error(predictions, rows), 1.0),
    ):
        if count > 1:
            every = np.arange(count)
            result = scipy.stats.bootstrap(
                (every,), metric, n_resamples=_RESAMPLES, vectorized=False, method="percentile", rng=0
            )
            bounds = np.asarray(result.confidence_interval) + metric(every) - result.bootstrap_distribution.mean()
            intervals[name] = np.clip(bounds, 0, largest).tolist()
    return intervals


def class_metrics(predictions: Predictions) -> list[dict[str, Any]]:
    """Metrics of each class, one against all others.

    Returns:
        for each class `name`, `support` (its images), `predicted` (images that were given this class), `precision`,
        `recall` (the accuracy of the class), `f1`, `roc_auc` and `average_precision`. Undefined values are None:
        `precision` of a class that was never predicted, `roc_auc` where either the class or all others have no
        images, the rest of a class without images.
    """
    every_class = np.arange(len(predictions.class_names))
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        predictions.targets, predictions.classes, labels=every_class, zero_division=0
    )
    predicted = np.bincount(predictions.classes, minlength=len(every_class))
    rows = []
    for index, name in enumerate(predictions.class_names):
        is_class, scores = predictions.targets == index, predictions.probabilities[:, index]
        present = bool(is_class.any())
        both = present and not is_class.all()
        rows.append(
            {
                "name": name,
                "support": int(support[index]),
                "predicted": int(predicted[index]),
                "precision": float(precision[index]) if predicted[index] else None,
                "recall": float(recall[index]) if present else None,
                "f1": float(f1[index]) if present else None,
                "roc_auc": float(sklearn.metrics.roc_auc_score(is_class, scores)) if both else None,
                "average_precision": float(sklearn.metrics.average_precision_score(is_class, scores))
                if present
                else None,
            }
        )
    return rows


def confusion_matrix(predictions: Predictions) -> Integers:
    """int64 (classes, classes): number of images by true class (row) and predicted class (column)."""
    return np.asarray(
        sklearn.metrics.confusion_matrix(
            predictions.targets, predictions.classes, labels=np.arange(len(predictions.class_names))
        ),
        np.int64,
    )


def macro_mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """The mean of a metric in `class_metrics` over the classes where it is defined."""
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else None


def roc_curves(predictions: Predictions) -> dict[int, Curve]:
    """ROC curves, true positive rate (`y`) by false positive rate (`x`), of the classes with images, by index; empty
    if only one class has images."""
    present, curves = np.unique(predictions.targets).tolist(), {}
    for index in present if len(present) > 1 else []:
        x, y, _ = sklearn.metrics.roc_curve(predictions.targets == index, predictions.probabilities[:, index])
        curves[index] = _on_grid(x, y, lambda x, grid: np.searchsorted(x, grid + _TINY_STEP, side="right") - 1)
    return curves


def precision_recall_curves(predictions: Predictions) -> dict[int, Curve]:
    """Curves of precision (`y`) by recall (`x`) of the classes with images, by index; empty if only one class has
    images."""
    present = np.unique(predictions.targets).tolist()
    return {
        index: resampled_curve(predictions.targets == index, predictions.probabilities[:, index])
        for index in (present if len(present) > 1 else [])
    }


def resampled_curve(is_class: npt.NDArray[np.bool_], scores: Floats) -> Curve:
    """Precision (`y`) by recall (`x`), on an evenly spaced grid.

    Args:
        is_class: bool (N,), which images are of the class.
        scores: float64 (N,), of the class.
    """
    precision, recall, _ = sklearn.metrics.precision_recall_curve(is_class, scores, drop_intermediate=True)
    return _on_grid(recall[::-1], precision[::-1], lambda x, grid: np.searchsorted(x, grid - _TINY_STEP))


def mean_curve(curves: dict[int, Curve]) -> Curve:
    """The mean over the classes of `roc_curves` or `precision_recall_curves`."""
    return {
        "x": next(iter(curves.values()))["x"],
        "y": np.mean([curve["y"] for curve in curves.values()], 0).tolist(),
    }


def _on_grid(x: Floats, y: Floats, index_at: Callable[[Floats, Floats], Any]) -> Curve:
    """A curve at evenly spaced places.

    Args:
        x: ascending.
        y: as many.
        index_at: gives, from x and the grid, the index of the highest point of the curve at each place of the grid.
    """
    grid = np.linspace(0, 1, _CURVE_POINTS + 1)
    return {"x": grid.tolist(), "y": np.asarray(y)[index_at(x, grid)].tolist()}


# -- confidence -----------------------------------------------------------------------------------------------


def reliability_bins(predictions: Confident) -> list[dict[str, float]]:
    """Predictions in bins of confidence.

    Returns:
        for each bin that has images: its bounds `low` and `high`, the number of `images`, their mean `confidence` and
        their `accuracy`.
    """
    edges, bin_of_row = np.linspace(0, 1, BINS + 1), _bin_indices(predictions)
    bins = []
    for index in range(BINS):
        inside = bin_of_row == index
        if inside.any():
            bins.append(
                {
                    "low": float(edges[index]),
                    "high": float(edges[index + 1]),
                    "images": int(inside.sum()),
                    "confidence": float(predictions.confidences[inside].mean()),
                    "accuracy": float(predictions.correct[inside].mean()),
                }
            )
    return bins


def expected_calibration_error(predictions: Confident) -> float:
    """The mean distance between confidence and accuracy over `reliability_bins`, weighted by images (Guo et al., On
    Calibration of Modern Neural Networks, 2017, equation 3)."""
    return _calibration_error(predictions, np.arange(len(predictions.correct)))


def _calibration_error(predictions: Confident, rows: Integers) -> float:
    gaps = (predictions.correct.astype(np.float64) - predictions.confidences)[rows]
    return float(np.abs(np.bincount(_bin_indices(predictions)[rows], gaps, BINS)).sum() / len(rows))


def _bin_indices(predictions: Confident) -> Integers:
    """int64 (N,), the bin of each prediction's confidence."""
    edges = np.linspace(0, 1, BINS + 1)
    return np.asarray(np.digitize(predictions.confidences, edges[1:-1], right=True), np.int64)


def fit_temperature(predictions: Predictions) -> float:
    """Find the temperature with the smallest log loss (Guo et al., 2017, section 4.2).

    It lies between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`, and is fitted to at most 20,000 predictions. If the
    network that made the predictions has a temperature already, its new temperature is the product of both.
    """
    if len(predictions.targets) > _MAX_FITTED:
        predictions = predictions.take(np.random.default_rng(0).permutation(len(predictions.targets))[:_MAX_FITTED])
    logits = np.log(np.maximum(predictions.probabilities, _TINY))
    true_logits = _true_class_values(logits, predictions.targets)

    def loss(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float((scipy.special.logsumexp(logits * scale, axis=1) - true_logits * scale).mean())

    bounds = (np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE))
    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The same predictions with their logits divided by a temperature."""
    logits = np.log(np.maximum(predictions.probabilities, _TINY)) / temperature
    return Predictions(predictions.class_names, predictions.targets, scipy.special.softmax(logits, axis=1))


def cross_fit_temperature(predictions: Predictions, seed: int = 0) -> Predictions:
    """Apply to each random half of the predictions the temperature that is fitted to the other half.

    The result shows what a fitted temperature does to new images.
    """
    order = np.random.default_rng(seed).permutation(len(predictions.targets))
    probabilities = predictions.probabilities.copy()
    for half, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        if len(half) and len(other):
            temperature = fit_temperature(predictions.take(other))
            probabilities[half] = apply_temperature(predictions.take(half), temperature).probabilities
    return Predictions(predictions.class_names, predictions.targets, probabilities)


def coverage_curve(predictions: Predictions) -> Curve:
    """The effect of withholding predictions below a confidence threshold.

    Returns:
        `threshold`, descending, `coverage` (share of predictions with at least that confidence) and `accuracy` of
        these, at no more than 200 thresholds.
    """
    points = _coverage_points(predictions)
    keep = np.unique(np.linspace(0, points.shape[1] - 1, min(points.shape[1], _CURVE_POINTS)).astype(int))
    return dict(zip(_COVERAGE_KEYS, points[:, keep].tolist(), strict=True))


def find_threshold(predictions: Predictions, accuracy: float) -> dict[str, float] | None:
    """Find the lowest confidence threshold that reaches an accuracy.

    Returns:
        `threshold`, and the `coverage` and `accuracy` of the predictions with at least that confidence; None if no
        threshold reaches the accuracy.
    """
    points = _coverage_points(predictions)
    sufficient = np.flatnonzero(points[2] >= accuracy)
    if not len(sufficient):
        return None
    return dict(zip(_COVERAGE_KEYS, points[:, sufficient[-1]].tolist(), strict=True))


def _coverage_points(predictions: Predictions) -> Floats:
    """(3, M), the `_COVERAGE_KEYS` for each distinct confidence, descending."""
    order = np.argsort(-predictions.confidences, kind="stable")
    confidences, hits = predictions.confidences[order], np.cumsum(predictions.correct[order])
    # A threshold keeps or withholds all predictions of the same confidence.
    ends = np.flatnonzero(np.append(np.diff(confidences) != 0, True))
    return np.stack([confidences[ends], (ends + 1) / len(order), hits[ends] / (ends + 1)])
