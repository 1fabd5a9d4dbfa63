"""Figures of answers to labelled images: thin functions over scikit-learn and SciPy."""

import functools
from collections.abc import Callable
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
_TOP = (2, 3, 5, 10)
_TINY, _TINY_STEP = float(np.finfo(np.float32).tiny), 1e-12
_CURVE_POINTS = 200
_RESAMPLES, _MOST_FITTED = 200, 20_000
COLDEST, WARMEST = 0.05, 20.0
"""Bounds of a fitted temperature."""

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

    @functools.cached_property
    def predictions(self) -> Integers:
        """int64 (N,), the most probable class; of equal ones that which comes first."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @functools.cached_property
    def correct(self) -> npt.NDArray[np.bool_]:
        """bool (N,)."""
        return np.asarray(self.predictions == self.targets, np.bool_)

    @functools.cached_property
    def confidences(self) -> Floats:
        """float64 (N,), of the most probable class."""
        return np.asarray(self.probabilities.max(1), np.float64)

    def some(self, rows: Integers) -> "Answers":
        """Those of some images."""
        return Answers(self.class_names, self.targets[rows], self.probabilities[rows])


def normalised(probabilities: npt.NDArray[np.float32]) -> Floats:
    """Probabilities (N, classes) in float64, each row divided by its sum, which float32 rounds; where int8 has
    rounded all of very many classes to 0, all are the same."""
    wide = probabilities.astype(np.float64)
    wide[wide.sum(1) == 0] = 1.0
    return np.asarray(wide / wide.sum(1, keepdims=True), np.float64)


def interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share (SciPy's)."""
    found = scipy.stats.binomtest(hits, of).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def headline(answers: Answers) -> dict[str, Any]:
    """Figures of all answers together.

    Returns:
        `accuracy`, `top_K_accuracy`, `balanced_accuracy`, `matthews_correlation`, `log_loss` (nats), and of
        precision, recall and F1 the macro and weighted means. Classes without images count in none of the means,
        and a class that was never predicted has precision 0 there. A class counts among the top k where fewer than k
        others have a higher probability, or the same and a place before it, as everywhere in this project.
    """
    targets, predictions = answers.targets, answers.predictions
    classes, everywhere = np.unique(targets), np.arange(len(answers.class_names))
    found: dict[str, Any] = {"accuracy": float(sklearn.metrics.accuracy_score(targets, predictions))}
    ranks = _ranks(answers)
    found |= {f"top_{k}_accuracy": float((ranks < k).mean()) for k in _TOP if k < len(everywhere)}
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


def _ranks(answers: Answers) -> Integers:
    """int64 (N,), how many classes come before the true one."""
    mine = np.take_along_axis(answers.probabilities, answers.targets[:, None], 1)
    before = np.arange(len(answers.class_names)) < answers.targets[:, None]
    higher = (answers.probabilities > mine) | ((answers.probabilities == mine) & before)
    return np.asarray(higher.sum(1), np.int64)


def intervals(answers: Answers) -> dict[str, list[float]]:
    """95 % confidence intervals: Wilson's of `accuracy` and `top_K_accuracy`, and by resampling the images (SciPy's
    bootstrap, percentiles of 200) of `macro_f1`, `log_loss` and `expected_calibration_error`."""
    count, ranks = len(answers.targets), _ranks(answers)
    found = {"accuracy": list(interval(int(answers.correct.sum()), count))}
    for k in _TOP:
        if k < len(answers.class_names):
            found[f"top_{k}_accuracy"] = list(interval(int((ranks < k).sum()), count))
    losses = -np.log(np.maximum(np.take_along_axis(answers.probabilities, answers.targets[:, None], 1)[:, 0], _TINY))

    def macro_f1(rows: Integers) -> float:
        truth = answers.targets[rows]
        return float(
            sklearn.metrics.f1_score(
                truth, answers.predictions[rows], labels=np.unique(truth), average="macro", zero_division=0
            )
        )

    for name, figure in (
        ("macro_f1", macro_f1),
        ("log_loss", lambda rows: float(losses[rows].mean())),
        ("expected_calibration_error", lambda rows: _calibration_error(answers, rows)),
    ):
        if count > 1:
            drawn = scipy.stats.bootstrap(
                (np.arange(count),), figure, n_resamples=_RESAMPLES, vectorized=False, method="percentile", rng=0
            ).confidence_interval
            found[name] = [float(drawn.low), float(drawn.high)]
    return found


def by_class(answers: Answers) -> list[dict[str, Any]]:
    """Of each class `name`, `support` (its images), `predicted` (answers), `precision`, `recall` (its accuracy) and
    `f1`, and against all others `roc_auc` and `average_precision`.

    None where there is no such figure: `precision` of a class that was never predicted, `roc_auc` where it has no
    images or no others, the rest where it has no images.
    """
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
    """Of each class that has images, and others have: true positive rate (`y`) by false positive rate (`x`)."""

    def curve(mine: npt.NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
        x, y, _ = sklearn.metrics.roc_curve(mine, scores)
        return x, y

    return _curves(answers, curve, lambda x, places: np.searchsorted(x, places + _TINY_STEP, side="right") - 1)


def precision_recall_curves(answers: Answers) -> dict[int, Curve]:
    """Of each class that has images, and others have: precision (`y`) by recall (`x`)."""

    def curve(mine: npt.NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
        precision, recall, _ = sklearn.metrics.precision_recall_curve(mine, scores, drop_intermediate=True)
        return recall[::-1], precision[::-1]

    return _curves(answers, curve, lambda x, places: np.searchsorted(x, places - _TINY_STEP))


def macro_curve(curves: dict[int, Curve]) -> Curve:
    """The mean of curves."""
    return {"x": next(iter(curves.values()))["x"], "y": np.mean([one["y"] for one in curves.values()], 0).tolist()}


def _curves(
    answers: Answers, curve: Callable[..., tuple[Floats, Floats]], highest: Callable[[Floats, Floats], Any]
) -> dict[int, Curve]:
    """Curves at the same places of x, evenly spaced; `highest` finds the point of a step there."""
    there = np.unique(answers.targets).tolist()
    places = np.linspace(0, 1, _CURVE_POINTS + 1)
    found = {}
    for index in there if len(there) > 1 else []:
        x, y = curve(answers.targets == index, answers.probabilities[:, index])
        found[index] = {"x": places.tolist(), "y": np.asarray(y)[highest(x, places)].tolist()}
    return found


# -- confidence -----------------------------------------------------------------------------------------------


def reliability(answers: Answers) -> list[dict[str, float]]:
    """Answers by confidence, in bins: `low` and `high` bounds, `images`, mean `confidence`, and `accuracy`; bins
    without images are left out."""
    edges, places = np.linspace(0, 1, BINS + 1), _bins(answers)
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
    return _calibration_error(answers, np.arange(len(answers.targets)))


def _calibration_error(answers: Answers, rows: Integers) -> float:
    gaps = (answers.correct.astype(np.float64) - answers.confidences)[rows]
    return float(np.abs(np.bincount(_bins(answers)[rows], gaps, BINS)).sum() / len(rows))


def _bins(answers: Answers) -> Integers:
    """int64 (N,), which bin each answer's confidence is in."""
    edges = np.linspace(0, 1, BINS + 1)
    return np.asarray(np.digitize(answers.confidences, edges[1:-1], right=True), np.int64)


def fitted_temperature(answers: Answers) -> float:
    """The temperature that makes the log loss smallest (Guo et al., 2017, section 4.2), from `COLDEST` to `WARMEST`,
    on at most 20,000 of the answers.

    Where `answers` have a temperature already, this one is to be multiplied with it.
    """
    if len(answers.targets) > _MOST_FITTED:
        answers = answers.some(np.random.default_rng(0).permutation(len(answers.targets))[:_MOST_FITTED])
    logits = np.log(np.maximum(answers.probabilities, _TINY))
    mine = np.take_along_axis(logits, answers.targets[:, None], 1)[:, 0]

    def loss(log_temperature: float) -> float:
        cold = np.exp(-log_temperature)
        return float((scipy.special.logsumexp(logits * cold, axis=1) - mine * cold).mean())

    found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(WARMEST)), method="bounded")
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
            temperature = fitted_temperature(answers.some(other))
            probabilities[mine] = tempered(answers.some(mine), temperature).probabilities
    return Answers(answers.class_names, answers.targets, probabilities)


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
