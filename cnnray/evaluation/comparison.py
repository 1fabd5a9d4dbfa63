"""Two evaluations of the same images beside one another."""

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
    """An evaluation that cannot be made, or a gate that was not passed; the message is one sentence for the user."""


@dataclass(frozen=True)
class Other:
    """An earlier evaluation."""

    uri: str
    """Of its metrics.json."""
    figures: dict[str, Any]
    """What that holds."""
    model: str
    """The version of the bundle."""
    right: dict[str, bool]
    """Of each image that has an answer, by uri, whether it is right."""


def read(uri: str) -> Other:
    """Read another evaluation.

    Args:
        uri: of its metrics.json, beside which its predictions.parquet is.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        figures = json.loads(storage.read_bytes(uri))
        data = storage.read_bytes(storage.join(uri.rpartition("/")[0], ROWS))
        rows = pyarrow.parquet.read_table(pa.BufferReader(data))
        return Other(uri, figures, figures["model"], _right(rows))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise EvaluationError(f"--compare {uri} is no metrics.json of an evaluation: {error}.") from None


def of(rows: pa.Table, figures: dict[str, Any], other: Other) -> dict[str, Any]:
    """What `metrics.json` says of the comparison.

    Returns:
        `other`, its `model`, `images` of both, `only_this_has` and `only_other_has` (images), on those of both
        `accuracy` and `other_accuracy` (None where there are none) and `mcnemar` (see `metrics`), and by name the
        `figures` of each on all of its own images.
    """
    mine = _right(rows)
    both = [uri for uri in mine if uri in other.right]
    this, that = (np.asarray([right[uri] for uri in both], np.bool_) for right in (mine, other.right))
    names = [
        name
        for name, value in figures.items()
        if isinstance(value, float) and isinstance(other.figures.get(name), float) and name != "wanted_accuracy"
    ]
    return {
        "other": other.uri,
        "model": other.model,
        "images": len(both),
        "only_this_has": len(mine) - len(both),
        "only_other_has": len(other.right) - len(both),
        "accuracy": float(this.mean()) if both else None,
        "other_accuracy": float(that.mean()) if both else None,
        "mcnemar": metrics.mcnemar(this, that),
        "figures": {name: [figures[name], other.figures[name]] for name in names},
    }


def gate(found: dict[str, Any], max_drop: float) -> None:
    """
    Args:
        found: what `of` gave.
        max_drop: how much lower the accuracy may be.

    Raises:
        EvaluationError: it is lower still, or no image is in both.
    """
    if not found["images"]:
        raise EvaluationError(f"--compare {found['other']} is of other images: none is in both.")
    if found["only_this_has"] or found["only_other_has"]:
        log.warning(
            "%d images have an answer only here, and %d only in %s; those of both are compared",
            found["only_this_has"], found["only_other_has"], found["other"],
        )  # fmt: skip
    log.info(
        "accuracy on the %d images of both: %.4f, there %.4f (McNemar's p %.2g)",
        found["images"], found["accuracy"], found["other_accuracy"], found["mcnemar"]["p_value"],
    )  # fmt: skip
    drop = found["other_accuracy"] - found["accuracy"]
    if drop > max_drop + 1e-12:
        raise EvaluationError(
            f"Accuracy fell by {drop:.4f} against {found['other']}, more than --max-drop {max_drop:g}."
        )


def _right(rows: pa.Table) -> dict[str, bool]:
    good = rows.filter(pc.is_null(rows["error"]))
    hits = pc.equal(good["prediction"], good["label"]).to_pylist()
    return dict(zip(good["uri"].to_pylist(), hits, strict=True))
