"""What a finished run tells: counts, errors by reason, classes beside those of training, confidences."""

import csv
import io
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.images import storage
from cnnray.models.bundle import BundleInfo

log = logging.getLogger(__name__)

_EXAMPLES = 3
DRIFT = 0.25
"""Population stability index from which on two distributions are called different; from 0.1 on they have shifted."""


@dataclass
class Tally:
    """Adds up parts."""

    threshold: float
    """Of the confidence."""
    rows: int = 0
    below_threshold: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, rows: pa.Table) -> None:
        """Count rows that have at least `id`, `uri`, `error`, `prediction` and `confidence`."""
        self.rows += len(rows)
        good = rows.filter(pc.is_null(rows["error"]))
        self.below_threshold += pc.sum(pc.less(good["confidence"], self.threshold)).as_py() or 0
        for one in pc.value_counts(good["prediction"]).to_pylist():
            self.classes[one["values"]] += one["counts"]
        for row in rows.filter(pc.is_valid(rows["error"])).select(["id", "uri", "error"]).to_pylist():
            reason = row["error"].partition(":")[0]
            self.reasons[reason] += 1
            if len(self.examples.setdefault(reason, [])) < _EXAMPLES:
                self.examples[reason].append(row)

    @property
    def errors(self) -> int:
        """Rows without a prediction."""
        return self.reasons.total()

    @property
    def ok(self) -> int:
        """Rows with a prediction."""
        return self.rows - self.errors


def population_stability_index(found: dict[str, int], expected: dict[str, int]) -> float | None:
    """How far two distributions over classes are apart.

    The sum over classes of (p - q) ln(p / q), with p and q the shares in `found` and `expected`; half an image is
    added to each count, so that a class without images does not make it infinite. (Siddiqi, Credit Risk Scorecards,
    2006, whose rule of thumb it is that below 0.1 nothing has changed, and from 0.25 on much has.)

    Returns:
        None where one of the two has no images.
    """
    names = sorted(set(found) | set(expected))
    p, q = (np.asarray([counts.get(name, 0) for name in names], np.float64) for counts in (found, expected))
    if not p.sum() or not q.sum():
        return None
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (p, q))
    return float(((p - q) * np.log(p / q)).sum())


def summary_of(tally: Tally, info: BundleInfo) -> dict[str, Any]:
    """What `summary.json` holds of the rows."""
    trained = info.class_counts
    classes = {
        name: {
            "images": tally.classes[name],
            "share": round(tally.classes[name] / max(tally.ok, 1), 6),
            "training_share": round(trained.get(name, 0) / sum(trained.values()), 6) if trained else None,
        }
        for name in info.class_names
    }
    drift = population_stability_index(dict(tally.classes), trained)
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
        "population_stability_index": None if drift is None else round(drift, 4),
    }


def log_summary(found: dict[str, Any], most: int = 10) -> None:
    """Log a summary in a person's words."""
    log.info("%d images: %d classified, %d without a prediction", found["rows"], found["ok"], found["errors"])
    for reason, errors in found["errors_by_reason"].items():
        log.info("  %s: %d, %s for one", reason, errors["images"], errors["examples"][0]["uri"])
    ordered = sorted(found["classes"].items(), key=lambda item: -item[1]["images"])
    for name, one in ordered[:most]:
        beside = "" if one["training_share"] is None else f"  (in training {one['training_share']:.1%})"
        log.info("  %s: %d, %.1f%%%s", name, one["images"], 100 * one["share"], beside)
    if len(ordered) > most:
        log.info("  and %d classes more", len(ordered) - most)
    log.info("below a confidence of %g: %.1f%%", found["threshold"], 100 * found["below_threshold"])
    drift = found["population_stability_index"]
    if drift is not None and drift >= DRIFT:
        log.warning(
            "The classes are distributed otherwise than in training (population stability index %.2f, much from %g "
            "on): these may be other images than the network was trained for.",
            drift, DRIFT,
        )  # fmt: skip


class ErrorList:
    """Gathers the rows without a prediction for `errors.csv`."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._writer = csv.writer(self._text)
        self._writer.writerow(["id", "uri", "error"])

    def add(self, rows: pa.Table) -> None:
        """Take those of these rows that have none."""
        bad = rows.filter(pc.is_valid(rows["error"]))
        self._writer.writerows(zip(*(bad[name].to_pylist() for name in ("id", "uri", "error")), strict=True))

    def write(self, uri: str) -> None:
        """Write the file, whole or not at all."""
        storage.write_bytes(uri, self._text.getvalue().encode())
