"""The same on S3 as on a local path: against moto, and against Ceph's gateway by `make test-s3`."""

import csv
import io
import json
import pickle
import threading
import time
import uuid
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
from cnnray.images import containers, lease, object_stores, storage, stream
from cnnray.images import manifest as manifests
from cnnray.images.decode import BadImage, decode
from cnnray.images.manifest import ManifestError, build_manifest
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
from tests.unit import test_layouts as layouts

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(s3_proxy):
    name = f"cnnray-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def new_clients():
    """Clients that read the environment as the test has set it."""
    object_stores._store.cache_clear()
    yield
    object_stores._store.cache_clear()


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return request.getfixturevalue("bucket") + "/some/prefix" if request.param == "s3" else str(tmp_path)


def test_globs_find_the_same_files(root):
    for name in layouts.FILES:
        storage.write_bytes(storage.join(root, name), b"x")
    for pattern, expected in layouts.GLOBS.items():
        assert layouts.glob(root, pattern) == expected, pattern


def test_a_folder_that_exists_is_no_glob(root):
    for name in ("Photos [2023]/cat/1.png", "Photos [2023]/dog/1.png", "Photos 2/cat/9.png"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert build_manifest(f"{root}/Photos [2023]", labelled=True)["label"].to_pylist() == ["cat", "dog"]
    assert layouts.glob(root, "Photos [2023]/*/*.png") == ["Photos [2023]/cat/1.png", "Photos [2023]/dog/1.png"]
    assert layouts.glob(root, "Photos [0-9]/**") == ["Photos 2/cat/9.png"]


def test_write_read_list_copy_delete(root, tmp_path_factory):
    files = {"a/1.png": b"one", "a/b/2.png": b"two", "c.txt": b"", ".hidden/x": b"x", "a/.y": b"y"}
    for name, data in files.items():
        storage.write_bytes(storage.join(root, name), data)
    assert storage.read_bytes(f"{root}/a/1.png") == b"one"
    listing = storage.files(root)
    assert [(file.uri.removeprefix(root + "/"), file.size) for file in listing] == [
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
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{bucket}/{'ab'[i % 2]}/{i:04d}.png", b"x"), range(2100)))
    manifest = build_manifest(bucket, labelled=True)
    assert len(manifest) == 2100
    assert manifest["label"].to_pylist() == ["a"] * 1050 + ["b"] * 1050
    assert len(build_manifest(f"{bucket}/*/00*.png", labelled=False)) == 100
    assert [file.uri for file in storage.files(f"{bucket}/a")] == manifest["uri"].to_pylist()[:1050]


def test_missing_bucket_and_empty_prefix(bucket):
    with pytest.raises((ManifestError, OSError), match="does not exist"):
        build_manifest("s3://cnnray-there-is-no-such-bucket", labelled=True)
    with pytest.raises(ManifestError, match="does not exist"):
        build_manifest(f"{bucket}/nothing", labelled=True)


def test_no_credentials_get_a_sentence(bucket, new_clients, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    (tmp_path / "config").write_text("[default]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(storage.DeniedError, match="No AWS credentials were found"):
        storage.read_bytes(f"{bucket}/x")


def test_an_unreachable_server_gets_a_sentence(bucket, new_clients, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(storage.UnavailableError, match="cannot be reached"):
        storage.read_bytes(f"{bucket}/x")


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("deny", storage.DeniedError, r"S3 denies access to s3://.*/one \(AccessDenied\)\."),
        (
            "expire",
            storage.CredentialsError,
            r"S3 does not accept the credentials for s3://.*/one \(ExpiredToken\)\.",
        ),
        ("throttle", storage.ThrottledError, "S3 asks for fewer requests, at s3://.*/one after several tries"),
        ("break off", storage.UnavailableError, "S3 cannot be reached for s3://.*/one: "),
    ],
)
def test_refusals_are_of_their_kind(fault, error, sentence, bucket, s3_proxy, monkeypatch):
    storage.write_bytes(f"{bucket}/one", b"content" * 1000)
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: fault)
    with pytest.raises(error, match=sentence):
        storage.read_bytes(f"{bucket}/one")
    with pytest.raises(error if fault != "break off" else storage.UnavailableError):
        storage.files(bucket)


def test_a_body_that_breaks_off_is_read_on(bucket, s3_proxy, monkeypatch):
    data = bytes(range(256)) * 1000
    storage.write_bytes(f"{bucket}/one", data)
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: "break off" if before < 2 else None)
    assert storage.read_bytes(f"{bucket}/one") == data
    assert s3_proxy.fault_counts["break off"] >= 2


def test_one_run_at_a_time(bucket, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.3)
    with (
        lease.lease(f"{bucket}/run"),
        pytest.raises(lease.OutputInUseError, match="Another run is writing"),
        lease.lease(f"{bucket}/run"),
    ):
        pass
    assert not storage.exists(f"{bucket}/run")
    # The lease of a killed run is taken over.
    storage.write_bytes(f"{bucket}/run/.lock", b"killed 7")
    with lease.lease(f"{bucket}/run"):
        assert storage.read_bytes(f"{bucket}/run/.lock") != b"killed 7"


def test_of_two_writers_one_succeeds(bucket):
    uri = f"{bucket}/one"
    assert storage.version(uri) is None
    first = storage.write_if(uri, b"first", None)
    assert first == storage.version(uri) is not None
    assert storage.write_if(uri, b"late", None) is None
    second = storage.write_if(uri, b"second", first)
    assert storage.write_if(uri, b"late", first) is None
    assert storage.read_bytes(uri) == b"second"
    storage.delete_file(uri)
    assert storage.write_if(uri, b"late", second) is None
    with pytest.raises(FileNotFoundError):
        storage.write_if("s3://cnnray-there-is-no-such-bucket/one", b"x", None)


@pytest.mark.parametrize("existing", [False, True])
def test_of_eight_writers_at_the_same_time_one_succeeds(existing, bucket):
    for race in range(5):
        uri = f"{bucket}/{race}"
        if existing:
            storage.write_bytes(uri, b"before")
        before, start = storage.version(uri), threading.Barrier(8)

        def write(number, uri=uri, before=before, start=start):
            start.wait()
            return storage.write_if(uri, f"{number}".encode(), before)

        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(write, range(8)))
        (winner,) = (number for number, version in enumerate(written) if version)
        assert storage.read_bytes(uri) == f"{winner}".encode()
        assert storage.version(uri) == written[winner]


def test_a_large_file_arrives_whole(bucket):
    data = np.random.default_rng(0).bytes(40_000_000)  # three parts
    storage.write_bytes(f"{bucket}/large", data)
    assert storage.read_bytes(f"{bucket}/large") == data
    filesystem, path = storage.arrow_filesystem(f"{bucket}/large-too")
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)
    assert storage.read_bytes(f"{bucket}/large-too") == data


def test_objects_that_stand_for_folders_are_no_files(bucket):
    s3, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("a/", "a/b/", "a/b/1.png", "a/b-c/2.png", "empty/"):
        s3.put_object(Bucket=name, Key=key, Body=b"x" if key.endswith(".png") else b"")
    assert [file.uri for file in storage.files(bucket)] == [f"{bucket}/a/b-c/2.png", f"{bucket}/a/b/1.png"]
    assert [file.uri for file in storage.files(f"{bucket}/a")] == [f"{bucket}/a/b-c/2.png", f"{bucket}/a/b/1.png"]
    assert storage.folders(bucket) == [f"{bucket}/a", f"{bucket}/empty"]
    assert not storage.exists(f"{bucket}/empty")
    s3.put_object(Bucket=name, Key="a/b//3.png", Body=b"x")
    with pytest.raises(storage.StorageError, match=r"a/b//3\.png"):
        storage.files(bucket)


def test_keys_are_taken_as_they_are(bucket):
    names = ["ü #1.png", "100%.png", "a%20b.png", "x&y=[z]?*~.png", "quote'\".png"]
    for name in names:
        storage.write_bytes(f"{bucket}/odd/{name}", name.encode())
    assert [file.uri for file in storage.files(f"{bucket}/odd")] == sorted(f"{bucket}/odd/{name}" for name in names)
    assert [storage.read_bytes(file.uri).decode() for file in storage.files(f"{bucket}/odd")] == sorted(names)
    keys = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    assert sorted(item["Key"] for item in keys) == sorted(f"odd/{name}" for name in names)


def test_a_process_makes_one_client_for_a_bucket(bucket, tmp_path, new_clients, monkeypatch):
    contents = {f"{number}.png": b"data" for number in range(5)}
    write_tar(tmp_path / "0.tar", contents)
    pyarrow.parquet.write_table(
        pa.table({"bytes": list(contents.values())}), tmp_path / "0.parquet", row_group_size=1
    )
    storage.copy_folder(str(tmp_path), bucket)
    clients = Counter()
    remote = object_stores.from_url

    class Counted(object_stores._ArrowS3):
        def __init__(self, *arguments):
            clients["pyarrow"] += 1
            super().__init__(*arguments)

    def counted(*arguments, **options):
        clients["obstore"] += 1
        return remote(*arguments, **options)

    monkeypatch.setattr(object_stores, "_ArrowS3", Counted)
    monkeypatch.setattr(object_stores, "from_url", counted)
    object_stores._store.cache_clear()
    object_stores._arrow_filesystem.cache_clear()
    for _ in range(3):
        uris = build_manifest(bucket, labelled=False)["uri"].to_pylist()
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda uri: list(containers.encoded([uri])), uris))
        assert read == [[b"data"]] * 10
        for file in storage.files(bucket):
            storage.read_bytes(file.uri)
    assert clients == {"pyarrow": 1, "obstore": 1}
    object_stores._arrow_filesystem.cache_clear()
    filesystem = storage.arrow_filesystem(bucket)[0]
    assert pickle.loads(pickle.dumps(filesystem)) is filesystem


def test_parquet_with_images_on_s3(bucket, digits):
    files = [file.uri for file in storage.files(str(digits))][:20]
    table = pa.table({"image": [storage.read_bytes(uri) for uri in files], "label": ["ab"[i % 2] for i in range(20)]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=8)
    storage.write_bytes(f"{bucket}/data/train-0.parquet", buffer.getvalue())
    manifest = build_manifest(f"{bucket}/data", labelled=True)
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
        return "throttle" if path.endswith("/0033.png") and attempts[path] < 8 else None

    monkeypatch.setattr(s3_proxy, "faults", passing)
    line = job.run(config)
    assert (line["rows"], line["errors"], line["resumed"]) == (300, 6 + 3, 236)
    rows = _predicted_rows(f"{bucket}/out")
    for row in rows:
        answer = row["prediction"] or row["error"].partition(":")[0]
        assert answer == expected.pop(row["uri"]), row
        assert row["colour"] in ("red", "green", "blue")
    assert not expected
    assert len(rows) == 300
    assert job.run(config)["resumed"] == 300
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
    config = TrainConfig(
        data=f"{bucket}/digits",
        output=f"{bucket}/undisturbed",
        architecture="small_cnn",
        image_size=16,
        epochs=2,
        batch_size=64,
        max_workers=1,
        cpus_per_worker=0.5,
        cache="none",
        augment="none",
        data_checks=False,
        max_failures=0,
    )
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


# -- leases ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_leases(monkeypatch, new_clients):
    """Leases with heartbeats of 0.3 s."""
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.3)
    options = {"client_options": {"timeout": "0.2s", "allow_http": True}, "retry_config": {"max_retries": 0}}
    monkeypatch.setattr(object_stores, "_QUICK_OPTIONS", options)


def test_writes_wait_while_a_lease_cannot_be_renewed(bucket, s3_proxy, fast_leases, monkeypatch):
    output = f"{bucket}/run"
    with lease.lease(output) as held, ThreadPoolExecutor(1) as pool:
        storage.write_bytes(f"{output}/1", b"x")
        monkeypatch.setattr(s3_proxy, "faults", lambda method, path, _: "stall" if path.endswith(".lock") else None)
        time.sleep(1.0)
        write = pool.submit(storage.write_bytes, f"{output}/2", b"x")
        with pytest.raises(TimeoutError):
            write.result(0.7)
        assert not storage.is_file(f"{output}/2")
        storage.write_bytes(f"{output}2/1", b"x")  # another folder
        monkeypatch.setattr(s3_proxy, "faults", lambda method, path, _: None)
        write.result(10)
        assert storage.is_file(f"{output}/2")
        held.raise_if_lost()
    assert not storage.exists(f"{output}/.lock")


def test_writes_fail_when_a_lease_cannot_be_renewed_for_long(bucket, s3_proxy, fast_leases, monkeypatch):
    monkeypatch.setattr(lease, "_MAX_WAIT_SECONDS", 0.5)
    with lease.lease(f"{bucket}/run"):
        monkeypatch.setattr(s3_proxy, "faults", lambda method, path, _: "stall" if path.endswith(".lock") else None)
        time.sleep(1.0)
        with pytest.raises(storage.UnavailableError, match="could not be renewed"):
            storage.write_bytes(f"{bucket}/run/1", b"x")


def test_a_run_that_lost_its_lease_writes_nothing_more(bucket, fast_leases):
    output, s3 = f"{bucket}/run", boto3.client("s3")
    name = bucket.removeprefix("s3://")
    with lease.lease(output) as held:
        storage.write_bytes(f"{output}/1", b"x")
        # A renewal whose answer was lost does not end the run.
        s3.put_object(Bucket=name, Key="run/.lock", Body=f"{held.holder} 99".encode())
        time.sleep(1.0)
        held.raise_if_lost()
        lease.check_holder(output, held.holder)
        s3.put_object(Bucket=name, Key="run/.lock", Body=b"another 0")
        time.sleep(1.0)
        with pytest.raises(lease.LeaseLostError, match="Another run has taken over"):
            held.raise_if_lost()
        with pytest.raises(lease.LeaseLostError):
            lease.check_holder(output, held.holder)  # in another process of the run
        for write in (
            lambda: storage.write_bytes(f"{output}/2", b"x"),
            lambda: storage.delete_file(f"{output}/1"),
            lambda: storage.delete_folder(f"{output}/1"),
            lambda: storage.copy_folder(output, f"{output}/copy"),
        ):
            with pytest.raises(lease.LeaseLostError):
                write()
    assert {file.uri for file in storage.files(output)} == {f"{output}/1"}
    assert storage.read_bytes(f"{output}/.lock") == b"another 0"


def test_a_training_that_lost_its_lease_ends(bucket, digits, monkeypatch):
    storage.copy_folder(str(digits), f"{bucket}/digits")
    output, name = f"{bucket}/run", bucket.removeprefix("s3://")
    config = TrainConfig(
        data=f"{bucket}/digits",
        output=output,
        architecture="small_cnn",
        image_size=16,
        epochs=500,
        max_workers=1,
        cpus_per_worker=0.5,
        data_checks=False,
    )

    def take_over():
        while not storage.is_file(f"{output}/history.csv"):
            time.sleep(0.2)
        boto3.client("s3").put_object(Bucket=name, Key="run/.lock", Body=b"another 0")

    thread = threading.Thread(target=take_over)
    thread.start()
    with pytest.raises(lease.LeaseLostError, match=f"Another run has taken over {output}"):
        train(config)
    thread.join()
    checkpoints = [file.uri for file in storage.files(f"{output}/checkpoints")]
    time.sleep(2)
    assert [file.uri for file in storage.files(f"{output}/checkpoints")] == checkpoints
    assert storage.read_bytes(f"{output}/.lock") == b"another 0"
