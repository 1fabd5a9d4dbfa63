"""An evaluation from end to end: prediction over labelled images, figures, report."""

import csv
import dataclasses
import io
import json
import logging
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cnnray import cluster
from cnnray.evaluation import metrics, pictures, report
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.metrics import Answers
from cnnray.images import manifest as manifests
from cnnray.images import storage, stream
from cnnray.images.checks import Checked
from cnnray.images.lock import alone
from cnnray.models import bundle as bundles
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.prediction import parts as prediction_parts
from cnnray.prediction.job import run as predict

log = logging.getLogger(__name__)

MANIFEST, ROWS, METRICS, REPORT = "manifest.parquet", "predictions.parquet", "metrics.json", "report.html"
_HISTORY = "history.csv"
"""Which training leaves beside the bundle, as it does its manifest."""
_ROWS_COLUMNS = ("id", "uri", "label", "prediction", "confidence", "top_k_labels", "top_k_scores", "error")
_MOST_ERRORS_SHOWN = 100


class EvaluationError(RuntimeError):
    """An evaluation that cannot be made, or a gate that was not passed; the message is one sentence for the user."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Leave in `config.output` `report.html`, `metrics.json`, `predictions.parquet`, `plots/`, and the prediction run
    itself in `predictions/`.

    Returns:
        `images`, `errors`, `accuracy`, `top_5_accuracy`, `expected_calibration_error`, `report` (its uri), `engine`,
        `temperature` (of the bundle in the end) and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PredictionError, EvaluationError: with a sentence for the user.
    """
    started = time.monotonic()
    assert config.bundle is not None
    assert config.output is not None
    with alone(config.output):
        bundle = Bundle.load(config.bundle)
        everything = manifests.manifest_of(config.data, labelled=True).select(["id", "uri", "label", "split"])
        manifest = _chosen(everything, config)
        _check_classes(manifest, bundle, config)
        _warn_of_trained_on(manifest, bundle)
        _keep_manifest(manifest.drop_columns(["id"]), config)
        with cluster.connected() as found:
            predicting = config.predicting(storage.join(config.output, MANIFEST))
            if config.calibrate and config.engine == "auto":
                # int8's probabilities are too coarse to fit to.
                predicting = dataclasses.replace(predicting, engine=engines.KERAS)
            predicted = predict(predicting)
            stream.be_quiet()
            checked = stream.checked(everything, cpus_per_task=min(1.0, found.cpus / 2))
        rows, probabilities = _read(predicting.folder)
        answers = _answers(rows, probabilities, bundle)
        found_all = _figures(config, bundle, predicted["engine"], rows, answers, checked)
        if config.compare is not None:
            found_all["comparison"] = _comparison(config.compare, rows, found_all)
        shown = pictures.pictures_of(bundle, rows, answers, found_all, _history(bundle), config.samples)
        _write(config.output, rows, found_all, shown)
        if config.calibrate:
            _calibrate(bundle, found_all["calibration"]["fitted_temperature"])
        _log(found_all)
        _gate(config, found_all)
        return {
            **{name: found_all[name] for name in ("images", "errors", "accuracy")},
            "top_5_accuracy": found_all.get("top_5_accuracy", 1.0),
            "expected_calibration_error": found_all["expected_calibration_error"],
            "report": storage.join(config.output, REPORT),
            "engine": predicted["engine"],
            "temperature": bundles.read_info(bundle.uri).temperature,
            "seconds": round(time.monotonic() - started, 2),
        }


def check_data(config: EvaluateConfig) -> dict[str, Any]:
    """Say what is wrong with the images; nothing is written.

    Returns:
        `images`, `unreadable`, `copies`, `nearly` (see `Checked`) and `findings`: how often each kind was found.

    Raises:
        ValueError, OSError, ClusterError: with a sentence for the user.
    """
    manifest = manifests.manifest_of(config.data, labelled=False)
    with cluster.connected() as found:
        stream.be_quiet()
        checked = stream.checked(manifest, cpus_per_task=min(1.0, found.cpus / 2))
    checked.warn()
    log.info(
        "%d images, sides from %d to %d pixels, half of them up to %d; %d copies",
        checked.images, checked.sides[0], checked.sides[2], checked.sides[1], checked.copies,
    )  # fmt: skip
    return {
        "images": checked.images,
        "unreadable": checked.unreadable,
        "copies": checked.copies,
        "nearly": checked.nearly,
        "findings": {finding.kind: finding.count for finding in checked.findings},
    }


# -- what is evaluated ----------------------------------------------------------------------------------------


def _chosen(manifest: pa.Table, config: EvaluateConfig) -> pa.Table:
    """The rows of the split that is asked for."""
    splits = set(pc.unique(manifest["split"]).to_pylist())
    if config.split == "auto":
        wanted = next((split for split in ("test", "validation") if split in splits), "all")
    else:
        wanted = config.split
    if wanted == "all":
        return manifest
    if wanted not in splits:
        there = ", ".join(sorted(filter(None, splits))) or "none"
        raise EvaluationError(f"{config.data} has no images of the split {wanted} (it has {there}).")
    log.info("the images of the split %s", wanted)
    return manifests.rows_of(manifest, wanted)


def _check_classes(manifest: pa.Table, bundle: Bundle, config: EvaluateConfig) -> None:
    if unknown := sorted(set(manifests.class_names(manifest)) - set(bundle.info.class_names)):
        some = ", ".join(map(repr, unknown[:5]))
        raise EvaluationError(f"{config.data} has labels that the bundle does not know: {some}.")


def _beside(bundle: Bundle, name: str) -> str:
    """What training left beside the bundle."""
    return storage.join(bundle.uri.rpartition("/")[0], name)


def _warn_of_trained_on(manifest: pa.Table, bundle: Bundle) -> None:
    try:
        trained = manifests.rows_of(manifests.read(_beside(bundle, MANIFEST)), "train")
    except (FileNotFoundError, pa.ArrowException, KeyError):
        return
    both = pc.sum(pc.is_in(manifest["uri"], trained["uri"].combine_chunks())).as_py() or 0
    if both:
        log.warning(
            "%d of these %d images the network was trained on: the figures flatter it. Give new images, or --data "
            "%s, whose split validation was held out.",
            both, len(manifest), _beside(bundle, MANIFEST),
        )  # fmt: skip


def _keep_manifest(manifest: pa.Table, config: EvaluateConfig) -> None:
    """Write the manifest, which the prediction run reads.

    Raises:
        EvaluationError: the output holds that of other images.
    """
    assert config.output is not None
    uri = storage.join(config.output, MANIFEST)
    if storage.is_file(uri) and not config.overwrite:
        if manifests.read(uri).equals(manifest):
            return
        raise EvaluationError(
            f"{config.output} holds an evaluation of other images; give another --output, or --overwrite."
        )
    manifests.write(manifest, uri)


# -- the answers ----------------------------------------------------------------------------------------------


def _read(folder: str) -> tuple[pa.Table, Any]:
    """All rows of a prediction run: by image, and the probabilities of those that have an answer."""
    tables, probabilities = [], []
    for uri in sorted(prediction_parts.files_of(folder)):
        part = pyarrow.parquet.read_table(pa.BufferReader(storage.read_bytes(uri)))
        good = part["probabilities"].combine_chunks().drop_null()
        values = good.flatten().to_numpy(zero_copy_only=False)
        probabilities.append(values.reshape(len(good), -1) if len(good) else None)
        tables.append(part.select(list(_ROWS_COLUMNS)))
    found = [some for some in probabilities if some is not None]
    return pa.concat_tables(tables), np.concatenate(found) if found else np.zeros((0, 1), np.float32)


def _answers(rows: pa.Table, probabilities: Any, bundle: Bundle) -> Answers:
    names = bundle.info.class_names
    good = rows.filter(pc.is_null(rows["error"]))
    if not len(good):
        raise EvaluationError(f"None of the {len(rows)} images has an answer: {rows['error'][0].as_py()} for one.")
    targets = pc.index_in(good["label"], pa.array(names, pa.string())).to_numpy().astype(np.int64)
    return Answers(names, targets, metrics.normalised(probabilities))


def _figures(
    config: EvaluateConfig, bundle: Bundle, engine: str, rows: pa.Table, answers: Answers, checked: Checked
) -> dict[str, Any]:
    """What `metrics.json` holds."""
    reasons = Counter(error.partition(":")[0] for error in rows["error"].drop_null().to_pylist())
    classes = metrics.by_class(answers)
    after = metrics.cross_tempered(answers)
    calibration = {
        "temperature": bundle.info.temperature,
        "fitted_temperature": bundle.info.temperature * metrics.fitted_temperature(answers),
        "expected_calibration_error_after": metrics.expected_calibration_error(after),
        "reliability": metrics.reliability(answers),
        "reliability_after": metrics.reliability(after),
    }
    return {
        "bundle": bundle.uri,
        "model": bundle.version,
        "engine": engine,
        "data": config.data,
        "images": len(rows),
        "errors": reasons.total(),
        "errors_by_reason": dict(reasons.most_common()),
        **metrics.headline(answers),
        "macro_roc_auc": metrics.macro_mean(classes, "roc_auc"),
        "macro_average_precision": metrics.macro_mean(classes, "average_precision"),
        "expected_calibration_error": metrics.expected_calibration_error(answers),
        "calibration": calibration,
        "wanted_accuracy": config.wanted_accuracy,
        "threshold": metrics.threshold_for(answers, config.wanted_accuracy),
        "classes": classes,
        "confusion_matrix": metrics.confusion(answers).tolist(),
        "data_checks": dataclasses.asdict(checked),
    }


def _history(bundle: Bundle) -> dict[str, list[float]]:
    """The columns of the history that training left beside the bundle; none where there is none."""
    try:
        text = storage.read_bytes(_beside(bundle, _HISTORY)).decode()
    except FileNotFoundError:
        return {}
    rows = list(csv.DictReader(io.StringIO(text)))
    try:
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}
    except ValueError:
        log.warning("%s is damaged, and left out of the report", _beside(bundle, _HISTORY))
        return {}


def _comparison(other: str, rows: pa.Table, mine: dict[str, Any]) -> dict[str, Any]:
    """This evaluation beside another one of the same images.

    Raises:
        EvaluationError: it has no image of these.
    """
    try:
        theirs = json.loads(storage.read_bytes(other))
        their_rows = pyarrow.parquet.read_table(
            pa.BufferReader(storage.read_bytes(storage.join(other.rpartition("/")[0], ROWS)))
        )
    except (FileNotFoundError, ValueError, pa.ArrowException) as error:
        raise EvaluationError(f"--compare {other} is no metrics.json of an evaluation: {error}.") from None

    def right(table: pa.Table) -> dict[str, bool]:
        good = table.filter(pc.is_null(table["error"]))
        hits = pc.equal(good["prediction"], good["label"]).to_pylist()
        return dict(zip(good["uri"].to_pylist(), hits, strict=True))

    ours, others = right(rows), right(their_rows)
    both = [uri for uri in ours if uri in others]
    if not both:
        raise EvaluationError(f"--compare {other} is of other images: none is in both.")
    names = [
        name
        for name, value in mine.items()
        if isinstance(value, float) and isinstance(theirs.get(name), float) and name != "wanted_accuracy"
    ]
    this = np.asarray([ours[uri] for uri in both])
    that = np.asarray([others[uri] for uri in both])
    return {
        "other": other,
        "model": theirs["model"],
        "images": len(both),
        "accuracy": float(this.mean()),
        "other_accuracy": float(that.mean()),
        "mcnemar": metrics.mcnemar(this, that),
        "figures": {name: [mine[name], theirs[name]] for name in names},
    }


# -- the end --------------------------------------------------------------------------------------------------


def _write(output: str, rows: pa.Table, found: dict[str, Any], shown: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer)
    storage.write_bytes(storage.join(output, ROWS), buffer.getvalue())
    storage.write_bytes(storage.join(output, METRICS), json.dumps(found, indent=2).encode())
    for name, data in shown.items():
        storage.write_bytes(storage.join(output, "plots", f"{name}.png"), data)
    bad = rows.filter(pc.is_valid(rows["error"])).select(["uri", "error"]).slice(0, _MOST_ERRORS_SHOWN).to_pylist()
    storage.write_bytes(storage.join(output, REPORT), report.rendered(found, bad, shown).encode())


def _calibrate(bundle: Bundle, temperature: float) -> None:
    with alone(bundle.uri):
        info = bundles.read_info(bundle.uri)
        bundles.write_info(bundle.uri, dataclasses.replace(info, temperature=temperature))
    log.info("%s has the temperature %.4f now; before %.4f", bundle.uri, temperature, bundle.info.temperature)


def _log(found: dict[str, Any]) -> None:
    low, high = found["accuracy_interval"]
    log.info("%d images, %d of them without an answer", found["images"], found["errors"])
    log.info("accuracy %.4f (95 %% confidence: %.4f to %.4f)", found["accuracy"], low, high)
    log.info(
        "expected calibration error %.4f, with the temperature %.4f that fits %.4f",
        found["expected_calibration_error"], found["calibration"]["fitted_temperature"],
        found["calibration"]["expected_calibration_error_after"],
    )  # fmt: skip


def _gate(config: EvaluateConfig, found: dict[str, Any]) -> None:
    """
    Raises:
        EvaluationError: accuracy fell by more than it may.
    """
    comparison = found.get("comparison")
    if comparison is None:
        return
    drop = comparison["other_accuracy"] - comparison["accuracy"]
    log.info(
        "accuracy on the %d images of both: %.4f, there %.4f (McNemar's p %.4g)",
        comparison["images"], comparison["accuracy"], comparison["other_accuracy"], comparison["mcnemar"]["p_value"],
    )  # fmt: skip
    if drop > config.max_drop + 1e-12:
        raise EvaluationError(
            f"Accuracy fell by {drop:.4f} against {comparison['other']}, more than --max-drop {config.max_drop:g}."
        )
