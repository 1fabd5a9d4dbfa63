"""Compares two evaluations of the same images."""

import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cnnray.errors import PermanentError
from cnnray.evaluation import metrics
from cnnray.images import storage

log = logging.getLogger(__name__)

ROWS = "predictions.parquet"


class EvaluationError(PermanentError, RuntimeError):
    """An evaluation that failed, or an accuracy that fell too far; the message is one sentence for the user."""


@dataclass(frozen=True)
class OtherEvaluation:
    """An earlier evaluation to compare with."""

    uri: str
    """Uri of its metrics.json."""
    results: dict[str, Any]
    """Content of its metrics.json."""
    model: str
    """`Bundle.version` of its network."""
    correct: dict[str, bool]
    """For each image with a prediction, by uri, whether the prediction is correct."""


def read_evaluation(uri: str) -> OtherEvaluation:
    """Read an earlier evaluation.

    Args:
        uri: uri of its metrics.json; its predictions.parquet lies in the same folder.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        results = json.loads(storage.read_bytes(uri))
        data = storage.read_bytes(storage.join(uri.rpartition("/")[0], ROWS))
        rows = pyarrow.parquet.read_table(pa.BufferReader(data))
        return OtherEvaluation(uri, results, results["model"], _correct_by_uri(rows))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise EvaluationError(f"--compare {uri} is no metrics.json of an evaluation: {error}.") from None


def compare(rows: pa.Table, results: dict[str, Any], other: OtherEvaluation) -> dict[str, Any]:
    """The section `comparison` of `metrics.json`.

    Args:
        rows: the rows of this evaluation, with `uri`, `label`, `prediction` and `error`.
        results: content of this evaluation's metrics.json.
        other: the evaluation to compare with.

    Returns:
        `other` (uri) and its `model`; `images`, the number of images with a prediction in both; `only_this_has` and
        `only_other_has`, the numbers of images with a prediction in one only; for the images in both `accuracy` and
        `other_accuracy` (None if there are none) and `mcnemar` (see `metrics`); and by name the `figures` of both,
        each on all of its own images.
    """
    this_correct = _correct_by_uri(rows)
    shared = [uri for uri in this_correct if uri in other.correct]
    this, that = (np.asarray([correct[uri] for uri in shared], np.bool_) for correct in (this_correct, other.correct))
    names = [
        name
        for name, value in results.items()
        if isinstance(value, float) and isinstance(other.results.get(name), float) and name != "wanted_accuracy"
    ]
    return {
        "other": other.uri,
        "model": other.model,
        "images": len(shared),
        "only_this_has": len(this_correct) - len(shared),
        "only_other_has": len(other.correct) - len(shared),
        "accuracy": float(this.mean()) if shared else None,
        "other_accuracy": float(that.mean()) if shared else None,
        "mcnemar": metrics.mcnemar(this, that),
        "figures": {name: [results[name], other.results[name]] for name in names},
    }


def check_accuracy(comparison: dict[str, Any], max_drop: float) -> None:
    """Check that this evaluation is not worse than the other.

    Args:
        comparison: what `compare` returned.
        max_drop: accepted loss of accuracy.

    Raises:
        EvaluationError: the loss of accuracy is larger, or the evaluations have no image in common.
    """
    if not comparison["images"]:
        raise EvaluationError(f"--compare {comparison['other']} is of other images: no image is in both.")
    if comparison["only_this_has"] or comparison["only_other_has"]:
        log.warning(
            "%d images have a prediction only here, and %d only in %s; the comparison leaves them out",
            comparison["only_this_has"], comparison["only_other_has"], comparison["other"],
        )  # fmt: skip
    log.info(
        "accuracy on the %d images of both: %.4f here, %.4f there (p-value of McNemar's test %.2g)",
        comparison["images"], comparison["accuracy"], comparison["other_accuracy"], comparison["mcnemar"]["p_value"],
    )  # fmt: skip
    drop = comparison["other_accuracy"] - comparison["accuracy"]
    if drop > max_drop + 1e-12:
        raise EvaluationError(
            f"Accuracy fell by {drop:.4f} against {comparison['other']}, more than --max-drop {max_drop:g}."
        )


def _correct_by_uri(rows: pa.Table) -> dict[str, bool]:
    """Whether the prediction is correct, by uri of the images that have one."""
    good = rows.filter(pc.is_null(rows["error"]))
    correct = pc.equal(good["prediction"], good["label"]).to_pylist()
    return dict(zip(good["uri"].to_pylist(), correct, strict=True))
