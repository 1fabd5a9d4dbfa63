"""The same on S3 as on a local path: against moto, and against Ceph's gateway by `make test-s3`."""

import csv
import io
import json
import uuid
import zlib
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.job import evaluate
from cnnray.images import containers, lock, storage, stream
from cnnray.images import manifest as manifests
from cnnray.images.decode import decode
from cnnray.images.manifest import ManifestError, manifest_of
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


@pytest.fixture
def bucket(s3_proxy):
    name = f"cnnray-{uuid.uuid4().hex[:8]}"
    storage._client.cache_clear()
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return request.getfixturevalue("bucket") + "/some/prefix" if request.param == "s3" else str(tmp_path)


def test_write_read_list_copy_delete(root, tmp_path_factory):
    files = {"a/1.png": b"one", "a/b/2.png": b"two", "c.txt": b"", ".hidden/x": b"x", "a/.y": b"y"}
    for name, data in files.items():
        storage.write_bytes(storage.join(root, name), data)
    assert storage.read_bytes(f"{root}/a/1.png") == b"one"
    found = storage.files(root)
    assert [(file.uri.removeprefix(root + "/"), file.size) for file in found] == [
        ("a/1.png", 3), ("a/b/2.png", 3), ("c.txt", 0),
    ]  # fmt: skip
    assert storage.folders(root) == [f"{root}/a"]
    assert storage.exists(f"{root}/a")
    assert storage.is_file(f"{root}/c.txt")
    assert not storage.is_file(f"{root}/a")
    assert not storage.exists(f"{root}/nothing")
    copied = str(tmp_path_factory.mktemp("copy"))
    storage.copy_folder(root, copied, last=["c.txt"])
    storage.copy_folder(copied, f"{root}/again")
    assert storage.read_bytes(f"{root}/again/a/b/2.png") == b"two"
    storage.delete_folder(f"{root}/a")
    storage.delete_file(f"{root}/c.txt")
    storage.delete_file(f"{root}/c.txt")
    assert [file.uri for file in storage.files(f"{root}/again")] == [
        f"{root}/again/{name}" for name in ("a/1.png", "a/b/2.png", "c.txt")
    ]
    assert not storage.exists(f"{root}/a")


def test_errors_name_the_file(root):
    storage.write_bytes(f"{root}/five", b"12345")
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.read_bytes(f"{root}/nothing")
    with pytest.raises(OverflowError, match="5 bytes, at most 4"):
        storage.read_bytes(f"{root}/five", max_bytes=4)
    assert storage.read_bytes(f"{root}/five", max_bytes=5) == b"12345"


def test_more_objects_than_one_page(bucket):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{bucket}/{'ab'[i % 2]}/{i:04d}.png", b"x"), range(1050)))
    manifest = manifest_of(bucket, labelled=True)
    assert len(manifest) == 1050
    assert manifest["label"].to_pylist() == ["a"] * 525 + ["b"] * 525
    assert len(manifest_of(f"{bucket}/*/00*.png", labelled=False)) == 100


def test_missing_bucket_and_empty_prefix(bucket):
    with pytest.raises((ManifestError, OSError), match="does not exist"):
        manifest_of("s3://cnnray-there-is-no-such-bucket", labelled=True)
    with pytest.raises(ManifestError, match="does not exist"):
        manifest_of(f"{bucket}/nothing", labelled=True)


def test_no_credentials_get_a_sentence(bucket, monkeypatch, tmp_path):
    storage._client.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="No AWS credentials were found"):
        storage.read_bytes(f"{bucket}/x")
    storage._client.cache_clear()


def test_an_unreachable_server_gets_a_sentence(bucket, monkeypatch):
    storage._client.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(storage.StorageError, match="cannot be reached"):
        storage.read_bytes(f"{bucket}/x")
    storage._client.cache_clear()


def test_one_run_at_a_time(bucket, monkeypatch):
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.3)
    with (
        lock.alone(f"{bucket}/run"),
        pytest.raises(lock.OutputInUseError, match="Another run is writing"),
        lock.alone(f"{bucket}/run"),
    ):
        pass
    assert not storage.exists(f"{bucket}/run")
    # What a killed run left is taken over, by one of two that come at the same time.
    storage.write_bytes(f"{bucket}/run/.lock", b"killed 7")
    with lock.alone(f"{bucket}/run"):
        assert storage.read_bytes(f"{bucket}/run/.lock") != b"killed 7"


def test_of_two_writers_one_succeeds(bucket):
    uri = f"{bucket}/one"
    assert storage.version_on_s3(uri) is None
    first = storage.write_on_s3_if(uri, b"first", None)
    assert first == storage.version_on_s3(uri) is not None
    assert storage.write_on_s3_if(uri, b"late", None) is None
    second = storage.write_on_s3_if(uri, b"second", first)
    assert storage.write_on_s3_if(uri, b"late", first) is None
    assert storage.read_bytes(uri) == b"second"
    storage.delete_file(uri)
    assert storage.write_on_s3_if(uri, b"late", second) is None
    with pytest.raises(FileNotFoundError):
        storage.write_on_s3_if("s3://cnnray-there-is-no-such-bucket/one", b"x", None)


def test_parquet_with_images_on_s3(bucket, digits):
    files = [file.uri for file in storage.files(str(digits))][:20]
    table = pa.table({"image": [storage.read_bytes(uri) for uri in files], "label": ["ab"[i % 2] for i in range(20)]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=8)
    storage.write_bytes(f"{bucket}/data/train-0.parquet", buffer.getvalue())
    manifest = manifest_of(f"{bucket}/data", labelled=True)
    (block,) = stream.in_order(stream.decoded(manifest, 8, cpus_per_task=0.25))
    assert not any(block["error"])
    expected = [decode(storage.read_bytes(uri), 8) for uri in files]
    np.testing.assert_array_equal(block["image"], expected)


def test_train_from_s3_to_s3(bucket, digits, caplog):
    storage.copy_folder(str(digits), f"{bucket}/digits")
    storage.write_bytes(f"{bucket}/digits/3/bad.png", b"nothing")
    config = TrainConfig(
        data=f"{bucket}/digits",
        output=f"{bucket}/runs/1",
        architecture="small_cnn",
        image_size=16,
        epochs=1,
        batch_size=64,
        max_workers=1,
        cpus_per_worker=0.5,
        checkpoint_every_steps=10,
        cache="none",
        schedule="constant",
        augment="none",
    )
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
    ("kind", "fault", "reason"),
    [("parquet", "deny", "access denied"), ("tar", "deny", "access denied"), ("tar", "throttle", "throttled")],
)
def test_images_of_a_container_that_s3_refuses_have_the_reason(
    kind, fault, reason, bucket, s3_proxy, tmp_path, monkeypatch
):
    contents = {f"{number}.png": b"data" for number in range(5)}
    if kind == "tar":
        write_tar(tmp_path / "0.tar", contents)
    else:
        pyarrow.parquet.write_table(pa.table({"bytes": list(contents.values())}), tmp_path / "0.parquet")
    uri = f"{bucket}/{fault}/0.{kind}"
    storage.write_bytes(uri, (tmp_path / f"0.{kind}").read_bytes())
    uris = manifest_of(uri, labelled=False)["uri"].to_pylist()
    assert list(containers.encoded(uris)) == list(contents.values())
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: fault if f"/{fault}/0." in path else None)
    assert [error.reason for error in containers.encoded(uris)] == [reason] * 5


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
    expected[f"{bucket}/photos/0033.png"] = "throttled"
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
    line = job.run(config)
    assert {"throttle", "slow", "break off"} <= set(s3_proxy.given)
    assert (line["rows"], line["errors"]) == (300, 6 + 3 + 1)
    tables = [
        pyarrow.parquet.read_table(pa.BufferReader(storage.read_bytes(file.uri)))
        for file in storage.files(f"{bucket}/out")
        if "/part-" in file.uri
    ]
    for row in pa.concat_tables(tables).to_pylist():
        answer = row["prediction"] or row["error"].partition(":")[0]
        assert answer == expected.pop(row["uri"]), row
        assert row["colour"] in ("red", "green", "blue")
    assert not expected
    assert job.run(config)["resumed"] == 300
