"""Several labels from training to answers, on the session's cluster: each figure is scikit-learn's."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet
import pytest
import sklearn.metrics
import yaml

from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.data_checks import check_data
from cnnray.evaluation.drift import measure_drift
from cnnray.evaluation.job import evaluate
from cnnray.images import labels
from cnnray.images import manifest as manifests
from cnnray.images.decode import decode
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import ManifestError
from cnnray.models import engines, runtimes
from cnnray.models.bundle import Bundle
from cnnray.models.export import ExportConfig, export
from cnnray.models.predictor import Predictor
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.job import run as predict
from cnnray.training.config import TrainConfig
from cnnray.training.job import train
from cnnray.training.output import TrainingError
from cnnray.training.preview import preview
from cnnray.training.probes import check_sanity, find_learning_rate
from cnnray.tuning.config import SearchConfig
from cnnray.tuning.job import SearchError, search
from tests.conftest import write_digit_grids, write_digits
from tests.runs import final_state, largest_difference, read_rows


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    return write_digit_grids(tmp_path_factory.mktemp("grids"), 240)


def _config(grids, output, **changes):
    config = TrainConfig(
        data=str(grids), output=str(output), architecture="small_cnn", image_size=16, epochs=2, batch_size=32,
        max_workers=1, cpus_per_worker=0.5, cache="none", data_checks=False, schedule="constant", augment="none",
        dropout=0.0, synchronized_batch_norm=True, optimizer="sgd", learning_rate=1e-3,
    )  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module")
def alone(grids, tmp_path_factory):
    """A run of one worker, which went on after its first epoch: its output and its summary."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(_config(grids, output, epochs=1))
    return output, train(_config(grids, output))


def _validated(output):
    """The validation images' truth, float32 (N, classes), and the bundle's logits for them."""
    bundle = Bundle.load(str(output / "bundle"))
    rows = manifests.select_split(manifests.read(str(output / "manifest.parquet")), "validation")
    truth = labels.multi_hot(rows["label"], bundle.info.class_names)
    return truth, runtimes.KerasEngine(bundle, 1).outputs_in_batches(_images(output), 64)


def _images(output):
    """The validation images, uint8 (N, height, width, 3)."""
    rows = manifests.select_split(manifests.read(str(output / "manifest.parquet")), "validation")
    return np.stack([decode(Path(uri).read_bytes(), Geometry.of(16)) for uri in rows["uri"].to_pylist()])


def test_the_metrics_are_those_of_the_bundle(alone):
    output, summary = alone
    metrics, (truth, outputs) = summary["metrics"], _validated(output)
    info = Bundle.load(str(output / "bundle")).info
    assert info.is_multi_label
    assert info.class_names == ["0", "1", "2", "3", "4"]
    assert info.config["multi_label"] is True
    assert info.config["select"] == "mean_average_precision"
    given = outputs.probabilities >= info.thresholds
    average_precision = sklearn.metrics.average_precision_score(truth, outputs.logits, average="macro")
    assert metrics["val_mean_average_precision"] == pytest.approx(average_precision, abs=1e-3)
    assert metrics["val_macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, given, average="macro"), abs=1e-3)
    assert metrics["val_micro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, given, average="micro"), abs=1e-3)
    subset = sklearn.metrics.accuracy_score(truth, outputs.logits > 0)
    assert metrics["val_subset_accuracy"] == pytest.approx(subset, abs=1e-6)
    log_loss = np.mean(
        [sklearn.metrics.log_loss(*pair) for pair in zip(truth.T, outputs.probabilities.T, strict=True)]
    )
    assert metrics["val_loss"] == pytest.approx(log_loss, rel=1e-4)
    assert sum(info.class_counts.values()) > 200  # labels, of fewer images


def test_two_workers_and_decoded_images_give_the_same_weights(grids, alone, tmp_path):
    summary = train(_config(grids, tmp_path / "run", max_workers=2, cache="memory"))
    weights, _ = final_state(tmp_path / "run")
    expected, _ = final_state(alone[0])
    assert largest_difference(weights, expected) < 1e-3  # of roundings, 1.5e-4 was measured; test_step is stricter
    for name, value in alone[1]["metrics"].items():
        assert summary["metrics"][name] == pytest.approx(value, abs=1e-3), name
    assert summary["epochs"] == alone[1]["epochs"] == 2
    for output in (tmp_path / "run", alone[0]):
        names, *rows = (output / "history.csv").read_text().splitlines()
        assert len(rows) == 2
        assert "val_mean_average_precision" in names


def test_a_whole_recipe_learns(grids, tmp_path):
    recipe = {"optimizer": "adamw", "class_weights": "balanced"}
    train(
        _config(grids, tmp_path / "teacher", loss="focal", augment="strong", epochs=1, label_precision=0.8,
                phases="prune", **recipe)
    )  # fmt: skip
    teacher = str(tmp_path / "teacher" / "bundle")
    summary = train(_config(grids, tmp_path / "run", loss="asymmetric", teacher=teacher, epochs=6, **recipe))
    truth, outputs = _validated(tmp_path / "run")
    score, shuffled = sklearn.metrics.average_precision_score, np.random.default_rng(0)
    chance = [score(truth, shuffled.permutation(outputs.logits)) for _ in range(200)]
    assert summary["metrics"]["val_mean_average_precision"] > max(chance)


def test_lists_and_plain_labels_do_not_go_together(grids, digits, tmp_path):
    with pytest.raises(ManifestError, match="have lists of labels, and those of --validation one label each"):
        train(_config(grids, tmp_path / "run", validation=str(digits)))
    with pytest.raises(ManifestError, match="has lists of labels, which --multi-label false excludes"):
        train(_config(grids, tmp_path / "run", multi_label=False))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_prediction_gives_the_labels_of_each_image(grids, alone, tmp_path, kind):
    bundle, (truth, _) = Bundle.load(str(alone[0] / "bundle")), _validated(alone[0])
    rows = manifests.select_split(manifests.read(str(alone[0] / "manifest.parquet")), "validation")
    own = rows.append_column("labels", pa.array(["mine"] * len(rows)))
    pyarrow.parquet.write_table(own.drop_columns(["id"]), tmp_path / "images.parquet")
    summary = predict(
        PredictConfig(
            bundle=bundle.uri, input=str(tmp_path / "images.parquet"), output=str(tmp_path / "out"), format=kind,
            max_workers=1, cpus_per_worker=0.5, rows_per_part=16,
        )
    )  # fmt: skip
    written = read_rows(tmp_path / "out", kind)
    answers = Predictor(bundle)([Path(uri).read_bytes() for uri in rows["uri"].to_pylist()])
    for row, answer in zip(written, answers, strict=True):
        labels_of_row, scores = (_list(row[name]) for name in ("labels", "scores"))
        assert labels_of_row == [*answer.labels]
        assert row["prediction"] == answer.label == (answer.labels[0] if answer.labels else None)
        assert row["status"] == "ok"
        assert row["original_labels"] == "mine"
        of_class = dict(zip(bundle.info.class_names, answer.probabilities.tolist(), strict=True))
        assert scores == pytest.approx([of_class[name] for name in labels_of_row], abs=1e-6)
        assert scores == sorted(scores, reverse=True)
        expected = {
            name for name, p, t in zip(of_class, of_class.values(), bundle.info.thresholds, strict=True) if p >= t
        }
        assert {*labels_of_row} == expected
    written_summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["errors"]) == (len(truth), 0)
    for name, found in written_summary["classes"].items():
        assert found["images"] == sum(name in answer.labels for answer in answers)
    assert written_summary["drift"] is None


def test_an_evaluation_measures_what_scikit_learn_does(grids, alone, tmp_path):
    bundle, (truth, outputs) = Bundle.load(str(alone[0] / "bundle")), _validated(alone[0])
    line = evaluate(
        EvaluateConfig(
            data=str(alone[0] / "manifest.parquet"), bundle=bundle.uri, output=str(tmp_path), engine="keras"
        )
    )
    results = json.loads((tmp_path / "metrics.json").read_text())
    given = outputs.probabilities >= np.asarray(bundle.info.thresholds, np.float32)
    score = sklearn.metrics.average_precision_score
    assert line["mean_average_precision"] == results["mean_average_precision"]
    assert results["mean_average_precision"] == pytest.approx(score(truth, outputs.probabilities), abs=1e-6)
    low, high = results["intervals"]["mean_average_precision"]
    assert low < results["mean_average_precision"] < high
    for average in ("macro", "micro"):
        wanted = sklearn.metrics.f1_score(truth, given, average=average)
        assert results[f"{average}_f1"] == line[f"{average}_f1"] == pytest.approx(wanted, abs=1e-9)
    assert results["subset_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, given))
    assert [row["name"] for row in results["classes"]] == bundle.info.class_names
    assert [row["threshold"] for row in results["classes"]] == bundle.info.thresholds
    assert (line["images"], line["split"]) == (len(truth), "validation")
    html = (tmp_path / "report.html").read_text()
    assert "mean average precision" in html
    pictures = {path.stem for path in (tmp_path / "plots").iterdir()}
    wanted = {"average_precisions", "reliability", "precision_recall", "history", "samples", "mistakes"}
    assert pictures == wanted


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [({"calibrate": True}, "--calibrate is for bundles of one label"),
     ({"target_precision": 0.9}, "--target-precision is for bundles of one label"),
     ({"compare": "/nowhere"}, "--compare is for bundles of one label"),
     ({"drift": "/nowhere"}, "--drift is for bundles of one label")],
)  # fmt: skip
def test_flags_of_one_label_are_refused(grids, alone, tmp_path, flags, sentence):
    config = EvaluateConfig(data=str(grids), bundle=str(alone[0] / "bundle"), output=str(tmp_path / "out"), **flags)
    with pytest.raises(EvaluationError, match=sentence):
        (measure_drift if "drift" in flags else evaluate)(config)
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_images_of_one_label_are_evaluated_too(alone, tmp_path):
    data = str(write_digits(tmp_path / "few", 40, classes=5))
    line = evaluate(EvaluateConfig(data=data, bundle=str(alone[0] / "bundle"), output=str(tmp_path / "out")))
    assert line["images"] == 40


def test_exports_give_the_same_labels(alone, tmp_path):
    bundle, (truth, outputs) = Bundle.load(str(alone[0] / "bundle")), _validated(alone[0])
    images = _images(alone[0])
    copied = tmp_path / "bundle"
    shutil.copytree(bundle.uri, copied)
    config = ExportConfig(
        bundle=str(copied), formats=["saved_model", "onnx", "onnx-int8", "litert", "litert-int8"],
        calibration=str(alone[0] / "manifest.parquet"), calibration_images=32, threads=1,
        max_accuracy_drop=1.0,  # this network has learnt next to nothing
    )  # fmt: skip
    export(config)
    exported = Bundle.load(str(copied)).info.exports
    score = sklearn.metrics.average_precision_score(truth, outputs.probabilities)
    assert exported["keras"]["accuracy"] == pytest.approx(score, abs=1e-6)
    for name in ("onnx", "onnx-int8", "litert", "litert-int8"):
        engine = engines.load_engine(Bundle.load(str(copied)), name, 1)
        found = engine(images)
        np.testing.assert_allclose(found, outputs.probabilities, atol=1e-4 if "int8" not in name else 0.1)
        # The last sigmoid is not quantized in ONNX, and in LiteRT to 1/256.
        of_256 = np.abs(256 * found - np.round(256 * found)).max()
        assert (of_256 < 1e-4) == (name == "litert-int8")
        assert exported[name]["accuracy"] == pytest.approx(
            sklearn.metrics.average_precision_score(truth, found), abs=1e-6
        )
    import tensorflow as tf

    served = tf.saved_model.load(str(copied / "saved_model")).signatures["serving_default"](image=tf.constant(images))
    np.testing.assert_array_equal(served["labels"].numpy(), served["probabilities"].numpy() >= bundle.info.thresholds)
    properties = {item.key: item.value for item in onnx.load(copied / "model.onnx").metadata_props}
    assert json.loads(properties["thresholds"]) == bundle.info.thresholds


def test_a_search_chooses_by_mean_average_precision(grids, tmp_path):
    flags = {
        "architecture": "small_cnn", "image_size": 16, "epochs": 1, "batch_size": 32, "max_workers": 1,
        "cpus_per_worker": 0.5, "cache": "memory", "data_checks": False, "trials": 1,
        "search": {"learning_rate": {"grid_search": [1e-3]}},
    }  # fmt: skip
    config = SearchConfig(data=str(grids), output=str(tmp_path / "out"), **flags)
    with pytest.raises(SearchError, match="have val_mean_average_precision in its place"):
        search(replace(config, metric="val_accuracy"))
    summary = search(config)
    (row,) = csv.DictReader((tmp_path / "out" / "trials.csv").open())
    assert summary["val_mean_average_precision"] == float(row["val_mean_average_precision"])
    assert "val_accuracy" not in summary.keys() | row.keys()
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["multi_label"] is True


def test_an_interrupted_run_counts_the_labels_of_the_parts_that_are_there(grids, alone, tmp_path):
    config = PredictConfig(
        bundle=str(alone[0] / "bundle"), input=str(grids.parent / "*.png"), output=str(tmp_path / "out"),
        format="csv", max_workers=1, cpus_per_worker=0.5, rows_per_part=64,
    )  # fmt: skip
    predict(config)
    whole = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert whole["ok"] == 240
    (tmp_path / "out" / "summary.json").unlink()
    sorted((tmp_path / "out").glob("part-*"))[0].unlink()
    line = predict(config)
    again = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 < line["classified"] < 240
    assert (again["classes"], again["ok"]) == (whole["classes"], 240)


def test_a_loss_that_is_not_finite_ends_the_run(grids, tmp_path):
    with pytest.raises(TrainingError, match=r"loss became (nan|inf) in epoch 1: .*lower --learning-rate"):
        train(_config(grids, tmp_path / "run", learning_rate=1e30, synchronized_batch_norm=False))


def test_probes_know_label_sets(grids, tmp_path):
    config = _config(grids, tmp_path / "run", optimizer="adamw", architecture="resnet9_small")
    assert check_sanity(config)["loss"] < 0.1
    assert find_learning_rate(config)["steps"] > 10
    assert preview(replace(config, preview_augmentations=4))["images"] == 4
    assert check_data(EvaluateConfig(data=str(grids), check_data=True))["images"] == 240


def _list(value):
    return json.loads(value) if isinstance(value, str) else value
