"""The summary of a run: counts, errors by reason, predicted classes against the training classes, confidences."""

import logging
from typing import Any

import numpy as np

from cnnray.models import drift
from cnnray.models.bundle import BundleInfo
from cnnray.prediction.tally import Tally

log = logging.getLogger(__name__)


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


def class_drift(tally: Tally, info: BundleInfo) -> dict[str, Any] | None:
    """See `drift.compare`: the most probable classes beside those of the validation images, or, where the bundle does
    not say enough of them, beside the labels of the training images."""
    expected, found = info.class_counts, tally.most_probable
    if found is None:
        return None
    reference = drift.Distribution.from_dict(info.reference, len(info.class_names))
    if reference and reference.images >= drift.LEAST_IMAGES:
        expected = dict(zip(info.class_names, reference.classes.tolist(), strict=True))
    names = sorted(found.keys() | expected.keys())
    counts, others = (np.asarray([of.get(name, 0) for name in names], np.int64) for of in (found, expected))
    return drift.compare(counts, others)


def summarize(tally: Tally, info: BundleInfo) -> dict[str, Any]:
    """The part of `summary.json` that describes the rows. With several labels, `classes` counts the images that have
    each, and there are no figures of one answer for each image."""
    training_counts, several = info.class_counts, info.is_multi_label
    trained = info.training_images if several else sum(training_counts.values())
    classes = {
        name: {
            "images": tally.classes[name],
            "share": round(tally.classes[name] / max(tally.ok, 1), 6),
            "training_share": (round(training_counts.get(name, 0) / trained, 6) if trained else None),
        }
        for name in info.class_names
    }
    found = None if several else tally.most_probable
    stability = None if found is None else population_stability_index(dict(found), training_counts)
    return {
        "rows": tally.rows,
        "ok": tally.ok,
        **({"unsure": tally.unsure.total()} if info.decision else {}),
        "errors": tally.errors,
        "errors_by_reason": {
            reason: {"images": count, "examples": tally.examples[reason]}
            for reason, count in tally.reasons.most_common()
        },
        **({} if several else _confidences(tally)),
        "classes": classes,
        "population_stability_index": None if stability is None else round(stability, 4),
        "drift": None if several else class_drift(tally, info),
    }


def _confidences(tally: Tally) -> dict[str, float]:
    return {
        "threshold": tally.threshold,
        "below_threshold": round(tally.below_threshold / max(tally.ok, 1), 6),
    }


def log_summary(summary: dict[str, Any], max_classes: int = 10) -> None:
    """Log what `summarize` returned, in sentences, with the most frequent classes."""
    unsure = f", {summary['unsure']} unsure" if "unsure" in summary else ""
    log.info(
        "%d images: %d classified%s, %d without a prediction",
        summary["rows"],
        summary["ok"],
        unsure,
        summary["errors"],
    )
    for reason, errors in summary["errors_by_reason"].items():
        log.info("  %s: %d, for example %s", reason, errors["images"], errors["examples"][0]["uri"])
    classes = sorted(summary["classes"].items(), key=lambda item: -item[1]["images"])
    for name, counts in classes[:max_classes]:
        training = "" if counts["training_share"] is None else f"  (in training {counts['training_share']:.1%})"
        log.info("  %s: %d, %.1f%%%s", name, counts["images"], 100 * counts["share"], training)
    if len(classes) > max_classes:
        log.info("  and %d more classes", len(classes) - max_classes)
    if "threshold" in summary:
        log.info("confidence below %g: %.1f%%", summary["threshold"], 100 * summary["below_threshold"])
    found = summary["drift"]
    if found is not None and found["warning"]:
        log.warning(
            "The predicted classes are distributed differently than in training (chi-square test: p = %.1g, effect "
            "size %.2f, where %g is large): check that these are the kind of images that the network was trained on.",
            found["p_value"], found["effect_size"], drift.LARGE_EFFECT,
        )  # fmt: skip
