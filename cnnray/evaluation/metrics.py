"""Figures of answers to labelled images: thin functions over scikit-learn and SciPy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics

BINS = 15
"""Of a reliability diagram, all of the same width."""
_TOP = (1, 2, 3, 5, 10)
_TINY = 1e-12
_CURVE_POINTS = 200

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Curve = dict[str, list[float]]


@dataclass(frozen=True)
class Answers:
    """What a network answered to labelled images, those that it could answer."""

    class_names: list[str]
    targets: Integers
    """int64 (N,), the true classes."""
    probabilities: Floats
    """float64 (N, classes); each row adds up to 1."""

    @property
    def predictions(self) -> Integers:
        """int64 (N,), the most probable class; of equal ones that which comes first."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """bool (N,)."""
        return np.asarray(self.predictions == self.targets, np.bool_)

    @property
    def confidences(self) -> Floats:
        """float64 (N,), of the most probable class."""
        return np.asarray(self.probabilities.max(1), np.float64)


def normalised(probabilities: npt.NDArray[np.float32]) -> Floats:
    """Probabilities (N, classes) in float64, each row divided by its sum, which float32 rounds."""
    wide = probabilities.astype(np.float64)
    return np.asarray(wide / wide.sum(1, keepdims=True), np.float64)


def interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share (SciPy's)."""
    found = scipy.stats.binomtest(hits, of).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def headline(answers: Answers) -> dict[str, Any]:
    """Figures of all answers together.

    Returns:
        `accuracy`, its 95 % `accuracy_interval`, `top_K_accuracy`, `balanced_accuracy`, `matthews_correlation`,
        `log_loss` (nats), and of precision, recall and F1 the macro and weighted means. Classes without images count
        in none of the means.
    """
    targets, predictions = answers.targets, answers.predictions
    hits, classes = int(answers.correct.sum()), np.unique(targets)
    everywhere = np.arange(len(answers.class_names))
    found: dict[str, Any] = {
        "accuracy": float(sklearn.metrics.accuracy_score(targets, predictions)),
        "accuracy_interval": list(interval(hits, len(targets))),
    }
    for k in _TOP[1:]:
        if k < len(everywhere):
            found[f"top_{k}_accuracy"] = float(
                sklearn.metrics.top_k_accuracy_score(targets, answers.probabilities, k=k, labels=everywhere)
            )
    found |= {
        "balanced_accuracy": float(
            sklearn.metrics.recall_score(targets, predictions, labels=classes, average="macro", zero_division=0)
        ),
        "matthews_correlation": float(sklearn.metrics.matthews_corrcoef(targets, predictions)),
        "log_loss": float(sklearn.metrics.log_loss(targets, answers.probabilities, labels=everywhere)),
    }
    for average in ("macro", "weighted"):
        values = sklearn.metrics.precision_recall_fscore_support(
            targets, predictions, labels=classes, average=average, zero_division=0
        )
        names = (f"{average}_precision", f"{average}_recall", f"{average}_f1")
        found |= {name: float(value) for name, value in zip(names, values, strict=False)}
    return found


def by_class(answers: Answers) -> list[dict[str, Any]]:
    """Of each class `name`, `support` (its images), `predicted` (answers), `precision`, `recall` (its accuracy) and
    `f1`, and against all others `roc_auc` and `average_precision`; None where it has no images, or no others."""
    everywhere = np.arange(len(answers.class_names))
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        answers.targets, answers.predictions, labels=everywhere, zero_division=0
    )
    predicted = np.bincount(answers.predictions, minlength=len(everywhere))
    rows = []
    for index, name in enumerate(answers.class_names):
        mine, scores = answers.targets == index, answers.probabilities[:, index]
        there = bool(mine.any())
        both = there and not mine.all()
        rows.append(
            {
                "name": name,
                "support": int(support[index]),
                "predicted": int(predicted[index]),
                "precision": float(precision[index]) if predicted[index] else None,
                "recall": float(recall[index]) if there else None,
                "f1": float(f1[index]) if there else None,
                "roc_auc": float(sklearn.metrics.roc_auc_score(mine, scores)) if both else None,
                "average_precision": float(sklearn.metrics.average_precision_score(mine, scores)) if there else None,
            }
        )
    return rows


def confusion(answers: Answers) -> Integers:
    """int64 (classes, classes): images of the true class (row) that were given each class (column)."""
    return np.asarray(
        sklearn.metrics.confusion_matrix(
            answers.targets, answers.predictions, labels=np.arange(len(answers.class_names))
        ),
        np.int64,
    )


def macro_mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """The mean of a figure of `by_class` over the classes that have it."""
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else None


def roc_curves(answers: Answers) -> dict[int, Curve]:
    """Of each class that has images, and others have: `x`, false positive rate, and `y`, true positive rate."""
    curves = {}
    for index in _with_others(answers):
        x, y, _ = sklearn.metrics.roc_curve(answers.targets == index, answers.probabilities[:, index])
        curves[index] = _thinned(x, y)
    return curves


def precision_recall_curves(answers: Answers) -> dict[int, Curve]:
    """Of each class that has images, and others have: `x`, recall, and `y`, precision."""
    curves = {}
    for index in _with_others(answers):
        y, x, _ = sklearn.metrics.precision_recall_curve(answers.targets == index, answers.probabilities[:, index])
        curves[index] = _thinned(x[::-1], y[::-1])
    return curves


def macro_curve(curves: dict[int, Curve]) -> Curve:
    """The mean of curves at the same places of x."""
    x = np.linspace(0, 1, _CURVE_POINTS)
    y = np.mean([np.interp(x, curve["x"], curve["y"]) for curve in curves.values()], axis=0)
    return {"x": x.tolist(), "y": y.tolist()}


def _with_others(answers: Answers) -> list[int]:
    found = np.unique(answers.targets).tolist()
    return found if len(found) > 1 else []


def _thinned(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Curve:
    """At most so many points of a curve as can be seen."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), _CURVE_POINTS)).astype(int))
    return {"x": np.asarray(x)[keep].tolist(), "y": np.asarray(y)[keep].tolist()}


# -- confidence -----------------------------------------------------------------------------------------------


def reliability(answers: Answers) -> list[dict[str, float]]:
    """Answers by confidence, in bins: `low` and `high` bounds, `images`, mean `confidence`, and `accuracy`; bins
    without images are left out."""
    edges = np.linspace(0, 1, BINS + 1)
    places = np.clip(np.digitize(answers.confidences, edges[1:-1], right=True), 0, BINS - 1)
    found = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            found.append(
                {
                    "low": float(edges[place]),
                    "high": float(edges[place + 1]),
                    "images": int(inside.sum()),
                    "confidence": float(answers.confidences[inside].mean()),
                    "accuracy": float(answers.correct[inside].mean()),
                }
            )
    return found


def expected_calibration_error(answers: Answers) -> float:
    """The mean distance of confidence and accuracy over the bins of `reliability`, by their images (Guo et al., On
    Calibration of Modern Neural Networks, 2017, equation 3)."""
    bins = reliability(answers)
    return float(sum(one["images"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(answers.targets))


def fitted_temperature(answers: Answers) -> float:
    """The temperature that makes the log loss smallest (Guo et al., 2017, section 4.2), 0.05 to 20.

    Where `answers` have a temperature already, this one is to be multiplied with it.
    """

    def loss(log_temperature: float) -> float:
        warm = tempered(answers, float(np.exp(log_temperature)))
        return float(sklearn.metrics.log_loss(warm.targets, warm.probabilities, labels=classes))

    classes = np.arange(len(answers.class_names))
    found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def tempered(answers: Answers, temperature: float) -> Answers:
    """The same answers, their logits divided by a temperature."""
    logits = np.log(np.maximum(answers.probabilities, _TINY)) / temperature
    return Answers(answers.class_names, answers.targets, scipy.special.softmax(logits, axis=1))


def cross_tempered(answers: Answers, seed: int = 0) -> Answers:
    """The same answers, those of each half tempered by what fits the other half: as new images would be."""
    order = np.random.default_rng(seed).permutation(len(answers.targets))
    probabilities = answers.probabilities.copy()
    for mine, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        if len(mine) and len(other):
            temperature = fitted_temperature(_some(answers, other))
            probabilities[mine] = tempered(_some(answers, mine), temperature).probabilities
    return Answers(answers.class_names, answers.targets, probabilities)


def _some(answers: Answers, rows: Integers) -> Answers:
    return Answers(answers.class_names, answers.targets[rows], answers.probabilities[rows])


def coverage_curve(answers: Answers) -> Curve:
    """What is left where answers below a confidence are withheld: `threshold`, descending, `coverage` (the share of
    images that are answered) and `accuracy` of those."""
    points = _withheld(answers)
    keep = np.unique(np.linspace(0, points.shape[1] - 1, min(points.shape[1], _CURVE_POINTS)).astype(int))
    return dict(zip(("threshold", "coverage", "accuracy"), points[:, keep].tolist(), strict=True))


def threshold_for(answers: Answers, accuracy: float) -> dict[str, float] | None:
    """The lowest confidence from which on the answers have at least this accuracy.

    Returns:
        `threshold`, and the `coverage` and `accuracy` of the answers from it on; None where no threshold does.
    """
    points = _withheld(answers)
    enough = np.flatnonzero(points[2] >= accuracy)
    if not len(enough):
        return None
    return dict(zip(("threshold", "coverage", "accuracy"), points[:, enough[-1]].tolist(), strict=True))


def _withheld(answers: Answers) -> Floats:
    """(3, M): each confidence there is, descending, and coverage and accuracy of the answers from it on."""
    order = np.argsort(-answers.confidences, kind="stable")
    confidences, hits = answers.confidences[order], np.cumsum(answers.correct[order])
    # Answers of the same confidence are given or withheld together.
    ends = np.flatnonzero(np.append(np.diff(confidences) != 0, True))
    return np.stack([confidences[ends], (ends + 1) / len(order), hits[ends] / (ends + 1)])


# -- two networks ---------------------------------------------------------------------------------------------


def mcnemar(correct: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> dict[str, float]:
    """McNemar's exact test of two networks on the same images.

    Args:
        correct: bool (N,), of the one.
        others: bool (N,), of the other, on the same images.

    Returns:
        `only_this` and `only_other`, images that one alone has right, and the two-sided `p_value` that they are as
        many by chance (SciPy's binomial test of the two counts).
    """
    only_this, only_other = int((correct & ~others).sum()), int((~correct & others).sum())
    p = scipy.stats.binomtest(only_this, only_this + only_other).pvalue if only_this + only_other else 1.0
    return {"only_this": only_this, "only_other": only_other, "p_value": float(p)}
