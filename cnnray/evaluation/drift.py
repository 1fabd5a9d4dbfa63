"""Drift of a service's answers, from the request log of `jobs/serve.py --log-requests`, window by window.

The reference is what the network answered to its validation images, which the bundle says, or to those of `--data`.
With labels that came later, accuracy by window; where the log keeps images and `--data` is given, drift of
embeddings.
"""

import io
import json
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet

from cnnray import configs
from cnnray.evaluation import drift_report, request_logs
from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.job import select_split
from cnnray.evaluation.metrics import wilson_interval
from cnnray.evaluation.request_logs import Window
from cnnray.images import manifest as manifests
from cnnray.images import storage
from cnnray.images.lease import lease
from cnnray.models.bundle import Bundle
from cnnray.models.drift import LEAST_IMAGES, Distribution
from cnnray.prediction import parts as prediction_parts
from cnnray.prediction.job import run as predict

log = logging.getLogger(__name__)

RESULTS, REPORT = "drift.json", "drift.html"
_REFERENCE, _SAMPLE = "reference.parquet", "sample.parquet"
_MOST_REFERENCES = 10_000
"""Images of `--data` that are predicted."""
_MOST_IMAGES = 500
"""Images of a window whose embeddings are computed, and four times as many of the reference."""
_FOLDS = 5


def measure_drift(config: EvaluateConfig) -> dict[str, Any]:
    """Compare the request log `config.drift` with a reference. Writes `drift.json` and `drift.html` to
    `config.output`.

    Returns:
        `images`, `windows`, `drifted` (windows whose classes, confidences or embeddings have a warning), `accuracy`
        (of the images with labels, else null), `report` (its uri) and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PredictionError, EvaluationError: with a sentence for the user.
    """
    started = time.monotonic()
    assert config.bundle is not None
    assert config.output is not None
    assert config.drift is not None
    with lease(config.output):
        bundle = Bundle.load(config.bundle)
        if bundle.info.is_multi_label:
            raise EvaluationError(f"--drift is for bundles of one label for each image: {bundle.uri} has several.")
        labels = request_logs.read_labels(config.labels) if config.labels else None
        windows, others = request_logs.read_log(config.drift, bundle, config.window_hours * 3600, labels)
        reference = Distribution.from_dict(bundle.info.reference, len(bundle.info.class_names))
        if config.data is None and (reference is None or not reference.images):
            raise EvaluationError(
                f"{bundle.uri} does not say what it answered to its validation images, as it averages networks or is "
                "of an earlier version: give labelled images as the reference by --data, such as the training's "
                "manifest.parquet."
            )
        embeddings: dict[float, dict[str, float]] = {}
        if config.data is not None:
            reference, embeddings = _predict_reference(config, bundle, windows)
        assert reference is not None
        guaranteed = bundle.info.decision.precision if bundle.info.decision else None
        results: dict[str, Any] = {
            "bundle": bundle.uri, "model": bundle.version, "log": config.drift, "reference": config.data or "bundle",
            "hours": config.window_hours, "config": configs.as_dict(config), "class_names": bundle.info.class_names,
            "reference_answers": reference.as_dict(), "other_versions": others,
            "windows": [
                _measure(window, reference, embeddings.get(window.start), guaranteed) for window in windows
            ],
        }  # fmt: skip
        storage.write_bytes(storage.join(config.output, RESULTS), (json.dumps(results) + "\n").encode())
        storage.write_bytes(storage.join(config.output, REPORT), drift_report.render(results).encode())
    _log_results(results)
    labelled = sum(window.labelled for window in windows)
    return {
        "images": sum(window.answers.images for window in windows),
        "windows": len(windows),
        "drifted": sum(bool(window["drifted"]) for window in results["windows"]),
        "accuracy": sum(window.correct for window in windows) / labelled if labelled else None,
        "report": storage.join(config.output, REPORT),
        "seconds": round(time.monotonic() - started, 2),
    }


# -- the reference by prediction ------------------------------------------------------------------------------


def _predict_reference(
    config: EvaluateConfig, bundle: Bundle, windows: list[Window]
) -> tuple[Distribution, dict[float, dict[str, float]]]:
    """Predict `config.data`, and the images that the log keeps.

    Returns:
        The answers to the data; and by start of a window how well its embeddings can be told from those of the data,
        see `_tell_apart`; empty where the log keeps no images.
    """
    assert config.output is not None
    seconds = config.window_hours * 3600
    keeps = any(window.files for window in windows)
    options: dict[str, Any] = {"engine": "keras", "embeddings": True} if keeps else {}
    answers, of_reference = _predict(config, _write_reference(config), "reference", options)
    reference = Distribution.of(answers.argmax(1), answers.max(1), answers.shape[1])
    if not keeps:
        return reference, {}
    chosen = np.random.default_rng(0).permutation(len(of_reference))[: 4 * _MOST_IMAGES]
    embeddings = {}
    for window in windows:
        sample = request_logs.sample_images(window, bundle, seconds, _MOST_IMAGES)
        if sample is not None and min(len(sample), len(chosen)) >= LEAST_IMAGES:
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(sample, buffer)
            storage.write_bytes(uri := storage.join(config.output, _SAMPLE), buffer.getvalue())
            _, of_window = _predict(config, uri, "sample", options)
            embeddings[window.start] = _tell_apart(of_reference[chosen], of_window)
    return reference, embeddings


def _write_reference(config: EvaluateConfig) -> str:
    """Write a manifest of the images of `config.data`, or of a part of them, to the output; give its uri."""
    assert config.data is not None
    assert config.output is not None
    try:
        everything = manifests.build_manifest(config.data, labelled=True)  # folders are classes, and splits
    except manifests.ManifestError:
        everything = manifests.build_manifest(config.data, labelled=False)
    _, manifest = select_split(everything, config)
    chosen = np.sort(np.random.default_rng(0).permutation(len(manifest))[:_MOST_REFERENCES])
    manifests.write(manifest.select(["uri"]).take(chosen), uri := storage.join(config.output, _REFERENCE))
    return uri


def _predict(
    config: EvaluateConfig, source: str, name: str, options: dict[str, Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Run a prediction.

    Returns:
        In the order of the images, the probabilities, and the embeddings where they are asked for; without the images
        that have errors.
    """
    assert config.output is not None
    base = config.predict_config(source)
    folder = storage.join(base.output, name)
    predict(replace(base, output=folder, overwrite=True, **options), withholds=False)
    columns: dict[str, list[npt.NDArray[np.float32]]] = {"probabilities": [], "embedding": []}
    for part in prediction_parts.list_parts(folder):
        table = prediction_parts.read_all(folder, part)
        for column, values in columns.items():
            if column in table.column_names:
                good = table[column].combine_chunks().drop_null()
                values.append(good.flatten().to_numpy(zero_copy_only=False).reshape(len(good), -1))
    if not sum(map(len, columns["probabilities"])):
        raise EvaluationError(f"None of the images of {source} has a prediction.")
    probabilities, embeddings = (np.concatenate(values) if values else np.zeros((0, 1), np.float32)
                                 for values in columns.values())  # fmt: skip
    return probabilities, embeddings


def _tell_apart(reference: npt.NDArray[np.float32], window: npt.NDArray[np.float32]) -> dict[str, float]:
    """How well a classifier tells the images of a window from those of the reference: the area under its ROC curve,
    cross-validated, 0.5 where it cannot; and what chance exceeds once in 1,000 times.

    A classifier two-sample test (Lopez-Paz and Oquab, 2017), with logistic regression; the variance of the area where
    there is no difference is (n + m + 1) / 12nm, as of Mann and Whitney's statistic.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values = np.concatenate([reference, window])
    is_window = np.repeat([0, 1], [len(reference), len(window)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced"))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    scores = cross_val_predict(classifier, values, is_window, cv=folds, method="decision_function")
    n, m = len(reference), len(window)
    return {
        "auc": float(roc_auc_score(is_window, scores)),
        "chance": float(0.5 + 3.09 * np.sqrt((n + m + 1) / (12 * n * m))),
        "images": m,
    }


# -- results --------------------------------------------------------------------------------------------------


def _measure(
    window: Window, reference: Distribution, embeddings: dict[str, float] | None, guaranteed: float | None
) -> dict[str, Any]:
    """The figures of a window of answers, whose precision is guaranteed or not."""
    found = window.answers.drift_from(reference)
    drifted = [name for name, compared in found.items() if compared and compared["warning"]]
    if embeddings and embeddings["auc"] >= max(drift_report.LARGE_AUC, embeddings["chance"]):
        drifted.append("embeddings")
    return {
        "start": f"{datetime.fromtimestamp(window.start, UTC):%Y-%m-%dT%H:%M:%SZ}",
        "images": window.answers.images,
        "errors": window.errors,
        "answers": window.answers.as_dict(),
        "drift": found,
        "embeddings": embeddings,
        "drifted": drifted,
        "labelled": window.labelled,
        "unknown_labels": window.unknown,
        "accuracy": _share("accuracy", window.correct, window.labelled),
        # Of a bundle that may be unsure:
        "unsure": window.unsure,
        "precision": _share("precision", window.correct_answers, window.labelled_answers) if guaranteed else None,
        "guaranteed_precision": guaranteed,
    }


def _share(name: str, correct: int, images: int) -> dict[str, float] | None:
    """A share with its 95 % interval; None without images."""
    if not images:
        return None
    low, high = wilson_interval(correct, images)
    return {name: correct / images, "low": low, "high": high}


def _log_results(results: dict[str, Any]) -> None:
    for window in results["windows"]:
        figures = [f"{name} {found['effect_size']:.2f}" for name, found in window["drift"].items() if found]
        if window["embeddings"]:
            figures.append(f"embeddings {window['embeddings']['auc']:.3f}")
        if window["accuracy"]:
            figures.append("accuracy {accuracy:.4f} ({low:.4f} to {high:.4f})".format(**window["accuracy"]))
        if window["precision"]:
            figures.append("precision {precision:.4f} ({low:.4f} to {high:.4f})".format(**window["precision"]))
        log.info("%s: %d images; %s", window["start"], window["images"], ", ".join(figures) or "too few to say more")
    for version, count in results["other_versions"].items():
        log.info("%d images were answered by %s, and are left out", count, version)
