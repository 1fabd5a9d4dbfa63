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

from cnnray import cluster, configs, paths
from cnnray.cluster import Resources
from cnnray.evaluation import comparison, metrics, report
from cnnray.evaluation.comparison import ROWS, EvaluationError
from cnnray.evaluation.config import PREDICTIONS, EvaluateConfig
from cnnray.evaluation.metrics import Answers
from cnnray.evaluation.pictures import pictures_of
from cnnray.images import containers, storage, stream
from cnnray.images import manifest as manifests
from cnnray.images.checks import Checked
from cnnray.images.lease import lease
from cnnray.models import bundle as bundles
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.prediction import parts as prediction_parts
from cnnray.prediction.job import run as predict

log = logging.getLogger(__name__)

CONFIG, MANIFEST, METRICS, REPORT, PLOTS = "config.yaml", "manifest.parquet", "metrics.json", "report.html", "plots"
_HISTORY = "history.csv"
"""Which training leaves beside the bundle, as it does its manifest."""
_ROWS_COLUMNS = ("id", "uri", "label", "prediction", "confidence", "top_k_labels", "top_k_scores", "error")
_MOST_ERRORS_SHOWN, _FEWEST_FITTED = 100, 50


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
    with lease(config.output):
        bundle = Bundle.load(config.bundle)
        if config.engine != "auto":
            engines.check_exported(bundle, config.engine)
        other = comparison.read(config.compare) if config.compare else None
        everything = manifests.manifest_of(config.data, labelled=True).select(["id", "uri", "label", "split"])
        manifest = _chosen(everything, config)
        _check_classes(manifest, bundle, config)
        _warn_of_trained_on(manifest, bundle)
        with cluster.connected():
            # Nothing is written, or taken away, before all is known to be right.
            _begin(config, manifest.drop_columns(["id"]))
            predicting = config.predicting(storage.join(config.output, MANIFEST))
            predicted = predict(predicting)
            checked = _checked(everything, cluster.resources()) if config.data_checks else None
        rows, probabilities = _read(predicting.folder)
        answers = _answers(rows, probabilities, bundle)
        figures = _figures(config, bundle, predicted["engine"], rows, answers, checked)
        if other is not None:
            figures["comparison"] = comparison.of(rows, figures, other)
        _write(config, rows, figures)
        pictures = pictures_of(bundle, rows, answers, figures, _history(bundle), config.samples)
        _write_report(config.output, rows, figures, pictures)
        _log(figures)
        if other is not None:
            comparison.gate(figures["comparison"], config.max_drop)
        if config.calibrate:
            _calibrate(bundle, answers, figures["calibration"]["fitted_temperature"])
        return {
            **{name: figures[name] for name in ("images", "errors", "accuracy")},
            "top_5_accuracy": figures.get("top_5_accuracy", 1.0),
            "expected_calibration_error": figures["expected_calibration_error"],
            "report": storage.join(config.output, REPORT),
            "engine": predicted["engine"],
            "temperature": bundles.read_info(bundle.uri).temperature,
            "seconds": round(time.monotonic() - started, 2),
        }


def _checked(manifest: pa.Table, found: Resources) -> Checked | None:
    stream.be_quiet()
    return stream.checked_in_passing(manifest, _cpus_per_task(found))


def _cpus_per_task(found: Resources) -> float:
    return min(1.0, found.cpus / 2)


def check_data(config: EvaluateConfig) -> dict[str, Any]:
    """Say what is wrong with the images; nothing is written.

    Returns:
        `images`, `unreadable`, `copies`, `nearly` (see `Checked`) and `findings`: how often each kind was found.

    Raises:
        ValueError, OSError, ClusterError: with a sentence for the user.
    """
    try:
        manifest = manifests.manifest_of(config.data, labelled=True)
    except manifests.ManifestError as error:
        log.info("without labels: %s", error)
        manifest = manifests.manifest_of(config.data, labelled=False)
    log.info("%d images", len(manifest))
    with cluster.connected() as found:
        paths.check_shared(found, [containers.file_of(manifest["uri"][0].as_py())])
        stream.be_quiet()
        checked = stream.checked(manifest, _cpus_per_task(found))
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
        order = ("validation", "test") if config.calibrate else ("test", "validation")
        wanted = next((split for split in order if split in splits), "all")
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
    except (OSError, pa.ArrowException, KeyError):  # there is none that can be read
        return
    both = pc.sum(pc.is_in(manifest["uri"], trained["uri"].combine_chunks())).as_py() or 0
    if both:
        log.warning(
            "%d of these %d images the network was trained on: the figures flatter it. Give new images, or --data "
            "%s, whose split validation was held out.",
            both, len(manifest), _beside(bundle, MANIFEST),
        )  # fmt: skip


def _begin(config: EvaluateConfig, manifest: pa.Table) -> None:
    """Make the output this evaluation's; what an earlier one of the same images has left stays until there is more.

    Raises:
        EvaluationError: the output holds something else, or an evaluation of other images.
    """
    assert config.output is not None
    uri = storage.join(config.output, MANIFEST)
    parts = (METRICS, REPORT, ROWS, PLOTS, PREDICTIONS, MANIFEST)
    try:
        config_uri = storage.join(config.output, CONFIG)
        earlier = configs.load(EvaluateConfig, storage.read_bytes(config_uri), config_uri)
    except FileNotFoundError:
        if foreign := [part for part in parts if storage.exists(storage.join(config.output, part))]:
            raise EvaluationError(
                f"{config.output} holds {', '.join(foreign)}, but no {CONFIG} of an evaluation; give another "
                "--output."
            ) from None
        earlier = {}
    if earlier and "wanted_accuracy" not in earlier:
        raise EvaluationError(f"{config.output} holds a {CONFIG} of another job; give another --output.")
    same = storage.is_file(uri) and manifests.read(uri).equals(manifest)
    if earlier and storage.is_file(uri) and not same and not config.overwrite:
        raise EvaluationError(
            f"{config.output} holds an evaluation of other images; give another --output, or --overwrite."
        )
    if not same:
        # First of all: an output that has other files and no config is taken for somebody else's.
        _write_config(config)
        for part in (METRICS, REPORT, ROWS):
            storage.delete_file(storage.join(config.output, part))
        for part in (PLOTS, PREDICTIONS):
            storage.delete_folder(storage.join(config.output, part))
        manifests.write(manifest, uri)


def _write_config(config: EvaluateConfig) -> None:
    assert config.output is not None
    text = configs.dump(config, overwrite=False, retry_errors=False)
    storage.write_bytes(storage.join(config.output, CONFIG), text)


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
    if bad := int((~np.isfinite(probabilities)).any(1).sum()):
        raise EvaluationError(f"The network's answers to {bad} of {len(good)} images are no numbers.")
    targets = pc.index_in(good["label"], pa.array(names, pa.string())).to_numpy().astype(np.int64)
    return Answers(names, targets, metrics.normalised(probabilities))


def _figures(
    config: EvaluateConfig, bundle: Bundle, engine: str, rows: pa.Table, answers: Answers, checked: Checked | None
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
        "intervals": metrics.intervals(answers),
        "macro_roc_auc": metrics.macro_mean(classes, "roc_auc"),
        "macro_average_precision": metrics.macro_mean(classes, "average_precision"),
        "expected_calibration_error": metrics.expected_calibration_error(answers),
        "calibration": calibration,
        "wanted_accuracy": config.wanted_accuracy,
        "threshold": metrics.threshold_for(answers, config.wanted_accuracy),
        "classes": classes,
        "confusion_matrix": metrics.confusion(answers).tolist(),
        "data_checks": dataclasses.asdict(checked) if checked else None,
    }


def _history(bundle: Bundle) -> dict[str, list[float]]:
    """The columns of the history that training left beside the bundle; none where there is none."""
    try:
        text = storage.read_bytes(_beside(bundle, _HISTORY)).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}
    except (OSError, ValueError, TypeError):  # there is none that can be read
        return {}


# -- the end --------------------------------------------------------------------------------------------------


def _write(config: EvaluateConfig, rows: pa.Table, figures: dict[str, Any]) -> None:
    """Write the figures, and take away the pictures of others."""
    assert config.output is not None
    storage.delete_file(storage.join(config.output, REPORT))
    storage.delete_folder(storage.join(config.output, PLOTS))
    _write_config(config)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer)
    storage.write_bytes(storage.join(config.output, ROWS), buffer.getvalue())
    storage.write_bytes(storage.join(config.output, METRICS), (json.dumps(figures) + "\n").encode())


def _write_report(output: str, rows: pa.Table, figures: dict[str, Any], pictures: dict[str, bytes]) -> None:
    for name, data in pictures.items():
        storage.write_bytes(storage.join(output, PLOTS, f"{name}.png"), data)
    bad = rows.filter(pc.is_valid(rows["error"])).select(["uri", "error"]).slice(0, _MOST_ERRORS_SHOWN).to_pylist()
    storage.write_bytes(storage.join(output, REPORT), report.rendered(figures, bad, pictures).encode())


def _calibrate(bundle: Bundle, answers: Answers, temperature: float) -> None:
    """Write the temperature that fits these answers into the bundle.

    Raises:
        EvaluationError: these answers say too little about it, or the bundle was changed meanwhile.
    """
    fitted = temperature / bundle.info.temperature
    count, wrong = len(answers.targets), int((~answers.correct).sum())
    inside = metrics.COLDEST * 1.01 < fitted < metrics.WARMEST / 1.01
    if count < _FEWEST_FITTED or not 0 < wrong < count or not inside:
        raise EvaluationError(
            f"{count} answers, {wrong} of them wrong, do not tell a temperature (at least {_FEWEST_FITTED} are "
            "needed, with some right and some wrong): the bundle was not changed."
        )
    with lease(bundle.uri):
        if Bundle.load(bundle.uri).version != bundle.version:
            raise EvaluationError(f"{bundle.uri} was changed while it was evaluated: run it again.")
        info = bundles.read_info(bundle.uri)
        bundles.write_info(bundle.uri, dataclasses.replace(info, temperature=temperature))
    log.info("%s has the temperature %.4f now; before %.4f", bundle.uri, temperature, bundle.info.temperature)


def _log(found: dict[str, Any]) -> None:
    low, high = found["intervals"]["accuracy"]
    log.info("%d images, %d of them without an answer", found["images"], found["errors"])
    log.info("accuracy %.4f (95 %% confidence: %.4f to %.4f)", found["accuracy"], low, high)
    log.info(
        "expected calibration error %.4f, with the temperature %.4f that fits %.4f",
        found["expected_calibration_error"], found["calibration"]["fitted_temperature"],
        found["calibration"]["expected_calibration_error_after"],
    )  # fmt: skip
