"""jobs/serve.py as users run it: a real Serve behind HAProxy, with clients over real HTTP."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils
import yaml
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from cnnray.cluster import free_port
from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import Geometry
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from tests.awkward import awkward_images, bad_images
from tests.conftest import REPOSITORY
from tests.e2e.conftest import requested_addresses, started_jobs, survivors, until
from tests.e2e.service import Service, ask, copy_as_new_version
from tests.runs import read_rows

GOOD = awkward_images()["rgb.png"]
FLAGS = ("--engine", "onnx", "--cpus-per-replica", "0.5")


class Load(threading.Thread):
    """Sends requests without pause, and counts the answers."""

    def __init__(self, address):
        super().__init__(daemon=True)
        self._address, self._ended = f"{address}/predict", threading.Event()
        self.statuses, self.models, self.longest = Counter(), Counter(), 0.0
        self.start()

    def run(self):
        while not self._ended.is_set():
            start = time.monotonic()
            try:
                status, answer = ask(self._address, GOOD)
            except (OSError, ValueError) as error:
                status, answer = type(error).__name__, {}
            self.longest = max(self.longest, time.monotonic() - start)
            self.statuses[status] += 1
            self.models[answer.get("model")] += 1

    def stop(self):
        self._ended.set()
        self.join(60)


start = pytest.fixture(started_jobs, scope="module")


@pytest.fixture(scope="module")
def service(start, onnx_bundle, tmp_path_factory):
    # In a temporary folder whose path is too long for HAProxy's sockets.
    start_there = functools.partial(start, environment={"TMPDIR": str(tmp_path_factory.mktemp("temporary"))})
    return Service(start_there, *_models(onnx_bundle), *FLAGS)


def _models(*uris, share=None):
    """The flag for versions of the model "colours", and the share of the newest."""
    models = [{"name": "colours", "uri": str(uri)} for uri in uris]
    if share is not None:
        models[-1]["share"] = share
    return ["--models", json.dumps(models)]


@pytest.fixture(scope="module")
def newer(onnx_bundle, tmp_path_factory):
    """A newer version of the bundle."""
    return copy_as_new_version(onnx_bundle, tmp_path_factory.mktemp("newer") / "bundle")


def test_it_logs_its_address_and_a_command_that_works(service):
    commands = [line.strip() for line in service.log().splitlines() if line.strip().startswith("curl")]
    done = subprocess.run(commands[0], shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["prediction"] in ("red", "green", "blue")
    assert ask(f"{service.address}/health/ready") == (200, {"status": "ready"})
    (version,) = ask(f"{service.address}/metadata")[1]["models"]["colours"]
    assert (version["engine"], version["image_size"], version["share"]) == ("onnx", 32, 1.0)


def test_requests_go_past_rays_wrapper_of_the_application(service):
    # Ray's wrapper gives back any id; the application, one that is fit for a log. The first request goes through Ray.
    answers = [
        requests.get(f"{service.address}/health/live", headers={"X-Request-ID": "a b"}, timeout=60) for _ in range(3)
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert "a b" not in ids[1:]
    assert len(set(ids)) == 3
    (replica,) = service.replicas()
    loaded = {folder for entry in replica.memory_maps() for folder in Path(entry.path).parts}
    assert {"uvloop", "httptools"} <= loaded


def test_each_replica_has_an_access_log(service):
    id_ = requests.get(f"{service.address}/health/live", timeout=60).headers["x-request-id"]
    (replica,) = service.replicas()
    (log,) = [Path(file.path) for file in replica.open_files() if Path(file.path).name.startswith("access_cnnray")]
    assert log.parent.name == "serve"
    until(lambda: id_ in log.read_text(), 20, "the line of the request")
    (line,) = [line for line in map(json.loads, log.read_text().splitlines()) if line["request_id"] == id_]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/health/live", 200)


def test_the_awkward_set_has_the_answers_of_predictor(service, onnx_bundle):
    predictor = Predictor(Bundle.load(onnx_bundle), engine="onnx")
    contents = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    for name, data in contents.items():
        status, answer = ask(f"{service.address}/predict", data, "application/octet-stream")
        (expected,) = predictor([data])
        if isinstance(expected, BadImage):
            assert status in (400, 413, 415, 422), name
            continue
        assert status == 200, name
        assert answer["prediction"] == expected.label
        scores = {score["class"]: score["confidence"] for score in answer["all_predictions"]}
        assert scores == pytest.approx(dict(expected.top_k), abs=1e-5)
    # Empty ones among them, and one that was not chosen in a browser.
    files = [("", b""), *list(contents.items())[-20:], ("", b""), ("one.png", GOOD)]
    response = requests.post(f"{service.address}/predict", files=[("image", file) for file in files], timeout=60)
    for answer, expected in zip(response.json(), predictor([data for _, data in files]), strict=True):
        if isinstance(expected, BadImage):
            assert expected.reason in answer["error"]
        else:
            assert answer["prediction"] == expected.label


def test_an_unmodified_client_of_the_open_inference_protocol(service, onnx_bundle):
    client = tritonclient.http.InferenceServerClient(service.address.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.get_model_metadata("colours")["inputs"][0]["shape"] == [-1, 32, 32, 3]
    pixels = decode(GOOD, Geometry.of(32))[None]
    (expected,) = Predictor(Bundle.load(onnx_bundle), engine="onnx").probabilities(pixels)
    for binary in (True, False):
        tensor = tritonclient.http.InferInput("image", pixels.shape, "UINT8")
        tensor.set_data_from_numpy(pixels, binary_data=binary)
        result = client.infer("colours", [tensor])
        np.testing.assert_allclose(result.as_numpy("probabilities")[0], expected, atol=1e-5)
    encoded = tritonclient.http.InferInput("image_bytes", [1], "BYTES")
    encoded.set_data_from_numpy(np.asarray([GOOD], object))
    ranked = tritonclient.http.InferRequestedOutput("probabilities", class_count=2)
    (best, _) = client.infer("colours", [encoded], outputs=[ranked]).as_numpy("probabilities")[0]
    assert best.decode().split(":")[1] == str(expected.argmax())


def test_headers_that_are_not_utf_8(service):
    # Over a socket: Python's HTTP clients do not send such bytes.
    host, _, port = service.address.removeprefix("http://").partition(":")
    for name in ("x-request-id", "x-session-id", "serve_multiplexed_model_id", "x-other"):
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(
                f"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{name}: ".encode()
                + b"\xff\xfe\r\n\r\n"
            )
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200"), (name, answer)


@pytest.mark.browser
def test_the_page(service, browser, tmp_path):
    names = {"one.png": GOOD, "none.png": b"", "two.jpg": awkward_images()["large.jpg"], "bad.png": b"nothing"}
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    browser.get(service.address)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    files = browser.switch_to.active_element  # the first element that the keyboard reaches
    assert files.get_attribute("id") == "files"
    browser.find_element(By.ID, "why").click()
    files.send_keys("\n".join(str(tmp_path / name) for name in names))
    until(lambda: browser.find_element(By.ID, "status").text == "4 images done", 60, "the answers")
    articles = {
        article.find_element(By.TAG_NAME, "h2").text: article
        for article in browser.find_elements(By.TAG_NAME, "article")
    }
    assert list(articles) == list(names)
    assert "No image provided" in articles["none.png"].find_element(By.CLASS_NAME, "error").text
    for name in ("one.png", "two.jpg"):
        rows = [row.text.split("\n") for row in articles[name].find_elements(By.TAG_NAME, "tr")]
        assert {row[0].split()[0] for row in rows} == {"red", "green", "blue"}
        assert len(articles[name].find_elements(By.TAG_NAME, "meter")) == 3
        assert articles[name].find_element(By.TAG_NAME, "figcaption").text == f"red: supports {rows[0][0].split()[0]}"
        widths = [browser.execute_script("return arguments[0].naturalWidth", picture)
                  for picture in articles[name].find_elements(By.TAG_NAME, "img")]  # fmt: skip
        assert len(widths) == 2
        assert min(widths) > 0
    assert "not an image" in articles["bad.png"].find_element(By.CLASS_NAME, "error").text
    overflow = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 0
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert all("status of 415" in message or "status of 400" in message for message in logged), logged
    addresses = requested_addresses(browser)
    assert f"{service.address}/predict?model=colours&explain=true" in addresses
    assert all(address.startswith((f"{service.address}/", "blob:", "data:")) for address in addresses), addresses
    browser.save_screenshot(str(tmp_path / "page.png"))


@pytest.mark.browser
def test_the_description_of_the_api_needs_no_other_host(service, browser, tmp_path):
    browser.get(f"{service.address}/docs")
    until(lambda: len(browser.find_elements(By.CLASS_NAME, "opblock")) >= 15, 30, "the operations")
    browser.find_element(By.CSS_SELECTOR, "#operations-default-post_predict button").click()
    until(lambda: "all_predictions" in browser.page_source, 30, "a description")
    browser.save_screenshot(str(tmp_path / "docs.png"))
    assert browser.get_log("browser") == []
    addresses = requested_addresses(browser)
    assert f"{service.address}/docs/swagger-ui-bundle.js" in addresses
    assert all(address.startswith((f"{service.address}/", "data:")) for address in addresses), addresses


def test_a_new_version_goes_in_and_out_without_a_failed_request(service, onnx_bundle, newer):
    versions = [Bundle.load(uri).version for uri in (onnx_bundle, newer)]
    load = [Load(service.address) for _ in range(2)]
    replicas = {process.pid for process in service.replicas()}
    job = service.change(*FLAGS, *_models(onnx_bundle, newer, share=0.3))
    assert json.loads(job.out.read_text())["replicas"] == 1, job.err.read_text()
    models = ask(f"{service.address}/metadata")[1]["models"]["colours"]
    assert [(version["version"], version["share"]) for version in models] == list(
        zip(versions, (0.7, 0.3), strict=True)
    )
    until(lambda: sum(client.models[versions[1]] for client in load) > 20, 60, "answers of the new version")
    service.change(*FLAGS, *_models(onnx_bundle, newer))
    back = service.change(*FLAGS, *_models(onnx_bundle))
    assert back.process.returncode == 0, back.err.read_text()
    assert ask(f"{service.address}/predict", GOOD)[1]["model"] == versions[0]
    for client in load:
        client.stop()
    statuses = sum((client.statuses for client in load), Counter())
    assert statuses.keys() == {200}, statuses
    # The models changed within the running processes.
    assert {process.pid for process in service.replicas()} == replicas


def test_a_canary_goes_back_or_forward_by_itself(service, onnx_bundle, newer, tmp_path):
    relabelled = shutil.copytree(onnx_bundle, tmp_path / "relabelled")
    info = Bundle.load(str(relabelled)).info
    names = [f"other {name}" for name in info.class_names]
    bundles.write_info(str(relabelled), dataclasses.replace(info, class_names=names))
    two, limits = (*FLAGS, "--min-replicas", "2"), ("--shadow-share", "0.5", "--rollback-on", "{agreement: 0.9}")
    load = [Load(service.address) for _ in range(4)]

    def served():
        return [
            (version["share"], (version["verdict"] or "").partition(":")[0])
            for version in ask(f"{service.address}/metadata")[1]["models"]["colours"]
        ]

    def all_serve(expected):
        return all(served() == expected for _ in range(10))  # each may be answered by another replica

    job = service.change(*two, *limits, *_models(onnx_bundle, relabelled, share=0.3))
    assert json.loads(job.out.read_text())["replicas"] == 2, job.err.read_text()
    until(lambda: all_serve([(1, ""), (0, "rolled back")]), 60, "the version of before")
    service.change(*two, *limits, "--promote-after", "50", *_models(onnx_bundle, newer, share=0.3))
    until(lambda: all_serve([(0, ""), (1, "promoted")]), 60, "the new version")
    service.change(*FLAGS, "--downscale-delay-seconds", "1", "--max-replicas", "1", *_models(onnx_bundle))
    until(lambda: len(service.replicas()) == 1, 90, "one replica")
    for client in load:
        client.stop()
    statuses = sum((client.statuses for client in load), Counter())
    assert statuses.keys() == {200}, statuses


def test_a_replica_is_replaced_without_a_failed_request(service, onnx_bundle):
    load = [Load(service.address) for _ in range(4)]
    (before,) = service.replicas()
    # Other resources: Serve starts another replica, with TensorFlow, which takes longer than the old one is drained.
    job = service.change("--engine", "keras", "--cpus-per-replica", "0.6", *_models(onnx_bundle))
    assert job.process.returncode == 0, job.err.read_text()
    until(lambda: [process.pid for process in service.replicas()] != [before.pid], 90, "another replica")
    until(lambda: len(service.replicas()) == 1, 90, "the end of the one before")
    service.change(*FLAGS, *_models(onnx_bundle))
    until(lambda: len(service.replicas()) == 1, 90, "one replica")
    for client in load:
        client.stop()
    statuses = sum((client.statuses for client in load), Counter())
    assert statuses.keys() == {200}, statuses
    longest = max(client.longest for client in load)
    assert longest < 2.5  # none has waited for the start


def test_a_bundle_that_cannot_be_served_changes_nothing(service, onnx_bundle, tmp_path):
    before = ask(f"{service.address}/metadata")
    broken = shutil.copytree(onnx_bundle, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    for uri, sentence in ((empty, "is not a bundle"), (broken, "model.onnx cannot be loaded")):
        job = service.change(*FLAGS, *_models(uri))
        assert job.process.returncode == 1
        assert sentence in job.err.read_text().splitlines()[-1]
    until(lambda: ask(f"{service.address}/metadata") == before, 20, "the models of before")


def test_a_replica_that_is_killed_is_replaced(service):
    (replica,) = service.replicas()
    replica.kill()
    until(lambda: _status(f"{service.address}/health/ready") == 200 and service.replicas(), 90, "a new replica")
    assert replica.pid not in [process.pid for process in service.replicas()]
    assert ask(f"{service.address}/predict", GOOD)[0] == 200


def _status(address):
    try:
        return ask(address)[0]
    except (OSError, ValueError):
        return None


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A file of API keys."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("- {name: web, key: one}\n- {name: operator, key: two, admin: true}\n")
    return file


@pytest.fixture(scope="module")
def guarded(start, onnx_bundle, keys, tmp_path_factory):
    """A service that asks for keys, over HTTP and gRPC, with a request log, and jobs on the images in `photos`.

    Its second port is `grpc`, and its folder is `folder`.
    """
    port, folder = free_port(), tmp_path_factory.mktemp("guarded")
    options = ["--log-requests", folder / "log", "--jobs-output", folder / "rows"]
    options += ["--jobs-from", f"[{folder}/photos]"]
    taken = socket.socket()
    with contextlib.suppress(OSError):  # by the agent of another Ray on this machine, if there is one
        taken.bind(("", 52365))
        taken.listen()
    start_there = functools.partial(start, environment={"CNNRAY_API_KEY_FILE": str(keys)})
    service = Service(start_there, *_models(onnx_bundle), *FLAGS, "--grpc-port", str(port), *options)
    service.grpc, service.folder = f"127.0.0.1:{port}", folder
    yield service
    taken.close()


def test_an_unmodified_client_of_the_open_inference_protocol_over_grpc(guarded, onnx_bundle):
    key = {"x-api-key": "one"}
    pixels = decode(GOOD, Geometry.of(32))[None]
    (expected,) = Predictor(Bundle.load(onnx_bundle), engine="onnx").probabilities(pixels)
    with tritonclient.grpc.InferenceServerClient(guarded.grpc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("colours", headers=key)
        assert client.get_server_metadata(headers=key).name == "cnnray"
        assert list(client.get_model_metadata("colours", headers=key).inputs[0].shape) == [-1, 32, 32, 3]
        numbers = tritonclient.grpc.InferInput("image", pixels.shape, "UINT8")
        numbers.set_data_from_numpy(pixels)
        encoded = tritonclient.grpc.InferInput("image_bytes", [1], "BYTES")
        encoded.set_data_from_numpy(np.asarray([GOOD], object))
        for tensor in (numbers, encoded):
            result = client.infer("colours", [tensor], headers=key)
            np.testing.assert_allclose(result.as_numpy("probabilities")[0], expected, atol=1e-5)
        for model, headers, status in (("colours", {}, "UNAUTHENTICATED"), ("mice", key, "NOT_FOUND")):
            with pytest.raises(tritonclient.utils.InferenceServerException) as raised:
                client.infer(model, [encoded], headers=headers)
            assert raised.value.status() == f"StatusCode.{status}"
        large = tritonclient.grpc.InferInput("image_bytes", [1], "BYTES")
        large.set_data_from_numpy(np.asarray([b"x" * 2**25], object))
        with pytest.raises(tritonclient.utils.InferenceServerException) as raised:
            client.infer("colours", [large], headers=key)
        assert raised.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_a_list_of_images_is_classified_by_a_job_on_the_cluster(guarded, onnx_bundle):
    photos, headers = guarded.folder / "photos", {"X-API-Key": "one"}
    photos.mkdir()
    for name, data in awkward_images().items():
        (photos / name).write_bytes(data)
    uris = [str(photos / name) for name in (*awkward_images(), "missing.png")]
    submitted = requests.post(f"{guarded.address}/jobs", json={"uris": uris}, headers=headers, timeout=60)
    assert submitted.status_code == 202, submitted.text
    job = submitted.json()

    def find():
        return requests.get(f"{guarded.address}/jobs/{job['id']}", headers=headers, timeout=60).json()

    until(lambda: find()["state"] not in ("PENDING", "RUNNING"), 120, "the rows")
    assert find() == {
        "id": job["id"],
        "state": "SUCCEEDED",
        "message": "",
        "rows": str(guarded.folder / "rows" / job["id"]),
    }
    answers = Predictor(Bundle.load(onnx_bundle), engine="onnx")([*awkward_images().values()])
    rows = read_rows(guarded.folder / "rows" / job["id"])
    assert [row["uri"] for row in rows] == uris
    assert [row["prediction"] for row in rows[:-1]] == [answer.label for answer in answers]
    assert rows[-1]["error"].startswith("missing")
    unknown = requests.get(f"{guarded.address}/jobs/cnnray-predict-0", headers=headers, timeout=60)
    assert unknown.status_code == 404, unknown.text


def test_an_answer_is_explained_by_a_process_beside_the_replica(guarded):
    headers = {"X-API-Key": "one", "Content-Type": "image/png"}
    found = requests.post(f"{guarded.address}/explain", data=GOOD, headers=headers, timeout=60)
    assert (found.status_code, found.headers["content-type"]) == (200, "image/png"), found.text
    assert found.content.startswith(b"\x89PNG")
    assert found.headers["x-class"] in ("red", "green", "blue")


def test_what_was_answered_is_logged_and_labels_that_come_later_give_accuracy(guarded, onnx_bundle, tmp_path):
    log = guarded.folder / "log"
    before = sum(1 for _ in _logged(log))
    for number in range(120):
        headers = {"X-API-Key": "one", "X-Request-ID": f"mine-{number}", "Content-Type": "image/png"}
        assert requests.post(f"{guarded.address}/predict", data=GOOD, headers=headers, timeout=60).status_code == 200
    until(lambda: sum(1 for _ in _logged(log)) >= before + 120, 90, "the request log")
    rows = [row for row in _logged(log) if row["request_id"].startswith("mine-")]
    assert {row["request_id"] for row in rows} == {f"mine-{number}" for number in range(120)}
    assert {row["sha256"] for row in rows} == {hashlib.sha256(GOOD).hexdigest()}
    assert all(row["image"] is None for row in rows)
    labels = tmp_path / "labels.csv"
    answer = rows[0]["prediction"]
    other = next(name for name in ("red", "green", "blue") if name != answer)
    lines = [f"mine-{number},{other if number < 12 else answer}" for number in range(120)]
    labels.write_text("\n".join(["request_id,label", *lines]))
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        shutil.copy(guarded.folder / "photos" / "rgb.png", data / f"{number}.png")
    done = subprocess.run(
        [sys.executable, "jobs/evaluate.py", "--bundle", onnx_bundle, "--drift", str(log), "--labels", str(labels),
         "--data", str(data), "--engine", "onnx", "--output", str(tmp_path / "out")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["accuracy"] == pytest.approx(0.9)
    assert line["images"] >= 120


def _logged(folder):
    for file in sorted(folder.rglob("*.parquet")):
        yield from pyarrow.parquet.read_table(file, partitioning=None).to_pylist()


def test_models_are_loaded_and_unloaded_by_an_unmodified_client(guarded, onnx_bundle, newer, keys):
    service = guarded
    old, new = (Bundle.load(uri).version for uri in (onnx_bundle, newer))
    web, operator = {"X-API-Key": "one"}, {"X-API-Key": "two"}
    with tritonclient.http.InferenceServerClient(service.address.removeprefix("http://")) as client:
        with pytest.raises(tritonclient.utils.InferenceServerException, match="key of an admin"):
            client.load_model("shades", headers=web, config=json.dumps({"uri": newer}))
        client.load_model("shades", headers=operator, config=json.dumps({"uri": newer}))
        client.load_model("colours", headers=operator, config=json.dumps({"uri": newer, "share": 0.5}))
        index = client.get_model_repository_index(headers=web)
        assert [(model["name"], model["version"]) for model in index] == [
            ("colours", old), ("colours", new), ("shades", new),
        ]  # fmt: skip
        # They belong to the service, not to the replica that was asked.
        (replica,) = service.replicas()
        replica.kill()
        until(lambda: _status(f"{service.address}/health/ready") == 200, 90, "a new replica")
        assert client.get_model_repository_index(headers=web) == index
        with pytest.raises(tritonclient.utils.InferenceServerException, match="no model 'mice'"):
            client.unload_model("mice", headers=operator)
        client.unload_model("colours", headers=operator)
        assert len(client.get_model_repository_index(headers=web)) == 1
    keys.write_text("- {name: web, key: three}\n")

    def status(key):
        return requests.get(f"{service.address}/metadata", headers={"X-API-Key": key}, timeout=30).status_code

    until(lambda: (status("one"), status("two"), status("three")) == (401, 401, 200), 30, "the new keys")


HOLDER = """
import time
import ray
ray.init()
hold = ray.remote(num_cpus=ray.available_resources()["CPU"])(lambda: time.sleep(600)).remote()
while ray.available_resources().get("CPU", 0.0) > 0:
    time.sleep(0.1)
print("held", flush=True)
ray.get(hold)
"""


@pytest.mark.long
def test_a_job_does_not_wait_for_room_that_others_hold(service, onnx_bundle):
    command = [sys.executable, "-c", HOLDER]
    holder = subprocess.Popen(command, env=os.environ | service.ray, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        started = time.monotonic()
        job = service.change(*FLAGS, *_models(onnx_bundle), "--min-replicas", "2", "--max-replicas", "2")
        assert job.process.returncode == 1
        assert "1 of 2 replicas have no room: each needs 0.5 CPUs" in job.err.read_text().splitlines()[-1]
        assert 30 < time.monotonic() - started < 100
        # Serve gives up the second replica, which it still wants to start, after --downscale-delay-seconds.
        assert service.status()["RUNNING"] == 1
        assert ask(f"{service.address}/predict", GOOD)[0] == 200
    finally:
        holder.kill()
        holder.wait()


def test_ctrl_c_ends_it_and_leaves_nothing(service):
    children = service.job.named_children()
    service.job.process.send_signal(signal.SIGINT)
    assert service.job.wait(60) == 0, service.log()
    line = json.loads(service.job.out.read_text())
    assert (line["address"], line["replicas"]) == (service.address, 1)
    assert not survivors(children, 15)
    assert "Traceback" not in service.log()


def test_the_configuration_for_serve_deploy(start, onnx_bundle, tmp_path):
    job = start("serve", "--bundle", onnx_bundle, "--max-replicas", "4", "--write-config", tmp_path / "serve.yaml")
    assert job.wait(60) == 0, job.err.read_text()
    configuration = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    (application,) = configuration["applications"]
    assert application["import_path"] == "cnnray.serving.deployment:app"
    assert application["deployments"][0]["autoscaling_config"]["max_replicas"] == 4
    assert application["deployments"][0]["user_config"]["models"][0]["uri"] == onnx_bundle
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(configuration)


def test_a_port_in_use_gets_a_sentence(start, onnx_bundle):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        started = time.monotonic()
        job = start("serve", "--bundle", onnx_bundle, "--port", port)
        assert job.wait(60) == 1
    assert time.monotonic() - started < 30
    assert f"127.0.0.1:{port} is in use" in job.err.read_text().splitlines()[-1]
