"""Jobs on S3, well and in trouble: against moto, and against Ceph's gateway by `make test-s3`."""

import csv
import io
import json
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.job import evaluate
from cnnray.images import containers, storage, stream
from cnnray.images import manifest as manifests
from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import build_manifest
from cnnray.models.bundle import Bundle
from cnnray.models.export import ExportConfig, export
from cnnray.models.predictor import Predictor
from cnnray.prediction import job
from cnnray.prediction.config import PredictConfig
from cnnray.training.config import TrainConfig
from cnnray.training.job import train
from cnnray.training.output import TrainingError
from tests.conftest import write_tar
from tests.networks import coloured_noise

pytestmark = pytest.mark.s3


def _small_training(bucket, **flags):
    """An epoch of a small network on the bucket's digits, with one worker that reads from S3."""
    defaults = {
        "data": f"{bucket}/digits", "architecture": "small_cnn", "image_size": 16, "epochs": 1, "batch_size": 64,
        "max_workers": 1, "cpus_per_worker": 0.5, "cache": "none", "augment": "none",
    }  # fmt: skip
    return TrainConfig(**defaults | flags)


def test_parquet_with_images_on_s3(bucket, digits):
    files = [file.uri for file in storage.files(str(digits))][:20]
    table = pa.table({"image": [storage.read_bytes(uri) for uri in files], "label": ["ab"[i % 2] for i in range(20)]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=8)
    storage.write_bytes(f"{bucket}/data/train-0.parquet", buffer.getvalue())
    manifest = build_manifest(f"{bucket}/data", labelled=True)
    (block,) = stream.decoded(manifest, Geometry.of(8), cpus_per_task=0.25).iter_batches(
        batch_size=None, batch_format="numpy"
    )
    assert not any(block["error"])
    expected = [decode(storage.read_bytes(uri), Geometry.of(8)) for uri in files]
    np.testing.assert_array_equal(block["image"], expected)


def test_train_from_s3_to_s3(bucket, digits, caplog):
    storage.copy_folder(str(digits), f"{bucket}/digits")
    storage.write_bytes(f"{bucket}/digits/3/bad.png", b"nothing")
    config = _small_training(bucket, output=f"{bucket}/runs/1", checkpoint_every_steps=10, schedule="constant")
    summary = train(config)
    assert f"data: unreadable: {bucket}/digits/3/bad.png" in caplog.text
    assert summary["bundle"] == f"{bucket}/runs/1/bundle"
    read = {file.uri.removeprefix(f"{bucket}/runs/1/"): file.size for file in storage.files(f"{bucket}/runs/1")}
    for name in ("bundle/bundle.json", "bundle/model.keras", "history.csv", "config.yaml", "manifest.parquet"):
        assert read[name] > 0
    assert any(name.startswith("tensorboard/train/events") for name in read)
    bad = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{bucket}/runs/1/bad_images.csv").decode())))
    assert [row["uri"] for row in bad] == [f"{bucket}/digits/3/bad.png"]
    rows = manifests.read(f"{bucket}/runs/1/manifest.parquet").to_pylist()[:3]
    answers = Predictor(Bundle.load(summary["bundle"]))([storage.read_bytes(row["uri"]) for row in rows])
    assert [len(answer.probabilities) for answer in answers] == [10] * 3
    export(ExportConfig(bundle=summary["bundle"], calibration=f"{bucket}/digits", formats=["saved_model", "onnx"]))
    assert storage.is_file(f"{summary['bundle']}/saved_model/saved_model.pb")
    exported = Predictor(Bundle.load(summary["bundle"]), engine="onnx")
    again = exported([storage.read_bytes(row["uri"]) for row in rows])
    assert [answer.label for answer in again] == [answer.label for answer in answers]
    line = evaluate(
        EvaluateConfig(bundle=summary["bundle"], data=f"{bucket}/runs/1/manifest.parquet", output=f"{bucket}/report")
    )
    assert line["images"] == 40
    assert storage.read_bytes(line["report"]).startswith(b"<!doctype html>")
    # A second time nothing is run; with more epochs it goes on from the checkpoint on S3.
    assert train(config) == summary
    assert train(replace(config, epochs=2, max_workers=2))["epochs"] == 2
    assert json.loads(storage.read_bytes(f"{bucket}/runs/1/summary.json"))["epochs"] == 2
    history = csv.DictReader(io.StringIO(storage.read_bytes(f"{bucket}/runs/1/history.csv").decode()))
    assert [row["epoch"] for row in history] == ["1", "2"]
    with pytest.raises(TrainingError, match="holds a run with"):
        train(replace(config, seed=5))
    assert not Path("s3:").exists()


@pytest.mark.parametrize(
    ("kind", "fault", "error"),
    [
        ("parquet", "deny", "access denied: "),
        ("tar", "deny", "access denied: "),
        ("tar", "throttle", "S3 asks for fewer requests"),
        ("parquet", "throttle", "S3 asks for fewer requests"),
    ],
)
def test_images_of_a_container_that_s3_refuses_have_the_reason(
    kind, fault, error, bucket, s3_proxy, tmp_path, monkeypatch
):
    contents = {f"{number}.png": b"data" for number in range(5)}
    if kind == "tar":
        write_tar(tmp_path / "0.tar", contents)
    else:
        pyarrow.parquet.write_table(pa.table({"bytes": list(contents.values())}), tmp_path / "0.parquet")
    uri = f"{bucket}/{fault}/0.{kind}"
    storage.write_bytes(uri, (tmp_path / f"0.{kind}").read_bytes())
    uris = build_manifest(uri, labelled=False)["uri"].to_pylist()
    assert list(containers.encoded(uris)) == list(contents.values())
    monkeypatch.setenv("CNNRAY_STORAGE_RETRY_SECONDS", "0")
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: fault if f"/{fault}/0." in path else None)
    sources = list(containers.encoded(uris))
    assert [str(source).startswith(error) for source in sources] == [True] * 5
    assert {isinstance(source, BadImage) for source in sources} == {fault == "deny"}


def test_predict_where_s3_answers_badly(bucket, s3_proxy, onnx_bundle, monkeypatch):
    images, targets = coloured_noise(300, 32, seed=5)
    rows = ["uri,colour"]
    expected = {}
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        uri, data = f"{bucket}/photos/{number:04d}.png", buffer.getvalue()
        expected[uri] = ["red", "green", "blue"][target]
        rows.append(f"photos/{number:04d}.png,{expected[uri]}")
        if number % 50 == 10:
            expected[uri] = "missing"
            continue
        if number % 100 == 20:
            expected[uri], data = "corrupt", data[: len(data) // 2]
        storage.write_bytes(uri, data)
    storage.write_bytes(f"{bucket}/photos.csv", "\n".join(rows).encode())
    storage.copy_folder(onnx_bundle, f"{bucket}/bundle")

    def faults(method, path, before):
        if method != "GET" or "/photos/" not in path:
            return None
        if path.endswith("/0033.png"):
            return "throttle"
        kinds = {1: "throttle", 2: "slow", 3: "break off"}
        return kinds.get(zlib.crc32(path.rpartition("/")[2].encode()) % 30) if before < 2 else None

    monkeypatch.setattr(s3_proxy, "faults", faults)
    config = PredictConfig(
        bundle=f"{bucket}/bundle",
        input=f"{bucket}/photos.csv",
        output=f"{bucket}/out",
        rows_per_part=64,
        engine="onnx",
    )
    # All images but one have their row; the one is not taken for a bad image.
    with pytest.raises(
        storage.UnavailableError, match=r"^1 of 300 images have no row.*/0033\.png.*continues with them"
    ):
        job.run(config)
    assert {"throttle", "slow", "break off"} <= set(s3_proxy.fault_counts)
    assert b"0033.png" in storage.read_bytes(f"{bucket}/out/errors.csv")
    uri = f"{bucket}/photos/0033.png"
    rows = _predicted_rows(f"{bucket}/out")
    assert {row["uri"] for row in rows} == set(expected) - {uri}
    # The same command continues, here with trouble that passes while it does.
    attempts = Counter()

    def passing(method, path, before):
        attempts[path] += 1
        is_in_trouble = (
            path.endswith("/0033.png") or "/manifest/0/rows" in path or (method == "PUT" and "/part-" in path)
        )
        return "throttle" if is_in_trouble and attempts[path] < 8 else None

    monkeypatch.setattr(s3_proxy, "faults", passing)
    line = job.run(config)
    # Of its part, only this image is read again.
    assert (line["rows"], line["errors"], line["resumed"], line["classified"]) == (300, 6 + 3, 299, 1)
    assert {path.rpartition("/")[2] for path in attempts if "/photos/" in path} == {"0033.png"}
    rows = _predicted_rows(f"{bucket}/out")
    for row in rows:
        answer = row["prediction"] or row["error"].partition(":")[0]
        assert answer == expected.pop(row["uri"]), row
        assert row["colour"] in ("red", "green", "blue")
    assert not expected
    assert len(rows) == 300
    assert job.run(config)["resumed"] == 300
    assert job.run(replace(config, verify=True))["classified"] == 0
    names = [storage.name(file.uri) for file in storage.files(f"{bucket}/out")]
    assert [name for name in sorted(names) if name.startswith("part-")] == [
        f"part-{first:012d}-0.{int(first == 0)}.parquet" for first in range(0, 300, 64)
    ]
    # Asked for, a row with an error.
    monkeypatch.setattr(s3_proxy, "faults", faults)
    asked = replace(config, output=f"{bucket}/asked", skip_unreadable=True)
    assert job.run(asked)["errors"] == 6 + 3 + 1
    (row,) = (row for row in _predicted_rows(f"{bucket}/asked") if row["uri"] == uri)
    assert row["error"].startswith("unavailable: S3 asks for fewer requests")


def _predicted_rows(folder):
    tables = [
        pyarrow.parquet.read_table(pa.BufferReader(storage.read_bytes(file.uri)))
        for file in storage.files(folder)
        if "/part-" in file.uri
    ]
    return pa.concat_tables(tables).to_pylist()


def test_training_where_s3_is_in_trouble_goes_on_later(bucket, digits, s3_proxy, monkeypatch):
    storage.copy_folder(str(digits), f"{bucket}/digits")
    config = _small_training(bucket, output=f"{bucket}/undisturbed", epochs=2, data_checks=False, max_failures=0)
    undisturbed = train(config)
    s3_proxy.forget_requests()
    throttled = manifests.read(f"{bucket}/undisturbed/manifest.parquet")["uri"][7].as_py().rpartition("/")[2]

    def faults(method, path, before):
        return "throttle" if path.endswith(throttled) and before else None  # the first epoch reads it

    monkeypatch.setattr(s3_proxy, "faults", faults)
    config = replace(config, output=f"{bucket}/disturbed")
    with pytest.raises(storage.UnavailableError, match=f"S3 asks for fewer requests, at .*{throttled}"):
        train(config)
    assert not storage.exists(f"{bucket}/disturbed/summary.json")
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: None)
    summary = train(config)
    assert summary["epochs"] == 2
    assert summary["metrics"] == pytest.approx(undisturbed["metrics"], abs=1e-5)
    assert not storage.exists(f"{bucket}/disturbed/bad_images.csv")
