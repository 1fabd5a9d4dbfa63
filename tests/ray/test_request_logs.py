"""What a service has answered, compared with its answers to the validation images; and labels that come later."""

import dataclasses
import json
import re
import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.drift import measure_drift
from cnnray.models import bundle as bundles
from cnnray.models.answers import Decision, Threshold
from cnnray.models.bundle import Bundle
from cnnray.models.drift import BINS, Distribution
from cnnray.serving.request_log import SCHEMA
from tests.networks import coloured_noise

START = datetime(2026, 11, 1, tzinfo=UTC)
NAMES = ("red", "green", "blue")


@pytest.fixture
def bundle(onnx_bundle, tmp_path):
    """A bundle whose validation images were of all classes, with confidences from 0.5 on."""
    folder = tmp_path / "known"
    shutil.copytree(onnx_bundle, folder)
    reference = Distribution(np.full(3, 100), np.repeat([0, 30], [BINS - 10, 10]))
    info = dataclasses.replace(Bundle.load(str(folder)).info, reference=reference.as_dict())
    bundles.write_info(str(folder), info)
    return Bundle.load(str(folder))


def _write(folder, rows, name="a.parquet"):
    path = folder / f"date={rows[0]['time']:%Y-%m-%d}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), path)


def _rows(version, day, count, shares, images=None, seed=0):
    """Rows of a day whose answers have these shares, and confidences like the reference."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = NAMES[generator.choice(3, p=shares)]
        rows.append({
            "time": START + timedelta(days=day, seconds=number), "request_id": f"{day}-{number}", "index": 0,
            "model": "model", "version": version, "prediction": label, "confidence": generator.uniform(0.5, 1),
            "image": images[number] if images else None,
        })  # fmt: skip
    return rows


def _measure(bundle, tmp_path, **options):
    defaults = {"bundle": bundle.uri, "drift": str(tmp_path / "log"), "output": str(tmp_path / "out")}
    line = measure_drift(EvaluateConfig(**defaults | options))
    return line, json.loads((tmp_path / "out" / "drift.json").read_bytes())


def test_a_day_of_other_answers_is_found(bundle, tmp_path):
    version = bundle.version
    for day, shares in enumerate([(1 / 3, 1 / 3, 1 / 3), (0.3, 0.4, 0.3), (0.05, 0.05, 0.9)]):
        rows = _rows(version, day, 400, shares, seed=day)
        _write(tmp_path / "log", rows[:100], "a.parquet")
        _write(tmp_path / "log", rows[100:], "b.parquet")
    errors = [_rows(version, 0, 1, (1, 0, 0))[0] | {"prediction": None, "confidence": None, "error": "empty"}]
    _write(tmp_path / "log", errors + _rows("other-1", 0, 7, (1, 0, 0)), "c.parquet")
    line, results = _measure(bundle, tmp_path)
    assert (line["images"], line["windows"], line["drifted"], line["accuracy"]) == (1200, 3, 1, None)
    assert [window["start"][:10] for window in results["windows"]] == ["2026-11-01", "2026-11-02", "2026-11-03"]
    assert [window["drifted"] for window in results["windows"]] == [[], [], ["classes"]]
    assert [window["errors"] for window in results["windows"]] == [1, 0, 0]
    assert results["other_versions"] == {"other-1": 7}
    assert results["windows"][0]["drift"]["classes"]["effect_size"] < 0.2
    report = (tmp_path / "out" / "drift.html").read_text()
    assert "other-1" in report
    assert not re.search(r'(src|href)="(?!data:)', report)
    # Two weeks make one window, with half a day's drift.
    line, results = _measure(bundle, tmp_path, window_hours=24 * 14)
    assert line["windows"] == 1


def test_few_answers_say_nothing(bundle, tmp_path):
    _write(tmp_path / "log", _rows(bundle.version, 0, 99, (1, 0, 0)))
    line, results = _measure(bundle, tmp_path)
    assert (line["drifted"], results["windows"][0]["drift"]) == (0, {"classes": None, "confidences": None})


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels_that_come_later_give_accuracy(bundle, tmp_path, kind):
    rows = _rows(bundle.version, 0, 200, (0.3, 0.3, 0.4)) + _rows(bundle.version, 1, 200, (0.3, 0.3, 0.4))
    rows.append(rows[0] | {"index": 1, "prediction": "green"})
    _write(tmp_path / "log", rows)
    # Of the first day 60 labels, 6 of them wrong and one of a class that the network does not know.
    labels = [{"request_id": row["request_id"], "label": row["prediction"], "index": 0} for row in rows[:60]]
    for row in labels[:5]:
        row["label"] = NAMES[(NAMES.index(row["label"]) + 1) % 3]
    labels[5]["label"] = "purple"
    labels.insert(0, labels[10] | {"label": "wrong"})  # a later one takes its place
    labels += [
        {"request_id": "unknown", "label": "red", "index": 0},
        {"request_id": "0-0", "label": "green", "index": 1},
        {"request_id": "0-100", "label": "", "index": 0},  # not known yet
    ]
    table, path = pa.Table.from_pylist(labels), tmp_path / f"labels.{kind}"
    if kind == "csv":
        pyarrow.csv.write_csv(table, path)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in labels))
    line, results = _measure(bundle, tmp_path, labels=str(path))
    first, second = results["windows"]
    assert (first["labelled"], first["unknown_labels"], second["labelled"]) == (61, 1, 0)
    assert first["accuracy"]["accuracy"] == line["accuracy"] == pytest.approx(55 / 61)
    assert first["accuracy"]["low"] < 55 / 61 < first["accuracy"]["high"]
    assert second["accuracy"] is None


def test_embeddings_of_other_images_are_found(onnx_bundle, tmp_path):
    """The bundle does not say what it answered to its validation images: they are predicted."""
    bundle = Bundle.load(onnx_bundle)
    data = tmp_path / "data"
    images, targets = coloured_noise(240, 32, seed=1)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        (data / NAMES[target]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(data / NAMES[target] / f"{number}.png")

    def encoded(images):
        files = []
        for number, image in enumerate(images):
            Image.fromarray(image).save(path := tmp_path / f"{number}.png")
            files.append(path.read_bytes())
        return files

    same, _ = coloured_noise(120, 32, seed=2)
    dark = (coloured_noise(120, 32, seed=3)[0] // 4).astype(np.uint8)
    for day, kept in enumerate((same, dark)):
        _write(tmp_path / "log", _rows(bundle.version, day, 120, (0.3, 0.3, 0.4), encoded(kept), seed=day))
    with pytest.raises(EvaluationError, match="by --data"):
        _measure(bundle, tmp_path)
    _, results = _measure(bundle, tmp_path, data=str(data), engine="onnx")
    first, second = (window["embeddings"] for window in results["windows"])
    assert first["auc"] < 0.64 < 0.9 < second["auc"]
    assert "embeddings" in results["windows"][1]["drifted"]
    assert "embeddings" not in results["windows"][0]["drifted"]
    assert sum(results["reference_answers"]["classes"]) == 240
    assert "Embeddings" in (tmp_path / "out" / "drift.html").read_text()


def test_the_reference_is_of_the_validation_images_where_there_are_some(onnx_bundle, tmp_path):
    images, _ = coloured_noise(30, 32, seed=1)
    for number, image in enumerate(images):
        split = "validation" if number < 12 else "train"
        path = tmp_path / "data" / split / NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    bundle = Bundle.load(onnx_bundle)
    _write(tmp_path / "log", _rows(bundle.version, 0, 120, (0.3, 0.3, 0.4)))
    _, results = _measure(bundle, tmp_path, data=str(tmp_path / "data"), engine="onnx")
    assert sum(results["reference_answers"]["classes"]) == 12
    _, results = _measure(bundle, tmp_path, data=str(tmp_path / "data"), engine="onnx", split="all")
    assert sum(results["reference_answers"]["classes"]) == 30


def test_mistakes_get_a_sentence(bundle, tmp_path):
    with pytest.raises(FileNotFoundError):
        _measure(bundle, tmp_path)
    _write(tmp_path / "log", _rows("other-1", 0, 3, (1, 0, 0)))
    with pytest.raises(EvaluationError, match="versions with answers: other-1"):
        _measure(bundle, tmp_path)
    pyarrow.parquet.write_table(pa.table({"x": [1]}), tmp_path / "log" / "x.parquet")
    with pytest.raises(EvaluationError, match="no file of a request log"):
        _measure(bundle, tmp_path)
    (tmp_path / "log" / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="no file of a request log"):
        _measure(bundle, tmp_path)
    labels = tmp_path / "labels.csv"
    labels.write_text("id,label\n1,red\n")
    with pytest.raises(EvaluationError, match="lacks the column request_id"):
        _measure(bundle, tmp_path, labels=str(labels))
    labels.write_text("request_id,label,index\n1,red,first\n")
    with pytest.raises(EvaluationError, match="index must be whole numbers"):
        _measure(bundle, tmp_path, labels=str(labels))
    labels.write_text("request_id,label\n1\n")
    with pytest.raises(EvaluationError, match="is no CSV, JSONL or Parquet table"):
        _measure(bundle, tmp_path, labels=str(labels))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "--data is needed"),
        ({"data": "/d", "labels": "/l"}, "need --drift"),
        ({"data": "/d", "window_hours": 1}, "need --drift"),
        ({"drift": "/log", "calibrate": True}, "--calibrate does not go with --drift"),
        ({"drift": "/log", "window_hours": 0}, "--window-hours"),
        ({"drift": "/log", "output": "/log/out"}, "would be read as its log"),
    ],
)
def test_flags_that_do_not_go_together(flags, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        EvaluateConfig(**{"bundle": "/b", "output": "/o"} | flags)


def test_the_precision_of_the_answers_of_a_bundle_that_may_be_unsure(bundle, tmp_path):
    threshold = Threshold(confidence=0.6, candidate=0.2, images=400, coverage=0.8, observed_precision=1.0)
    decision = Decision(precision=0.9, certainty=0.95, candidate_coverage=0.95, thresholds={"float32": threshold})
    bundles.write_info(bundle.uri, dataclasses.replace(bundle.info, decision=decision))
    bundle = Bundle.load(bundle.uri)
    rows = _rows(bundle.version, 0, 200, (0.3, 0.3, 0.4))
    labels = [{"request_id": row["request_id"], "label": row["prediction"]} for row in rows[:100]]
    for number, row in enumerate(rows):
        row["unsure"] = number % 4 == 0
        if number < 100 and number % 5 == 0:  # wrong: five of those that are unsure, and 15 answers
            labels[number]["label"] = NAMES[(NAMES.index(row["prediction"]) + 1) % 3]
    _write(tmp_path / "log", rows)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    _, results = _measure(bundle, tmp_path, labels=str(tmp_path / "labels.jsonl"))
    (window,) = results["windows"]
    assert (window["images"], window["unsure"], window["labelled"]) == (200, 50, 100)
    assert window["accuracy"]["accuracy"] == 0.8
    assert (window["precision"]["precision"], window["guaranteed_precision"]) == (60 / 75, 0.9)
    report = (tmp_path / "out" / "drift.html").read_text()
    assert "precision of the answers (90.00 % guaranteed)" in report
    assert "<td>50</td><td>80.00 %</td>" in report
