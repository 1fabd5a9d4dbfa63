"""Evaluations on a cluster: every labelled image once, metrics equal to scikit-learn's, calibration, comparison."""

import collections
import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
import pytest
import sklearn.metrics
from PIL import Image

from cnnray.evaluation import job, report
from cnnray.evaluation import rows as rows_module
from cnnray.evaluation.comparison import EvaluationError, UndecidedError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.data_checks import check_data
from cnnray.evaluation.job import evaluate
from cnnray.images.manifest import ManifestError, build_manifest
from cnnray.models.bundle import Bundle, BundleError, write_info
from cnnray.models.drift import BINS
from cnnray.models.predictor import Predictor
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.dispatch import PredictionError
from cnnray.prediction.job import run as run_prediction
from tests.networks import coloured_noise
from tests.runs import read_rows

IMAGES = 101  # neither batches of 7 nor 2 workers divide it
BROKEN = ("red/broken.png", "blue/empty.png")
NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Class folders with coloured noise, some of it in the wrong folder, and two files that are no images."""
    root = tmp_path_factory.mktemp("labelled")
    images, targets = coloured_noise(IMAGES, 40, seed=5)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        label = NAMES[(target + (number % 9 == 0)) % 3]
        path = root / label / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (root / BROKEN[0]).write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / BROKEN[1]).touch()
    return root


@pytest.fixture(scope="module")
def evaluated(labelled, onnx_bundle, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "out"
    line = evaluate(
        EvaluateConfig(bundle=onnx_bundle, data=str(labelled), output=str(output), engine="onnx", batch_size=7,
                       max_workers=2, wanted_accuracy=0.9)
    )  # fmt: skip
    return line, output


def test_every_image_has_a_row_and_images_with_errors_do_not_count_in_the_accuracy(evaluated, labelled):
    line, output = evaluated
    assert (line["images"], line["errors"], line["split"]) == (IMAGES + 2, 2, "all")
    assert "top_5_accuracy" not in line  # of three classes
    rows = pyarrow.parquet.read_table(output / "predictions.parquet").to_pylist()
    assert {row["uri"] for row in rows} == {str(path) for path in labelled.rglob("*.png")}
    assert len(rows) == IMAGES + 2
    bad = {row["uri"]: row["error"] for row in rows if row["error"]}
    assert bad.keys() == {str(labelled / name) for name in BROKEN}
    good = [row for row in rows if not row["error"]]
    correct = sum(row["prediction"] == row["label"] for row in good)
    assert line["accuracy"] == pytest.approx(correct / IMAGES, rel=1e-12)
    assert 0.8 < line["accuracy"] < 1
    report = (output / "report.html").read_text()
    for name in BROKEN:
        assert name in report
    results = json.loads((output / "metrics.json").read_text())
    assert sum(results["errors_by_reason"].values()) == 2
    assert results["guarantee"] is None
    assert "that takes at least 39 images" in " ".join(report.split())


def test_the_report_says_from_which_confidence_on_answers_are_guaranteed(evaluated, onnx_bundle, labelled):
    _, output = evaluated
    table = pyarrow.parquet.read_table(output / "predictions.parquet")
    rows = table.filter(pyarrow.compute.is_null(table["error"])).to_pylist()
    many = pa.Table.from_pylist(rows * 5)
    probabilities = np.stack([np.eye(3)[["red", "green", "blue"].index(row["prediction"])] for row in rows] * 5)
    bundle = Bundle.load(onnx_bundle)
    config = EvaluateConfig(bundle=onnx_bundle, data=str(labelled), output=str(output), wanted_accuracy=0.7)
    predictions = rows_module.make_predictions(many, probabilities.astype(np.float32), bundle)
    results = job._describe(config, bundle, "onnx", "all", many, None) | job._measure(config, bundle, predictions)
    guarantee = results["guarantee"]
    assert (guarantee["precision"], guarantee["certainty"], guarantee["coverage"]) == (0.7, 0.95, 1)
    assert guarantee["images"] == int(0.75 * len(many))
    pictures = {path.stem: b"" for path in (output / "plots").glob("*.png")}
    text = " ".join(report.render(results, [], pictures).split())
    assert "With a certainty of 95.00 %, at least 70.00 % of the predictions for other images like these are" in text
    assert "from a confidence of 1 on; 100.00 % of the images have it" in text


def test_metrics_equal_scikit_learns_on_the_same_predictions(evaluated):
    _, output = evaluated
    parts = [pyarrow.parquet.read_table(path) for path in sorted((output / "predictions").glob("part-*"))]
    rows = [row for part in parts for row in part.to_pylist() if not row["error"]]
    names = ["red", "green", "blue"]
    truth = [names.index(row["label"]) for row in rows]
    scores = np.asarray([row["probabilities"] for row in rows], np.float64)
    scores /= scores.sum(1, keepdims=True)
    best = scores.argmax(1)
    results = json.loads((output / "metrics.json").read_text())
    assert [row["name"] for row in results["classes"]] == names
    for name, expected in {
        "accuracy": sklearn.metrics.accuracy_score(truth, best),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, best),
        "top_2_accuracy": sklearn.metrics.top_k_accuracy_score(truth, scores, k=2),
        "log_loss": sklearn.metrics.log_loss(truth, scores),
        "macro_f1": sklearn.metrics.f1_score(truth, best, average="macro"),
        "weighted_recall": sklearn.metrics.recall_score(truth, best, average="weighted"),
        "macro_roc_auc": sklearn.metrics.roc_auc_score(truth, scores, multi_class="ovr"),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(truth, best),
    }.items():
        assert results[name] == pytest.approx(expected, rel=1e-12), name
    assert results["confusion_matrix"] == sklearn.metrics.confusion_matrix(truth, best).tolist()


def test_an_evaluation_writes_pictures_and_reuses_existing_predictions(evaluated, onnx_bundle, labelled):
    line, output = evaluated
    names = {path.stem for path in (output / "plots").glob("*.png")}
    assert {"confusion_matrix", "roc", "reliability", "coverage", "samples_grad_cam", "mistakes"} <= names
    for path in (output / "plots").iterdir():
        with Image.open(path) as image:
            assert image.width > 200
    (part,) = (output / "predictions").glob("part-*")
    before = part.stat().st_mtime_ns
    again = evaluate(
        EvaluateConfig(
            bundle=onnx_bundle, data=str(labelled), output=str(output), engine="onnx", wanted_accuracy=0.8,
            data_checks=False,
        )
    )  # fmt: skip
    assert again["accuracy"] == line["accuracy"]
    assert part.stat().st_mtime_ns == before


@pytest.mark.parametrize("values", [[np.nan, 0.5, 0.5], [0, 0, 0]])
def test_predictions_of_an_earlier_version_that_are_none_are_refused(values, evaluated, onnx_bundle):
    rows, probabilities = rows_module.read_rows(str(evaluated[1] / "predictions"))
    probabilities[7] = values
    with pytest.raises(EvaluationError, match=r"1 of 101 predictions of an earlier version .* --overwrite"):
        rows_module.make_predictions(rows, probabilities, Bundle.load(onnx_bundle))


def test_a_calibrated_bundle_is_published_and_its_temperature_applied_everywhere(onnx_bundle, labelled, tmp_path):
    source = shutil.copytree(onnx_bundle, tmp_path / "run" / "bundle")
    reference = {"classes": [1, 2, 3], "confidences": [6, *[0] * (BINS - 1)]}
    write_info(str(source), dataclasses.replace(Bundle.load(onnx_bundle).info, reference=reference))
    (tmp_path / "run" / "history.csv").write_text("epoch,loss,val_loss,accuracy,val_accuracy\n1,2.5,2.5,0.5,0.5\n")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    config = EvaluateConfig(bundle=str(source), data=str(labelled), output=str(tmp_path / "out"), calibrate=True)
    line = evaluate(config)
    # The evaluated bundle may be in service, and is not touched.
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    bundle = tmp_path / "out" / "bundle"
    assert line["bundle"] == str(bundle)
    assert {path.relative_to(bundle) for path in bundle.rglob("*")} == {
        path.relative_to(source) for path in source.rglob("*")
    }
    info = Bundle.load(str(bundle)).info
    assert (info.parent, info.training) == (Bundle.load(str(source)).version, str(tmp_path / "run"))
    assert Bundle.load(str(bundle)).version != info.parent
    # The images are not those of the training's validation, whose confidences are not known now.
    assert info.reference == {"classes": [1, 2, 3], "confidences": [0] * BINS}
    before_it = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert line["temperature"] == info.temperature == before_it["calibration"]["fitted_temperature"] != 1
    images = [path.read_bytes() for path in sorted(labelled.rglob("0*.png"))]
    for engine in ("keras", "onnx"):
        earlier = Predictor(Bundle.load(onnx_bundle), engine=engine)(images)
        after = Predictor(Bundle.load(str(bundle)), engine=engine)(images)
        assert [prediction.label for prediction in earlier] == [prediction.label for prediction in after]
        powers = np.stack([prediction.probabilities for prediction in earlier]).astype(np.float64) ** (
            1 / info.temperature
        )
        np.testing.assert_allclose(
            np.stack([prediction.probabilities for prediction in after]),
            powers / powers.sum(1, keepdims=True),
            atol=1e-5,
        )
    # The same command again publishes nothing else; one that would is refused.
    published = {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.name != "bundle.json"}
    assert evaluate(config)["bundle"] == str(bundle)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.name != "bundle.json"} == published
    # Nor does it take away what the published bundle got since.
    exported = dataclasses.replace(info, exports=info.exports | {"litert": info.exports["onnx"]})
    write_info(str(bundle), exported)
    assert evaluate(config)["bundle"] == str(bundle)
    assert Bundle.load(str(bundle)).info == exported
    changed = dataclasses.replace(info, temperature=9.0)
    write_info(str(bundle), changed)
    with pytest.raises(BundleError, match=f"{bundle} holds another bundle, .*, which may be in use"):
        evaluate(config)
    assert Bundle.load(str(bundle)).info == changed
    write_info(str(bundle), info)
    # The predictions of the bundle that was evaluated stay.
    write_info(str(source), dataclasses.replace(info, temperature=2.0))
    with pytest.raises(PredictionError, match="holds a run with the model"):
        evaluate(config)
    assert (tmp_path / "out" / "report.html").exists()
    evaluate(
        EvaluateConfig(
            bundle=str(bundle), data=str(labelled), output=str(tmp_path / "again"), engine="keras", data_checks=False
        )
    )
    assert (tmp_path / "again" / "plots" / "history.png").exists()  # of the training of the evaluated one
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["calibration"]["fitted_temperature"] == pytest.approx(info.temperature, rel=1e-2)
    # The temperature is the one of the lowest log loss; the calibration error of few images may rise with it.
    assert again["log_loss"] < before_it["log_loss"]


def test_a_bundle_that_is_unsure_is_published_and_keeps_its_promise(onnx_bundle, labelled, tmp_path):
    groups = {"red": "warm", "green": "cold", "blue": "cold"}
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    config = EvaluateConfig(
        bundle=onnx_bundle, data=str(labelled), output=str(tmp_path / "out"), target_precision=0.7,
        hierarchy=str(tmp_path / "groups.json"), data_checks=False,
    )  # fmt: skip
    line = evaluate(config)
    bundle = Bundle.load(line["bundle"])
    assert bundle.info.groups == groups
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert line["group_accuracy"] == measured["group_accuracy"] >= line["accuracy"]
    assert [(row["name"], row["classes"]) for row in measured["groups"]] == [("cold", 2), ("warm", 1)]
    assert "accuracy of the class" in (tmp_path / "out" / "report.html").read_text()
    decision = bundle.info.decision
    assert (decision.precision, decision.certainty, decision.candidate_coverage) == (0.7, 0.95, 0.95)
    assert decision.thresholds.keys() == {"float32"}
    threshold = decision.thresholds["float32"]
    assert (line["threshold"], line["coverage"]) == (threshold.confidence, threshold.coverage)
    assert bundle.info.temperature == line["temperature"] == 1
    # The same command again publishes nothing else.
    assert evaluate(config)["bundle"] == bundle.uri
    assert Bundle.load(bundle.uri).version == bundle.version

    # A threshold that half of the images miss, to see both kinds of rows.
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "predictions.parquet")
    middle = float(np.sort(rows["confidence"].drop_null().to_numpy())[IMAGES // 2 :][:2].mean())
    strict = dataclasses.replace(threshold, confidence=middle, candidate=0.05, group=0.5, group_below=middle)
    write_info(
        bundle.uri,
        dataclasses.replace(bundle.info, decision=dataclasses.replace(decision, thresholds={"float32": strict})),
    )
    bundle = Bundle.load(bundle.uri)
    for engine in ("onnx", "keras"):
        summary = run_prediction(
            PredictConfig(
                bundle=bundle.uri, input=str(labelled), output=str(tmp_path / engine), engine=engine,
                max_error_fraction=1.0,
            )
        )  # fmt: skip
        rows = read_rows(tmp_path / engine)
        states = collections.Counter(row["status"] for row in rows)
        assert {state: states[state] for state in ("ok", "unsure", "error")} == {
            "ok": summary["ok"], "unsure": summary["unsure"], "error": summary["errors"],
        }  # fmt: skip
        assert states["ok"] > 40
        assert states["unsure"] > 40
        for row in rows:
            assert (row["prediction"] is None) == (row["status"] != "ok")
            assert (row["candidates"] is None) == (row["status"] != "unsure")
            assert row["group"] is None or row["status"] == "unsure"
        named = sum(row["group"] is not None for row in rows)
        assert named == states["unsure"]  # of two groups one has at least 0.5
    # An evaluation measures the network, and says what its answers are.
    again = evaluate(
        EvaluateConfig(bundle=bundle.uri, data=str(labelled), output=str(tmp_path / "again"), data_checks=False)
    )
    assert again["accuracy"] == line["accuracy"]
    answers = json.loads((tmp_path / "again" / "metrics.json").read_text())["answers"]
    assert (answers["unsure"], answers["guaranteed_precision"]) == (summary["unsure"], 0.7)
    assert answers["group_coverage"] == named / answers["unsure"]
    assert "It names the group of" in (tmp_path / "again" / "report.html").read_text()
    sentence = f"The bundle answers from a confidence of {middle:.6g} on"
    assert sentence in (tmp_path / "again" / "report.html").read_text()
    # Another temperature makes the thresholds void.
    line = evaluate(
        EvaluateConfig(
            bundle=bundle.uri, data=str(labelled), output=str(tmp_path / "calibrated"), calibrate=True,
            data_checks=False,
        )
    )  # fmt: skip
    assert Bundle.load(line["bundle"]).info.decision is None


@pytest.mark.parametrize(
    ("precision", "calibrate", "sentence"),
    [
        (0.99, False, r"on 103 images: at least 399 are needed"),
        (0.7, True, r"--calibrate fits to a quarter of the images, and needs 50: these are 103 images"),
        (0.95, False, r"No threshold shows a precision of 0\.95 on these 101 images"),
    ],
)
def test_a_promise_that_cannot_be_shown_is_refused(precision, calibrate, sentence, onnx_bundle, labelled, tmp_path):
    config = EvaluateConfig(
        bundle=onnx_bundle, data=str(labelled), output=str(tmp_path / "out"), target_precision=precision,
        calibrate=calibrate, engine="onnx", data_checks=False,
    )  # fmt: skip
    with pytest.raises(EvaluationError, match=sentence):
        evaluate(config)
    assert not (tmp_path / "out" / "bundle").exists()
    assert (tmp_path / "out" / "report.html").exists() == (precision == 0.95)


def test_a_comparison_with_the_same_and_with_a_worse_network(evaluated, onnx_bundle, labelled, tmp_path):
    _, output = evaluated
    worse = shutil.copytree(onnx_bundle, tmp_path / "worse")
    text = json.loads((worse / "bundle.json").read_text())
    text["class_names"] = ["green", "red", "blue"]  # two of them exchanged
    (worse / "bundle.json").write_text(json.dumps(text))
    arguments = {
        "data": str(labelled),
        "engine": "onnx",
        "compare": str(output / "metrics.json"),
        "data_checks": False,
        "max_error_fraction": 0.02,
    }
    config = EvaluateConfig(bundle=onnx_bundle, output=str(tmp_path / "same"), max_drop=0.05, **arguments)
    same = evaluate(config)
    saved = json.loads((tmp_path / "same" / "metrics.json").read_text())["comparison"]
    assert saved["images"] == IMAGES
    assert saved["accuracy"] == saved["other_accuracy"] == same["accuracy"]
    assert saved["mcnemar"] == {"only_this": 0, "only_other": 0, "p_value": 1.0}
    assert (saved["decision"], saved["drop"]) == ("passed", 0)
    assert saved["drop_interval"] == pytest.approx([-0.0366, 0.0366], abs=1e-4)
    with pytest.raises(UndecidedError, match=r"Undecided: .* may be more than --max-drop 0\.01 or not"):
        evaluate(dataclasses.replace(config, max_drop=0.01))
    with pytest.raises(EvaluationError, match=r"Failed: .* a loss of 0\.\d+ .*, more than --max-drop 0\.1\."):
        evaluate(EvaluateConfig(bundle=str(worse), output=str(tmp_path / "out"), max_drop=0.1, **arguments))
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparison"]
    assert saved["mcnemar"]["p_value"] < 1e-6
    report = (tmp_path / "out" / "report.html").read_text()
    assert "McNemar" in report
    assert saved["sentence"] in report


@pytest.mark.parametrize("side", ["here", "there"])
@pytest.mark.parametrize("trouble", ["one common image", "other labels", "errors"])
def test_what_cannot_be_compared_does_not_pass(trouble, side, evaluated, onnx_bundle, tmp_path):
    """The other evaluation has all images wrong, so that a comparison of what is left would pass."""
    _, output = evaluated
    rows = pyarrow.parquet.read_table(output / "predictions.parquet")
    images = rows.filter(pyarrow.compute.is_null(rows["error"])).select(["uri", "label"]).to_pylist()
    there = [row | {"prediction": NAMES[(NAMES.index(row["label"]) + 1) % 3], "error": None} for row in images]
    here = [dict(row) for row in images]
    changed = {"here": here, "there": there}[side]
    if trouble == "one common image":
        del changed[1:]
        if side == "here":  # two classes are needed
            changed.append(next(row for row in images if row["label"] != changed[0]["label"]))
    elif trouble == "other labels":
        changed[0]["label"] = NAMES[(NAMES.index(changed[0]["label"]) + 1) % 3]
    elif side == "there":
        for row in there[1:]:
            row |= {"prediction": None, "error": "throttled: slow down"}
    else:
        for number, row in enumerate(here[1:-1]):
            row["uri"] = there[number + 1]["uri"] = str(tmp_path / f"missing-{number}.png")
    (tmp_path / "there").mkdir()
    schema = pa.schema({name: pa.string() for name in ("uri", "label", "prediction", "error")})
    pyarrow.parquet.write_table(pa.Table.from_pylist(there, schema), tmp_path / "there" / "predictions.parquet")
    shutil.copy(output / "metrics.json", tmp_path / "there")
    pyarrow.csv.write_csv(pa.Table.from_pylist(here), tmp_path / "here.csv")
    sentences = {
        "one common image": "is of other images", "other labels": "has other labels for 1 of 101 images",
        "errors": r"\d+ of 101 images have no prediction, more than --max-error-fraction 0\.01",
    }  # fmt: skip
    with pytest.raises(EvaluationError, match=sentences[trouble]):
        evaluate(
            EvaluateConfig(
                bundle=onnx_bundle, data=str(tmp_path / "here.csv"), output=str(tmp_path / "out"), engine="onnx",
                compare=str(tmp_path / "there" / "metrics.json"), data_checks=False, max_drop=1.0,
            )
        )  # fmt: skip
    # What is wrong with the data or the other evaluation is found before anything is classified.
    assert (tmp_path / "out" / "report.html").exists() == (trouble == "errors" and side == "here")


def test_splits_class_names_too_few_predictions_and_retried_images(onnx_bundle, tmp_path):
    images, targets = coloured_noise(12, 32)
    names = ["red", "green", "<script>$"]
    rows = ["<i>late.png,red,validation"]
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        Image.fromarray(image).save(tmp_path / f"{number}$.png")
        rows.append(f"{number}$.png,{names[target]},{'validation' if number < 9 else 'train'}")
    table = tmp_path / "images.csv"
    table.write_text("\n".join(["uri,label,split", *rows]))
    bundle = shutil.copytree(onnx_bundle, tmp_path / "bundle")
    config = EvaluateConfig(bundle=str(bundle), data=str(table), output=str(tmp_path / "out"), engine="keras")
    with pytest.raises(EvaluationError, match=r"labels that the bundle does not know: '<script>\$'"):
        evaluate(config)
    text = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(text | {"class_names": names}))
    with pytest.raises(EvaluationError, match="no images of the split test"):
        evaluate(dataclasses.replace(config, split="test"))
    assert not (tmp_path / "out" / "config.yaml").exists()
    manifest = build_manifest(str(table), labelled=True)
    for split, count in (("auto", 10), ("all", 13), ("train", 3)):
        selected, rows = job.select_split(manifest, dataclasses.replace(config, split=split))
        assert (selected, len(rows)) == ("validation" if split == "auto" else split, count)
    with pytest.raises(EvaluationError, match="9 predictions, 0 of them wrong, do not determine a temperature"):
        evaluate(dataclasses.replace(config, calibrate=True))
    assert Bundle.load(str(bundle)).info.temperature == 1
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (results["images"], results["errors"], results["split"]) == (10, 1, "validation")
    report = (tmp_path / "out" / "report.html").read_text()
    assert "images.csv (split validation)" in report
    for name in ("<i>late", "<script>$"):
        assert name not in report
        assert name.replace("<", "&lt;").replace(">", "&gt;") in report
    Image.fromarray(images[0]).save(tmp_path / "<i>late.png")
    line = evaluate(dataclasses.replace(config, retry_errors=True, data_checks=False))
    assert (line["images"], line["errors"]) == (10, 0)
    assert "The data were not checked" in (tmp_path / "out" / "report.html").read_text()


def test_mistakes_are_reported(evaluated, onnx_bundle, labelled, tmp_path):
    _, output = evaluated
    (tmp_path / "data" / "red").mkdir(parents=True)
    (tmp_path / "data" / "green").mkdir()
    (tmp_path / "data" / "red" / "a.png").touch()
    with pytest.raises(ManifestError, match="hold no images: 'green'"):
        evaluate(EvaluateConfig(bundle=onnx_bundle, data=str(tmp_path / "data"), output=str(tmp_path / "out")))
    (tmp_path / "data" / "green" / "a.png").touch()
    config = EvaluateConfig(bundle=onnx_bundle, data=str(tmp_path / "data"), output=str(tmp_path / "out"))
    with pytest.raises(EvaluationError, match="None of the 2 images has a prediction; the first error: empty"):
        evaluate(config)
    with pytest.raises(EvaluationError, match="holds an evaluation of other images"):
        evaluate(EvaluateConfig(bundle=onnx_bundle, data=str(tmp_path / "data"), output=str(output)))
    (tmp_path / "foreign" / "predictions").mkdir(parents=True)
    part = tmp_path / "foreign" / "predictions" / "part-000000000000-0.0.parquet"
    part.touch()
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(EvaluationError, match=r"holds predictions, but no config\.yaml of an evaluation"):
            evaluate(
                EvaluateConfig(bundle=onnx_bundle, data=str(labelled), output=str(tmp_path / "foreign"), **changes)
            )
    assert part.exists()
    (tmp_path / "foreign" / "config.yaml").write_text("epochs: 3\n")
    with pytest.raises(EvaluationError, match=r"a config\.yaml of another job"):
        evaluate(EvaluateConfig(bundle=onnx_bundle, data=str(labelled), output=str(tmp_path / "foreign")))
    with pytest.raises(EvaluationError, match=r"is no metrics\.json"):
        evaluate(
            EvaluateConfig(bundle=onnx_bundle, data=str(labelled), output=str(output), engine="onnx",
                           compare=str(tmp_path / "none.json"))
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bundle": None}, "--bundle is needed"),
        ({"output": None}, "--output is needed"),
        ({"output": "/d/out"}, "lies in --data"),
        ({"engine": "x"}, "--engine 'x'"),
        ({"wanted_accuracy": 2}, "--wanted-accuracy must be 0 to 1"),
        ({"target_precision": 1}, "--target-precision must be more than 0 and less than 1, not 1"),
        ({"certainty": 0}, "--certainty must be more than 0 and less than 1, not 0"),
        ({"max_drop": -0.1}, "--max-drop must be 0 to 1"),
        ({"max_error_fraction": 2}, "--max-error-fraction must be 0 to 1"),
        ({"samples": 0}, "--samples must be 1 to 100"),
        ({"output": "/b"}, "--output /b holds --bundle /b: give another folder"),
        ({"bundle": "/b/bundle", "output": "/b"}, "--output /b holds --bundle /b/bundle: give another folder"),
        ({"calibrate": True, "engine": "onnx-int8"}, "--calibrate needs finer probabilities"),
    ],
)
def test_impossible_flags_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvaluateConfig(**{"bundle": "/b", "data": "/d", "output": "/o"} | changes)


def test_the_prediction_run_takes_the_flags_of_the_evaluation():
    config = EvaluateConfig(bundle="/b", data="/d", output="/o", engine="onnx", batch_size=3, max_workers=2)
    config = dataclasses.replace(config, retry_errors=True)
    assert config.predict_config("/o/manifest.parquet") == PredictConfig(
        bundle="/b", input="/o/manifest.parquet", output="/o/predictions", engine="onnx", batch_size=3, max_workers=2,
        retry_errors=True, probabilities=True, max_error_fraction=1.0,
    )  # fmt: skip


def test_check_data(labelled, tmp_path):
    root = shutil.copytree(labelled, tmp_path / "data")
    shutil.copy(next((root / "red").glob("*0.png")), root / "blue" / "copy.png")
    line = check_data(EvaluateConfig(data=str(root), check_data=True))
    assert (line["images"], line["unreadable"], line["copies"]) == (IMAGES + 3, 2, 1)
    assert line["findings"]["the same image under two labels"] == 1
    # Without labels there are fewer kinds of findings.
    line = check_data(EvaluateConfig(data=f"{root}/*/*.png", check_data=True))
    assert (line["images"], line["copies"]) == (IMAGES + 3, 1)
    assert "the same image under two labels" not in line["findings"]
