"""An evaluation from end to end: prediction over labelled images, metrics, report."""

import csv
import dataclasses
import io
import json
import logging
import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cnnray import cluster, configs, flags
from cnnray.evaluation import (
    averages,
    comparison,
    data_checks,
    hierarchy,
    label_metrics,
    metrics,
    publishing,
    report,
    selective,
)
from cnnray.evaluation.comparison import ROWS, EvaluationError
from cnnray.evaluation.config import PREDICTIONS, EvaluateConfig
from cnnray.evaluation.label_metrics import LabelPredictions
from cnnray.evaluation.metrics import Predictions
from cnnray.evaluation.pictures import make_label_pictures, make_pictures
from cnnray.evaluation.rows import Measured, make_label_predictions, make_predictions, measured, read_rows
from cnnray.images import manifest as manifests
from cnnray.images import storage
from cnnray.images.checks import CheckResult
from cnnray.images.lease import lease
from cnnray.models import averaging, engines
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.heat_maps import HeatMapProcess
from cnnray.prediction.job import run as predict

log = logging.getLogger(__name__)

CONFIG, MANIFEST, METRICS, REPORT, PLOTS = "config.yaml", "manifest.parquet", "metrics.json", "report.html", "plots"
BUNDLE = "bundle"
"""Folder of the bundle that is published, in the output."""
_FILES = (METRICS, REPORT, ROWS)
_FOLDERS = (
    PLOTS, PREDICTIONS, BUNDLE, averaging.FOLDER, averages.ALONE,
    *(f"{PREDICTIONS}-{name}" for name in engines.ENGINES),
)  # fmt: skip
"""What an evaluation writes besides its config and manifest."""
_HISTORY = "history.csv"
"""Training writes it, and its manifest, to its output."""
_LINE = (
    "images", "errors", "accuracy", "top_5_accuracy", "group_accuracy", "mean_average_precision", "macro_f1",
    "micro_f1", "subset_accuracy", "expected_calibration_error", "split",
)  # fmt: skip
"""Figures that `evaluate` returns."""
_MAX_ERRORS_SHOWN = 100


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a bundle. Writes `report.html`, `metrics.json`, `predictions.parquet`, `plots/` and the prediction run
    itself, `predictions/`, to `config.output`, and with `config.publishes` the new bundle, `bundle/`.

    Returns:
        `images`, `errors`, `accuracy`, `top_5_accuracy` (of more than five classes), `group_accuracy` (of classes
        with groups), `expected_calibration_error`,
        `split`, `report` (its uri), `engine`, `bundle` (uri of the published one, else of the one evaluated),
        `temperature` (of that bundle), with `config.target_precision` the `threshold` and the `coverage` of `engine`,
        and `seconds`. With several labels, `mean_average_precision`, `macro_f1`, `micro_f1` and `subset_accuracy`
        take the place of the accuracies.

    Raises:
        ValueError, OSError, ClusterError, PredictionError, EvaluationError: with a sentence for the user.
        UndecidedError: with `config.compare`, there are too few images to say whether accuracy fell too far.
    """
    started = time.monotonic()
    assert config.data is not None
    assert config.bundle is not None
    assert config.output is not None
    with lease(config.output):
        bundle = config.averaged_bundle(Bundle.load(config.bundle), config.output)
        _check_flags(config, bundle)
        if config.engine != "auto":
            engines.check_exported(bundle, config.engine)
        other = comparison.read_evaluation(config.compare) if config.compare else None
        groups = hierarchy.read(config.hierarchy, bundle.info.class_names) if config.hierarchy else bundle.info.groups
        everything = data_checks.read_manifest(config, multi_label=bundle.info.is_multi_label)
        split, manifest = select_split(everything, config)
        _check_classes(manifest, bundle, config)
        if other is not None:
            comparison.check_comparable(other, manifest, bundle.info.class_names, config.max_error_fraction)
        of_training = _count_training_images(manifest, bundle)
        publishing.check_images(len(manifest), of_training, config)
        with HeatMapProcess(bundle) as heat_maps:
            with data_checks.connected_if_many(config, everything):
                # All checks have passed: only now is anything written or deleted.
                _begin_output(config, manifest.drop_columns(["id"]))
                if config.averages:
                    averaging.write(bundle)
                if not cluster.is_connected() and not bundle.info.is_multi_label:
                    heat_maps.start()
                uri = storage.join(config.output, MANIFEST)
                predict_config = config.predict_config(uri, bundle.uri)
                prediction = predict(predict_config, withholds=False)
                if config.averages:
                    alone = averages.predict_alone(
                        config, uri, prediction["engine"], multi_label=bundle.info.is_multi_label
                    )
                others = publishing.predict_with_other_engines(config, bundle, predict_config, prediction["engine"])
                checked = data_checks.check_if_small(everything, config) if config.data_checks else None
            rows, probabilities = read_rows(predict_config.output, multi_label=bundle.info.is_multi_label)
            results = _describe(config, bundle, prediction["engine"], split, rows, checked)
            if config.averages:
                averaged = averages.Run(rows, probabilities, prediction["images_per_second"])
                results["averages"] = averages.measure(config, bundle, averaged, alone)
            history = _read_history(bundle)
            if bundle.info.is_multi_label:
                found = make_label_predictions(rows, probabilities, bundle)
                results |= _measure_labels(found)
                _write_results(config, rows, results)
                pictures = make_label_pictures(bundle, rows, found, results, history, config.samples)
            else:
                heat_maps.start()
                predictions = make_predictions(rows, probabilities, bundle)
                results |= _measure(config, bundle, predictions)
                first = measured(prediction["engine"], rows, probabilities, predictions)
                results["answers"] = _measure_answers(bundle, first)
                if groups:
                    results |= hierarchy.measure(predictions, groups)
                if other is not None:
                    results["comparison"] = comparison.compare(
                        rows, results, other, config.max_drop, config.max_error_fraction
                    )
                _write_results(config, rows, results)
                pictures = make_pictures(bundle, rows, predictions, results, history, config.samples, heat_maps)
        _write_report(config.output, rows, results, pictures)
        _log_results(results)
        if other is not None:
            comparison.check(results["comparison"])
        if config.publishes:
            is_known = split == "validation" and manifests.fingerprint(everything) == bundle.info.data_fingerprint
            target = storage.join(config.output, BUNDLE)
            bundle = publishing.publish(
                config, bundle, target, first, others, len(manifest), groups=groups, of_training=is_known
            )
        return {
            **{name: results[name] for name in _LINE if name in results},
            "report": storage.join(config.output, REPORT),
            "engine": prediction["engine"],
            "bundle": bundle.uri,
            "temperature": bundle.info.temperature,
            **(_guaranteed(bundle, prediction["engine"]) if config.target_precision is not None else {}),
            "seconds": round(time.monotonic() - started, 2),
        }


# -- images and output ----------------------------------------------------------------------------------------


def select_split(manifest: pa.Table, config: EvaluateConfig) -> tuple[str, pa.Table]:
    """The split to evaluate, and its rows; `all` where the data have no splits.

    Raises:
        EvaluationError: no image has this split.
    """
    splits = set(pc.unique(manifest["split"]).to_pylist())
    if config.split == "auto":
        fits = config.calibrate and config.target_precision is None
        order = ("validation", "test") if fits or config.drift else ("test", "validation")
        selected = next((split for split in order if split in splits), "all")
    else:
        selected = config.split
    if selected == "all":
        return selected, manifest
    if selected not in splits:
        existing = ", ".join(sorted(filter(None, splits))) or "none"
        raise EvaluationError(f"{config.data} has no images of the split {selected} (it has {existing}).")
    log.info("evaluating the split %s", selected)
    return selected, manifests.select_split(manifest, selected)


def _check_flags(config: EvaluateConfig, bundle: Bundle) -> None:
    """
    Raises:
        EvaluationError: a flag is for bundles of one label for each image.
    """
    if not bundle.info.is_multi_label:
        for name in ("multi_label", "label_separator"):
            if getattr(config, name):
                flag = flags.flag_name(name)
                raise EvaluationError(f"{bundle.uri} has one label for each image: leave out {flag}.")
        return
    for name in ("calibrate", "target_precision", "hierarchy", "compare"):
        if getattr(config, name):
            flag = flags.flag_name(name)
            raise EvaluationError(f"{flag} is for bundles of one label for each image, and {bundle.uri} has several.")


def _check_classes(manifest: pa.Table, bundle: Bundle, config: EvaluateConfig) -> None:
    if manifests.is_multi_label(manifest) != bundle.info.is_multi_label:
        raise EvaluationError(f"{config.data} has lists of labels, and the bundle one label for each image.")
    if unknown := sorted(set(manifests.class_names(manifest)) - set(bundle.info.class_names)):
        examples = ", ".join(map(repr, unknown[:5]))
        raise EvaluationError(f"{config.data} has labels that the bundle does not know: {examples}.")


def _count_training_images(manifest: pa.Table, bundle: Bundle) -> Counter[str]:
    """Count the images that the network's training had, by split there, and warn if it was trained on some."""
    counts: Counter[str] = Counter()
    for training in set(bundle.trainings):
        try:
            trained = manifests.read(storage.join(training, MANIFEST))
            splits = trained["split"].take(pc.index_in(manifest["uri"], trained["uri"].combine_chunks()))
        except (OSError, pa.ArrowException, KeyError):  # no readable manifest of a training
            continue
        # Of several networks, the one that had the most.
        counts |= Counter(split for split in splits.to_pylist() if split)
    if count := counts["train"]:
        log.warning(
            "The network was trained on %d of these %d images, so the metrics are too good. Evaluate on new images, "
            "or on --data %s, whose split validation was held out.",
            count, len(manifest), storage.join(bundle.training, MANIFEST),
        )  # fmt: skip
    return counts


def _begin_output(config: EvaluateConfig, manifest: pa.Table) -> None:
    """Write the manifest and config of this evaluation; files of an evaluation of other images are deleted first.

    Files of an earlier evaluation of the same images stay until this one replaces them.

    Raises:
        EvaluationError: the output holds something else, or an evaluation of other images without `overwrite`.
    """
    assert config.output is not None
    uri = storage.join(config.output, MANIFEST)
    try:
        config_uri = storage.join(config.output, CONFIG)
        earlier = configs.load(EvaluateConfig, storage.read_bytes(config_uri), config_uri)
    except FileNotFoundError:
        names = (*_FILES, *_FOLDERS, MANIFEST)
        if foreign := [name for name in names if storage.exists(storage.join(config.output, name))]:
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
        # The config comes first: a folder with other files but no config is refused as not ours.
        _write_config(config)
        for name in _FILES:
            storage.delete_file(storage.join(config.output, name))
        for name in _FOLDERS:
            storage.delete_folder(storage.join(config.output, name))
        manifests.write(manifest, uri)


def _write_config(config: EvaluateConfig) -> None:
    assert config.output is not None
    text = configs.dump(config, overwrite=False, retry_errors=False)
    storage.write_bytes(storage.join(config.output, CONFIG), text)


# -- results --------------------------------------------------------------------------------------------------


def _measure_answers(bundle: Bundle, given: Measured) -> dict[str, Any] | None:
    """See `selective.measure_answers`, with what is guaranteed; None: there is no threshold for the engine."""
    decision = bundle.info.decision
    if decision is None:
        return None
    try:
        rules = engines.find_rules(bundle, given.engine)
    except BundleError as error:
        log.warning("the report leaves out the precision of the answers: %s", error)
        return None
    guaranteed = {
        "guaranteed_precision": decision.precision, "guaranteed_candidate_coverage": decision.candidate_coverage,
    }  # fmt: skip
    return guaranteed | selective.measure_answers(rules, given.probabilities, given.targets)


def _guaranteed(bundle: Bundle, engine: str) -> dict[str, float]:
    threshold = engines.find_threshold(bundle, engine)
    assert threshold is not None
    return {"threshold": threshold.confidence, "coverage": threshold.coverage}


def _describe(
    config: EvaluateConfig, bundle: Bundle, engine: str, split: str, rows: pa.Table, checked: CheckResult | None
) -> dict[str, Any]:
    """The content of `metrics.json` that is not about answers."""
    reasons = Counter(error.partition(":")[0] for error in rows["error"].drop_null().to_pylist())
    return {
        "bundle": bundle.uri,
        "model": bundle.version,
        "engine": engine,
        "data": config.data,
        "split": split,
        "images": len(rows),
        "errors": reasons.total(),
        "errors_by_reason": dict(reasons.most_common()),
        "data_checks": dataclasses.asdict(checked) if checked else None,
    }


def _measure_labels(predictions: LabelPredictions) -> dict[str, Any]:
    """The content of `metrics.json` where images may have several labels."""
    return {
        **label_metrics.overall_metrics(predictions),
        "intervals": label_metrics.confidence_intervals(predictions),
        "expected_calibration_error": metrics.expected_calibration_error(predictions.decisions),
        "reliability": metrics.reliability_bins(predictions.decisions),
        "classes": label_metrics.class_metrics(predictions),
    }


def _measure(config: EvaluateConfig, bundle: Bundle, predictions: Predictions) -> dict[str, Any]:
    """The content of `metrics.json` of one label for each image."""
    classes = metrics.class_metrics(predictions)
    calibrated = metrics.cross_fit_temperature(predictions)
    precision = config.target_precision or config.wanted_accuracy
    guarantee = selective.find_guarantee(
        predictions.confidences, predictions.correct, precision=precision, certainty=config.certainty
    )
    calibration = {
        "temperature": bundle.info.temperature,
        "fitted_temperature": bundle.info.temperature * metrics.fit_temperature(predictions),
        "expected_calibration_error_after": metrics.expected_calibration_error(calibrated),
        "reliability": metrics.reliability_bins(predictions),
        "reliability_after": metrics.reliability_bins(calibrated),
    }
    return {
        **metrics.overall_metrics(predictions),
        "intervals": metrics.confidence_intervals(predictions),
        "macro_roc_auc": metrics.macro_mean(classes, "roc_auc"),
        "macro_average_precision": metrics.macro_mean(classes, "average_precision"),
        "expected_calibration_error": metrics.expected_calibration_error(predictions),
        "calibration": calibration,
        "wanted_accuracy": precision,
        "certainty": config.certainty,
        "threshold": metrics.find_threshold(predictions, precision),
        "guarantee": dataclasses.asdict(guarantee) if guarantee else None,
        "classes": classes,
        "confusion_matrix": metrics.confusion_matrix(predictions).tolist(),
    }


def _read_history(bundle: Bundle) -> dict[str, list[float]]:
    """The columns of the history that training wrote; empty if there is none."""
    try:
        text = storage.read_bytes(storage.join(bundle.training, _HISTORY)).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}
    except (OSError, ValueError, TypeError):  # no readable history
        return {}


# -- report and calibration -----------------------------------------------------------------------------------


def _write_results(config: EvaluateConfig, rows: pa.Table, results: dict[str, Any]) -> None:
    """Write the rows and the metrics, and delete the report and plots of an earlier evaluation."""
    assert config.output is not None
    storage.delete_file(storage.join(config.output, REPORT))
    storage.delete_folder(storage.join(config.output, PLOTS))
    _write_config(config)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer)
    storage.write_bytes(storage.join(config.output, ROWS), buffer.getvalue())
    storage.write_bytes(storage.join(config.output, METRICS), (json.dumps(results) + "\n").encode())


def _write_report(output: str, rows: pa.Table, results: dict[str, Any], pictures: dict[str, bytes]) -> None:
    for name, png in pictures.items():
        storage.write_bytes(storage.join(output, PLOTS, f"{name}.png"), png)
    errors = rows.filter(pc.is_valid(rows["error"])).select(["uri", "error"]).slice(0, _MAX_ERRORS_SHOWN)
    html = report.render(results, errors.to_pylist(), pictures)
    storage.write_bytes(storage.join(output, REPORT), html.encode())


def _log_results(results: dict[str, Any]) -> None:
    log.info("%d images, %d of them without a prediction", results["images"], results["errors"])
    if "mean_average_precision" in results:
        low, high = results["intervals"].get("mean_average_precision", (0.0, 1.0))
        log.info(
            "mean average precision %.4f (95 %% confidence interval: %.4f to %.4f), macro F1 %.4f, micro F1 %.4f",
            results["mean_average_precision"], low, high, results["macro_f1"], results["micro_f1"],
        )  # fmt: skip
        return
    low, high = results["intervals"]["accuracy"]
    log.info("accuracy %.4f (95 %% confidence interval: %.4f to %.4f)", results["accuracy"], low, high)
    log.info(
        "expected calibration error %.4f; with the fitted temperature of %.4f it is %.4f",
        results["expected_calibration_error"], results["calibration"]["fitted_temperature"],
        results["calibration"]["expected_calibration_error_after"],
    )  # fmt: skip
    if guarantee := results["guarantee"]:
        log.info(
            "with a certainty of %.0f %%, at least %.2f %% of the predictions for other images like these are right "
            "from a confidence of %.6g on; %.1f %% of the images have it",
            100 * guarantee["certainty"], 100 * guarantee["precision"], guarantee["threshold"],
            100 * guarantee["coverage"],
        )  # fmt: skip
