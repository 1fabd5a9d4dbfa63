"""Jobs whose storage is in trouble (make chaos): nothing is skipped that could be read; a job that ends continues."""

import json
import random
import time
import uuid
import zlib

import boto3
import pyarrow as pa
import pyarrow.parquet
import pytest
from moto.server import ThreadedMotoServer

from cnnray.images import object_stores, storage
from tests.e2e.conftest import until
from tests.e2e.service import Service, send
from tests.s3_proxy import Proxy

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}
STALLED = ("0007.png", "part-000000000064-0.0.parquet", "bundle.json")
"""The first request of each kind for these files has no answer; clients wait a minute for it."""


@pytest.fixture
def s3(monkeypatch):
    """A proxy in front of moto, which this process and its jobs use."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy(f"http://{host}:{port}")
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": proxy.url, "CNNRAY_STORAGE_RETRY_SECONDS": "30"}).items():
        monkeypatch.setenv(name, value)
    object_stores._store.cache_clear()
    proxy.bucket = f"s3://trouble-{uuid.uuid4().hex[:8]}"  # moto's buckets are those of the process
    boto3.client("s3").create_bucket(Bucket=proxy.bucket.removeprefix("s3://"))
    yield proxy
    object_stores._store.cache_clear()
    proxy.close()
    server.stop()


def passing_faults(method, path, before):
    """A third of all files meets faults in the first two requests of a kind, and three files a stall."""
    path = path.partition("?")[0]
    if path.endswith(STALLED) and not before:
        return "stall"
    kinds = {0: "throttle", 1: "slow", 2: "break off" if method == "GET" else "throttle"}
    if method == "GET" and path.endswith(".png"):
        kinds[3] = "expire"  # Ray Train fails where it meets this in its checkpoints, and is continued
    return kinds.get(zlib.crc32(path.encode()) % 12) if before < 2 else None


def lasting_faults(method, path, before):
    """No image of the digits 3 and 4 can be read."""
    return "throttle" if method == "GET" and ("/digits/3/" in path or "/digits/4/" in path) else None


def no_faults(method, path, before):
    return None


def result(job, code=0):
    assert job.wait(900) == code, job.err.read_text()
    if code:
        return job.err.read_text().splitlines()[-1]
    return json.loads(job.out.read_text().splitlines()[-1])


def rows(output):
    tables = [
        pyarrow.parquet.read_table(pa.BufferReader(storage.read_bytes(file.uri)))
        for file in storage.files(output)
        if "/part-" in file.uri
    ]
    return sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["id"])


def test_train(s3, digits, start_job, capsys):
    storage.copy_folder(str(digits), f"{s3.bucket}/digits")
    command = ["train", "--data", f"{s3.bucket}/digits", "--architecture", "small_cnn", "--image-size", "16"]
    command += ["--epochs", "3", "--batch-size", "64", "--cache", "none", "--augment", "none"]

    def train(output, code=0):
        return result(start_job(*command, "--output", output), code)

    undisturbed = train(f"{s3.bucket}/undisturbed")
    s3.forget_requests()
    s3.faults = passing_faults
    disturbed = train(f"{s3.bucket}/disturbed")
    assert {"throttle", "slow", "break off", "stall", "expire"} <= set(s3.fault_counts)
    s3.faults = lasting_faults
    sentence = train(f"{s3.bucket}/continued", code=1)
    assert f"S3 asks for fewer requests, at {s3.bucket}/digits/" in sentence
    s3.faults = no_faults
    continued = train(f"{s3.bucket}/continued")
    for run in (disturbed, continued):
        assert run["metrics"] == pytest.approx(undisturbed["metrics"], abs=1e-5)
        assert not storage.exists(f"{run['bundle'].removesuffix('/bundle')}/bad_images.csv")
    with capsys.disabled():
        print(f"\ntrain: {dict(s3.fault_counts)}; {sentence}")


def test_predict(s3, digits, onnx_bundle, start_job, capsys):
    storage.copy_folder(str(digits), f"{s3.bucket}/digits")
    storage.copy_folder(onnx_bundle, f"{s3.bucket}/bundle")
    command = ["predict", "--input", f"{s3.bucket}/digits", "--bundle", f"{s3.bucket}/bundle", "--engine", "onnx"]
    command += ["--rows-per-part", "32"]

    def predict(output, code=0):
        return result(start_job(*command, "--output", output), code)

    predict(f"{s3.bucket}/undisturbed")
    s3.forget_requests()
    s3.faults = passing_faults
    predict(f"{s3.bucket}/disturbed")
    assert {"throttle", "slow", "break off", "stall", "expire"} <= set(s3.fault_counts)
    s3.faults = lasting_faults
    sentence = predict(f"{s3.bucket}/continued", code=1)
    assert "images have no row, because storage was in trouble" in sentence
    left = rows(f"{s3.bucket}/continued")
    s3.faults = no_faults
    assert predict(f"{s3.bucket}/continued")["errors"] == 0
    expected = rows(f"{s3.bucket}/undisturbed")
    assert len(expected) == 200
    assert rows(f"{s3.bucket}/disturbed") == expected
    assert rows(f"{s3.bucket}/continued") == expected
    assert left == [row for row in expected if "/digits/3/" not in row["uri"] and "/digits/4/" not in row["uri"]]
    with capsys.disabled():
        print(f"\npredict: {dict(s3.fault_counts)}; {sentence}")


def test_predict_through_cuts_of_20_seconds(s3, digits, onnx_bundle, start_job, capsys):
    storage.copy_folder(str(digits), f"{s3.bucket}/digits")
    storage.copy_folder(onnx_bundle, f"{s3.bucket}/bundle")
    command = ["predict", "--input", f"{s3.bucket}/digits", "--bundle", f"{s3.bucket}/bundle", "--engine", "onnx"]
    command += ["--rows-per-part", "8", "--max-workers", "2"]
    s3.faults = slow_images
    result(start_job(*command, "--output", f"{s3.bucket}/undisturbed"))
    expected = rows(f"{s3.bucket}/undisturbed")
    assert len(expected) == 200
    for trial in range(5):
        output, parts = f"{s3.bucket}/{trial}", random.randint(0, 20)
        s3.faults, before = slow_images, s3.fault_counts["cut"]
        job = start_job(*command, "--output", output)
        wait_for_parts(output, parts)
        s3.faults = lambda method, path, before: "cut"
        time.sleep(20)
        s3.faults = slow_images
        line = result(job)
        assert s3.fault_counts["cut"] > before
        assert (line["rows"], line["errors"], rows(output)) == (200, 0, expected)
        with capsys.disabled():
            print(
                f"\n{s3.fault_counts['cut'] - before} requests were cut after {parts} parts; {line['seconds']:.0f} s"
            )


def slow_images(method, path, before):
    return "slow" if path.endswith(".png") else None


def wait_for_parts(output, parts):
    def are_there():
        return storage.exists(output) and sum("/part-" in file.uri for file in storage.files(output)) >= parts

    until(lambda: parts == 0 or are_there(), 120, f"{parts} parts")


def test_serve(s3, digits, onnx_bundle, start_job, capsys):
    storage.copy_folder(onnx_bundle, f"{s3.bucket}/bundle")
    image = next(digits.glob("*/*.png")).read_bytes()
    s3.faults = lambda method, path, before: "throttle"
    refused = start_job("serve", "--bundle", f"{s3.bucket}/bundle")
    assert refused.wait(300) == 1
    sentence = refused.err.read_text().splitlines()[-1]
    assert sentence.startswith(f"Error: S3 asks for fewer requests, at {s3.bucket}/bundle")
    s3.forget_requests()
    s3.faults = passing_faults
    service = Service(start_job, "--bundle", f"{s3.bucket}/bundle", "--engine", "onnx")
    status, before = send(service.address, image, "json")
    assert status == 200
    s3.faults = lambda method, path, before: "stall"
    status, during = send(service.address, image, "json")
    assert status == 200
    answers = [json.loads(text) for text in (before, during)]
    for answer in answers:
        del answer["request_id"]
    assert answers[0] == answers[1]
    with capsys.disabled():
        print(f"\nserve: {dict(s3.fault_counts)}; {sentence}")
