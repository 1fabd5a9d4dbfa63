"""The summary of a run: counts, errors by reason, predicted classes against the training classes, confidences."""

import logging
from typing import Any

import numpy as np

from cnnray.models.bundle import BundleInfo
from cnnray.prediction.tally import Tally

log = logging.getLogger(__name__)

DRIFT_IMAGES = 100
"""Predictions below which their classes are not compared with those of training."""
DRIFT_EFFECT = 0.5
"""Effect size below which there is no drift warning, however many images show it: "large" in Cohen's table."""
DRIFT_FALSE_ALARMS = 0.001
"""Largest share of runs over undrifted images that get a drift warning."""
_MIN_EXPECTED = 5
"""Expected images of each class from which chi-square's distribution holds (Cochran, The chi-square test of goodness
of fit, 1952)."""
_MAX_IMAGES = 10_000_000
"""Images of a row of a table of which random tables are made; larger rows are scaled to it."""


def population_stability_index(actual: dict[str, int], expected: dict[str, int]) -> float | None:
    """The distance between two distributions over classes.

    It is the sum over classes of (p - q) ln(p / q), where p and q are the shares in `actual` and `expected`. Half an
    image is added to each count, so that classes without images keep it finite. The rule of thumb in Siddiqi, Credit
    Risk Scorecards, 2006: no change below 0.1, a shift from 0.1, a large change from 0.25.

    Args:
        actual: images by class.
        expected: images by class.

    Returns:
        None if one of the two has no images.
    """
    names = sorted(set(actual) | set(expected))
    p, q = (np.asarray([counts.get(name, 0) for name in names], np.float64) for counts in (actual, expected))
    if not p.sum() or not q.sum():
        return None
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (p, q))
    return float(((p - q) * np.log(p / q)).sum())


def class_drift(actual: dict[str, int], expected: dict[str, int]) -> dict[str, Any] | None:
    """Test whether predicted classes are distributed as the classes of training.

    The effect size is Cohen's w: the root of the sum over classes of (p - q)^2 / r, where p and q are the shares in
    `actual` and `expected`, and r those of both together, less what chance adds to that sum on average. Cohen
    (Statistical Power Analysis for the Behavioral Sciences, 1988) calls 0.1 small, 0.3 medium and 0.5 large. The
    squares are close to the population stability index: its thresholds, 0.1 and 0.25, are 0.32 and 0.5 here.

    The test is Pearson's chi-square test of homogeneity (SciPy's), which takes both numbers of images into account.
    Where few images of a class are expected, the p-value is exact for any numbers of images: it is the rank of the
    chi-square among those of 999 random tables with the same totals.

    A network whose mistakes favour some classes differs from its training images without any drift. That is why a
    significant difference alone gives no warning.

    Args:
        actual: predictions by class.
        expected: training images by class.

    Returns:
        `effect_size`; `p_value`, None where the effect is below `DRIFT_EFFECT`; and `warning`, whether the effect is
        at least that, and p at most `DRIFT_FALSE_ALARMS`. None for less than `DRIFT_IMAGES` predictions, and where
        there are no training images or only one class.
    """
    names = [name for name in actual.keys() | expected.keys() if actual.get(name, 0) + expected.get(name, 0)]
    table = np.asarray([[counts.get(name, 0) for name in sorted(names)] for counts in (actual, expected)], np.int64)
    predicted, trained = table.sum(1).tolist()
    if predicted < DRIFT_IMAGES or not trained or len(names) < 2:
        return None
    import scipy.stats  # takes a second

    test = scipy.stats.chi2_contingency(table, correction=False)
    effect = float(np.sqrt(max(test.statistic - test.dof, 0) * (1 / predicted + 1 / trained)))
    if effect < DRIFT_EFFECT:
        return {"effect_size": effect, "p_value": None, "warning": False}
    if test.expected_freq.min() < _MIN_EXPECTED:
        tables = round(1 / DRIFT_FALSE_ALARMS) - 1  # the smallest number that can give this p-value
        # The same counts give the same p-value, but a fixed seed would give all runs the same random error.
        rng = np.random.default_rng(table.ravel())
        method = scipy.stats.MonteCarloMethod(n_resamples=tables, batch=64, rng=rng)
        # SciPy's random tables take long for more images, and crash from 2^31 on; fewer images only make p larger.
        table = (table * np.minimum(1, _MAX_IMAGES / table.sum(1, keepdims=True))).astype(np.int64)
        table = table[:, table.any(0)]
        test = scipy.stats.chi2_contingency(table, correction=False, method=method)
    p = float(test.pvalue)
    return {"effect_size": effect, "p_value": p, "warning": p <= DRIFT_FALSE_ALARMS}


def summarize(tally: Tally, info: BundleInfo) -> dict[str, Any]:
    """The part of `summary.json` that describes the rows."""
    training_counts = info.class_counts
    classes = {
        name: {
            "images": tally.classes[name],
            "share": round(tally.classes[name] / max(tally.ok, 1), 6),
            "training_share": (
                round(training_counts.get(name, 0) / sum(training_counts.values()), 6) if training_counts else None
            ),
        }
        for name in info.class_names
    }
    stability = population_stability_index(dict(tally.classes), training_counts)
    return {
        "rows": tally.rows,
        "ok": tally.ok,
        "errors": tally.errors,
        "errors_by_reason": {
            reason: {"images": count, "examples": tally.examples[reason]}
            for reason, count in tally.reasons.most_common()
        },
        "threshold": tally.threshold,
        "below_threshold": round(tally.below_threshold / max(tally.ok, 1), 6),
        "classes": classes,
        "population_stability_index": None if stability is None else round(stability, 4),
        "drift": class_drift(dict(tally.classes), training_counts),
    }


def log_summary(summary: dict[str, Any], max_classes: int = 10) -> None:
    """Log what `summarize` returned, in sentences, with the most frequent classes."""
    log.info("%d images: %d classified, %d without a prediction", summary["rows"], summary["ok"], summary["errors"])
    for reason, errors in summary["errors_by_reason"].items():
        log.info("  %s: %d, for example %s", reason, errors["images"], errors["examples"][0]["uri"])
    classes = sorted(summary["classes"].items(), key=lambda item: -item[1]["images"])
    for name, counts in classes[:max_classes]:
        training = "" if counts["training_share"] is None else f"  (in training {counts['training_share']:.1%})"
        log.info("  %s: %d, %.1f%%%s", name, counts["images"], 100 * counts["share"], training)
    if len(classes) > max_classes:
        log.info("  and %d more classes", len(classes) - max_classes)
    log.info("confidence below %g: %.1f%%", summary["threshold"], 100 * summary["below_threshold"])
    drift = summary["drift"]
    if drift is not None and drift["warning"]:
        log.warning(
            "The predicted classes are distributed differently than in training (chi-square test: p = %.1g, effect "
            "size %.2f, where %g is large): check that these are the kind of images that the network was trained on.",
            drift["p_value"], drift["effect_size"], DRIFT_EFFECT,
        )  # fmt: skip
