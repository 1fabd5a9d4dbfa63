"""What averaging over networks and views costs, and what it gains."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.evaluation import label_metrics, paired
from cnnray.evaluation.config import PREDICTIONS, EvaluateConfig
from cnnray.evaluation.rows import make_label_predictions, read_rows, without_errors
from cnnray.models.bundle import Bundle
from cnnray.models.runtimes import Probabilities
from cnnray.prediction.job import run as predict

ALONE = f"{PREDICTIONS}-alone"
"""Folder of the prediction run of the first network alone, in the output of the evaluation."""
_MANY = 1000
"""Images from which on rates are compared: with fewer, what a run needs to start is most of them."""


@dataclass(frozen=True)
class Run:
    """A prediction run."""

    rows: pa.Table
    """Of the images, with `id`, `label`, `prediction` and `error`."""
    probabilities: Probabilities
    """float32 (N, classes), of those without an error."""
    rate: float
    """Images per second, with reading and decoding."""


def predict_alone(config: EvaluateConfig, manifest: str, engine: str, *, multi_label: bool) -> Run:
    """Classify the images of an evaluation with the first network alone, by the same engine."""
    run = config.predict_config(manifest, engine=engine, folder=ALONE)
    rate = predict(run, withholds=False)["images_per_second"]
    return Run(*read_rows(run.output, multi_label=multi_label), rate)


def measure(config: EvaluateConfig, bundle: Bundle, averaged: Run, alone: Run) -> dict[str, Any]:
    """Compare the averaged network with the first of its networks alone.

    Raises:
        EvaluationError: all images have errors.

    Returns:
        `members`, the number of networks; `views`; `metric`, accuracy or mean average precision, its `value`, that of
        the first network `alone`, and the `gain`; of the accuracy, over the images that both have a prediction for,
        `gain_interval`, of 95 % (Tango's), else None; and `times_slower`, the ratio of the rates, None for less than
        a thousand images.
    """
    interval = None
    if bundle.info.is_multi_label:
        metric = "mean average precision"
        value, before = (_mean_average_precision(run, bundle) for run in (averaged, alone))
    else:
        metric, both = "accuracy", _good(averaged).join(_good(alone), "id", right_suffix=" alone", join_type="inner")
        right, right_alone = (
            pc.equal(both["label"], both[name]).to_numpy() for name in ("prediction", "prediction alone")
        )
        value, before = float(right.mean()), float(right_alone.mean())
        only, only_alone = int(np.sum(right & ~right_alone)), int(np.sum(~right & right_alone))
        interval = paired.difference_interval(only, only_alone, len(both))
    is_comparable = len(averaged.rows) >= _MANY and averaged.rate and alone.rate
    return {
        "members": 1 + len(config.ensemble),
        "views": config.tta,
        "metric": metric,
        "value": value,
        "alone": before,
        "gain": value - before,
        "gain_interval": interval,
        "times_slower": alone.rate / averaged.rate if is_comparable else None,
    }


def _mean_average_precision(run: Run, bundle: Bundle) -> float:
    found = make_label_predictions(run.rows, run.probabilities, bundle)
    return float(label_metrics.overall_metrics(found)["mean_average_precision"])


def _good(run: Run) -> pa.Table:
    return without_errors(run.rows).select(["id", "label", "prediction"])
