"""The rows of an evaluation's prediction runs, and what they say of an engine."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.evaluation import metrics
from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.label_metrics import LabelPredictions
from cnnray.evaluation.metrics import Integers, Predictions
from cnnray.images import labels
from cnnray.models.answers import Probabilities, find_unusable
from cnnray.models.bundle import Bundle
from cnnray.prediction import earlier as earlier_versions
from cnnray.prediction import parts as prediction_parts

_COLUMNS = ("id", "uri", "label", "prediction", "confidence", "top_k_labels", "top_k_scores", "error")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an engine gave for N labelled images."""

    engine: str
    ids: Integers
    """int64 (N,), of the images in the manifest of the evaluation."""
    probabilities: Probabilities
    """float32 (N, classes)."""
    targets: Integers
    """int64 (N,), the true classes."""


def read_rows(folder: str, *, multi_label: bool = False) -> tuple[pa.Table, Any]:
    """Read the rows of a prediction run.

    Returns:
        the rows with `_COLUMNS`, with several labels also `labels` and `scores`, and the probabilities of those
        without an error, float32 (N, classes).
    """
    tables, probabilities = [], []
    columns = [*_COLUMNS, *(("labels", "scores") if multi_label else ())]
    current = (prediction_parts.read_all(folder, part) for part in prediction_parts.list_parts(folder))
    for part in itertools.chain(current, earlier_versions.read_parts(folder)):
        tables.append(part.select(columns))
        good = part["probabilities"].combine_chunks().drop_null()
        if len(good):
            probabilities.append(good.flatten().to_numpy(zero_copy_only=False).reshape(len(good), -1))
    return pa.concat_tables(tables), np.concatenate(probabilities) if probabilities else np.zeros((0, 1), np.float32)


def without_errors(rows: pa.Table) -> pa.Table:
    """The rows of images with a prediction.

    Raises:
        EvaluationError: all images have errors.
    """
    good = rows.filter(pc.is_null(rows["error"]))
    if not len(good):
        raise EvaluationError(
            f"None of the {len(rows)} images has a prediction; the first error: {rows['error'][0]}."
        )
    return good


def make_label_predictions(rows: pa.Table, probabilities: Any, bundle: Bundle) -> LabelPredictions:
    """Of a bundle with several labels.

    Raises:
        EvaluationError: all images have errors.
    """
    assert bundle.info.thresholds is not None
    names = bundle.info.class_names
    truth = labels.multi_hot(without_errors(rows)["label"], names) > 0
    return LabelPredictions(names, truth, probabilities.astype(np.float64), bundle.info.thresholds)


def make_predictions(rows: pa.Table, probabilities: Any, bundle: Bundle) -> Predictions:
    """
    Raises:
        EvaluationError: all images have errors, or an earlier version of cnnray wrote predictions without
            probabilities.
    """
    names, good = bundle.info.class_names, without_errors(rows)
    if unusable := find_unusable(probabilities):
        error = next(iter(unusable.values()))
        raise EvaluationError(
            f"{len(unusable)} of {len(good)} predictions of an earlier version of cnnray are none ({error}): give "
            "--overwrite."
        )
    targets = pc.index_in(good["label"], pa.array(names, pa.string())).to_numpy().astype(np.int64)
    return Predictions(names, targets, metrics.normalise(probabilities))


def measured(engine: str, rows: pa.Table, probabilities: Any, predictions: Predictions) -> Measured:
    """What an engine gave, from the rows of its prediction run."""
    ids = rows.filter(pc.is_null(rows["error"]))["id"].to_numpy()
    return Measured(engine=engine, ids=ids, probabilities=probabilities, targets=predictions.targets)
