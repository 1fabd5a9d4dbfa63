"""A service under minutes of load, with faults, scaling and malformed requests (make soak)."""

import base64
import random
import time
from collections import Counter

import pytest

from benchmarks import load
from benchmarks.predict import write_random_bundle
from benchmarks.serve import make_photo
from cnnray.models.bundle import Bundle
from tests.awkward import awkward_images
from tests.e2e.conftest import started_jobs, until
from tests.e2e.service import FORMS, Service, ask, copy_as_new_version, run_schemathesis, send
from tests.malformed import fuzzed, malformed_json

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

SECONDS = 180
start = pytest.fixture(started_jobs, scope="module")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    path.write_bytes(make_photo())
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """`vgg_bn` at 64x64 with int8 engines, as in the benchmark."""
    folder = tmp_path_factory.mktemp("bundle")
    return write_random_bundle(folder)


def _print(capsys, sentence):
    with capsys.disabled():
        print(f"\n{sentence}")


def test_faults_under_constant_load(start, bundle, photo, tmp_path, capsys):
    newer = copy_as_new_version(bundle, tmp_path / "newer")
    flags = ["--cpus-per-replica", "0.5", "--min-replicas", "2", "--max-replicas", "2"]
    service = Service(start, "--bundle", bundle, *flags)
    address = f"{service.address}/predict"
    peak = load.measure_peak(address, photo, tmp_path, connections=16, seconds=10).rate
    process = load.start_steady(address, photo, peak / 2, SECONDS)
    started, moments = time.monotonic(), {}

    def at(seconds, name):
        time.sleep(max(0.0, started + seconds - time.monotonic()))
        moments[name] = time.monotonic() - started

    at(0.1 * SECONDS, "kill")
    service.replicas()[0].kill()
    until(lambda: len(service.replicas()) == 2, 60, "another replica")
    at(0.35 * SECONDS, "update")
    assert service.change("--bundle", newer, *flags).process.returncode == 0
    assert ask(address, photo.read_bytes())[1]["model"] == Bundle.load(newer).version
    at(0.55 * SECONDS, "up")
    more = ["--cpus-per-replica", "0.5", "--min-replicas", "3", "--max-replicas", "3"]
    assert service.change("--bundle", newer, *more).process.returncode == 0
    assert len(service.replicas()) == 3
    at(0.75 * SECONDS, "down")
    assert service.change("--bundle", newer, *flags).process.returncode == 0
    until(lambda: len(service.replicas()) == 2, 60, "the end of a replica")
    moments["end"] = SECONDS
    result = load.read_steady(process)
    _print(capsys, f"peak {peak:.0f} requests/s, load of {peak / 2:.0f} for {SECONDS} s: {result.statuses}")
    failed = {}
    for name, following in zip(moments, [*moments][1:], strict=False):
        failed[name] = [due for due in result.failed_at if moments[name] - 1 <= due < moments[following] - 1]
        _print(capsys, f"from {moments[name]:.1f} s on ({name}): {len(failed[name])} failed {failed[name][:20]}")
    _print(capsys, f"p50 {result.percentile(0.5):.1f} ms, p99 {result.percentile(0.99):.1f} ms")
    assert set().union(*failed.values()) == set(result.failed_at)
    assert not failed["update"]
    assert not failed["up"]
    assert not failed["down"]
    # Requests in flight on one of the two replicas, and those that came until HAProxy noticed.
    assert len(failed["kill"]) <= 64
    assert all(due < moments["kill"] + 3 for due in failed["kill"])
    service.job.end()


def test_replicas_come_with_load_and_go_without(start, bundle, photo, capsys):
    service = Service(
        start, "--bundle", bundle, "--cpus-per-replica", "0.5", "--max-replicas", "2",
        "--target-ongoing-requests", "0.5", "--downscale-delay-seconds", "10",
    )  # fmt: skip

    assert service.status() == {"RUNNING": 1}
    process = load.start_steady(f"{service.address}/predict", photo, 80, 60)
    started = time.monotonic()
    until(lambda: service.status() == {"RUNNING": 2}, 60, "a second replica")
    _print(capsys, f"2 replicas after {time.monotonic() - started:.0f} s of load")
    result = load.read_steady(process)
    started = time.monotonic()
    until(lambda: service.status() == {"RUNNING": 1}, 90, "one replica again")
    _print(capsys, f"1 replica {time.monotonic() - started:.0f} s after its end; answers: {result.statuses}")
    assert result.statuses == {"200": 60 * 80}
    service.job.end()


@pytest.fixture(scope="module")
def small(start, bundle):
    """A service with one replica and a small limit for bodies."""
    service = Service(start, "--bundle", bundle, "--max-replicas", "1", "--max-mebibytes", "1")
    yield service
    service.job.end()


def test_requests_generated_from_the_description(small, tmp_path, capsys):
    cases, summary = run_schemathesis(small.address, 500, tmp_path)
    _print(capsys, f"schemathesis: {cases} cases; {summary}")
    assert cases >= 5000
    assert "Traceback" not in small.log()


def test_fuzzed_images(small, capsys):
    statuses, generator = {}, random.Random(0)
    for number in range(2000):
        status, text = send(small.address, fuzzed(number), generator.choice(FORMS))
        statuses[status] = statuses.get(status, 0) + 1
        assert status in (200, 400, 413, 415, 422, 503), (number, text)
        assert "Traceback" not in text
    _print(capsys, f"fuzzed images: {statuses}")


def test_malformed_json(small, capsys):
    text, statuses = base64.b64encode(awkward_images()["rgb.png"]).decode(), Counter()
    tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [text]}
    for path, valid in (
        ("/predict", {"image": text}),
        ("/predict", {"images": [text]}),
        ("/v2/models/model/infer", {"inputs": [tensor]}),
        ("/v1/models/model:predict", {"instances": [{"b64": text}]}),
    ):
        for name, body in malformed_json(valid).items():
            status, answer = ask(small.address + path, body, "application/json")
            statuses[status] += 1
            is_listed = status == 200 and "images" in valid and [entry["status"] for entry in answer] == [400]
            assert is_listed or status in (400, 413), (path, name, answer)
    _print(capsys, f"malformed JSON: {dict(statuses)}")


def test_memory_stays_flat(small, photo, capsys):
    (replica,), sizes, requests = small.replicas(), [], 2000
    for _ in range(11):
        process = load.start_steady(f"{small.address}/predict", photo, 100, requests / 100)
        assert load.read_steady(process).statuses == {"200": requests}
        sizes.append(replica.memory_full_info().uss / 2**20)
    _print(capsys, f"MiB of the replica after each {requests} requests: {[round(size) for size in sizes]}")
    assert sizes[-1] < 1.05 * sizes[0]
