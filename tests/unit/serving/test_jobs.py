"""Predictions that requests ask for: which images they may name, and what they are answered."""

import asyncio
import re
import shlex
import threading
import time
from types import SimpleNamespace

import pyarrow.parquet
import pytest

from cnnray.models.bundle import Bundle
from cnnray.serving import job_queue
from cnnray.serving.bodies import RequestError
from cnnray.serving.config import ServeConfig
from cnnray.serving.job_queue import JobQueue, QueuedJob
from cnnray.serving.settings import JobSettings

SETTINGS = JobSettings(place="/rows", prefixes=("/photos", "s3://bucket/cats/", "s3://other"))


class Queue:
    """Stands for Ray's job API."""

    def __init__(self):
        self.submitted, self.jobs = [], {}

    async def submit(self, settings, uris, *, bundle, version, engine):
        self.submitted.append((settings, [*uris], bundle, version, engine))
        return QueuedJob(
            id="cnnray-predict-1", state="PENDING", message="", rows=f"{settings.place}/cnnray-predict-1"
        )

    async def find(self, settings, job):
        if job not in self.jobs:
            raise job_queue.no_such_job(job)
        return self.jobs[job]


@pytest.fixture
def queue():
    return Queue()


@pytest.fixture
def client(start_client, queue, bundle, newer):
    client = start_client(("colours", bundle, 0.9), ("colours", newer, 0.1), jobs=SETTINGS)
    client.app.service.queue = queue
    return client


def test_a_list_of_images_becomes_a_job(client, queue, bundle, newer):
    uris = ["/photos/a/1.png", "s3://bucket/cats/2.png", "s3://other/3.png", "/photos//x/./4 ü.png"]
    found = client.post("/jobs", json={"uris": uris})
    assert found.status_code == 202
    assert found.json() == {
        "id": "cnnray-predict-1", "state": "PENDING", "message": "", "rows": "/rows/cnnray-predict-1"
    }  # fmt: skip
    uris[-1] = "/photos/x/4 ü.png"
    assert queue.submitted == [(SETTINGS, uris, bundle, Bundle.load(bundle).version, "keras")]
    newest = client.app.service.models.versions("colours")[-1][0].version
    client.post("/jobs", json={"uris": uris[:1], "model": "colours", "version": newest})
    assert queue.submitted[-1][2:4] == (newer, newest)


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd", "/photos", "/photos2/1.png", "/photos/../etc/passwd", "/photos/a/../../x", "photos/1.png",
        "s3://bucket/cats", "s3://bucket/cats/../dogs/1.png", "s3://", "http://host/1.png", "~nobody2/x",
        "s3://bucket/dogs/1.png",
        "file:///photos/1.png", "s3://other2/1.png", "\x00",
    ],
)  # fmt: skip
def test_images_elsewhere_are_refused(client, queue, uri):
    found = client.post("/jobs", json={"uris": ["/photos/1.png", uri]})
    assert found.status_code == 403
    assert "is not below an allowed prefix" in found.json()["error"]
    assert not queue.submitted


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"uris": []}, 400), ({}, 400), ({"uris": [""]}, 400), ({"uris": "/photos/1"}, 400),
        ({"uris": ["/photos/1"], "x": 1}, 400),
        ({"uris": ["/photos/1"], "model": "dogs"}, 404), ({"uris": ["/photos/1"], "version": "1"}, 404),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_read_are_refused(client, queue, body, status):
    assert client.post("/jobs", json=body).status_code == status
    assert not queue.submitted


def test_the_state_of_a_job(client, queue):
    queue.jobs["cnnray-predict-1"] = QueuedJob(
        id="cnnray-predict-1", state="FAILED", message="There are no images.", rows="/rows/cnnray-predict-1"
    )
    found = client.get("/jobs/cnnray-predict-1").json()
    assert (found["state"], found["message"]) == ("FAILED", "There are no images.")
    assert found["rows"] == "/rows/cnnray-predict-1"
    for job in ("cnnray-predict-2", "raysubmit_1", "cnnray-predict-", "cnnray-predict-..%2f"):
        assert client.get(f"/jobs/{job}").status_code == 404, job


def test_a_service_without_jobs_says_so(start_client):
    client = start_client()
    for found in (client.post("/jobs", json={"uris": ["/photos/1.png"]}), client.get("/jobs/cnnray-predict-1")):
        assert found.status_code == 403
        assert "--jobs-output" in found.json()["error"]


@pytest.mark.parametrize(
    "error", [ConnectionError("No dashboard."), RuntimeError("Request failed with status code 500.")]
)
def test_a_job_api_that_does_not_answer_gives_503(start_client, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(job_queue, "_client", fail)
    client = start_client(jobs=SETTINGS)
    client.app.service.queue = JobQueue()
    assert client.get("/jobs/cnnray-predict-404").status_code == 503


class Client:
    """Stands for Ray's client of its job API."""

    def __init__(self, delay=0.0, unfinished=0, refusals=()):
        self.delay, self.submitted, self._refusals = delay, [], [*refusals]
        status = SimpleNamespace(is_terminal=lambda: False)
        self._jobs = [SimpleNamespace(submission_id=f"cnnray-predict-{n}", status=status) for n in range(unfinished)]

    def list_jobs(self):
        time.sleep(self.delay)
        return self._jobs

    def submit_job(self, **job):
        if self._refusals:
            raise RuntimeError(self._refusals.pop())
        self.submitted.append(job)

    def get_job_info(self, job):
        (submitted,) = (known for known in self.submitted if known["submission_id"] == job)
        return SimpleNamespace(message=None, status="RUNNING", metadata=submitted["metadata"])


@pytest.fixture
def in_ray(monkeypatch):
    """The runtime environment of a replica, in which somebody has put a key."""
    variables = {"CNNRAY_API_KEY": "secret", "CNNRAY_API_KEY_FILE": "/keys", "AWS_ENDPOINT_URL": "http://s3"}
    environment = {"working_dir": "gcs://code.zip", "env_vars": variables}
    context = SimpleNamespace(runtime_env=environment, gcs_address="10.0.0.1:6379")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)


def _submit(tmp_path):
    settings, queue = JobSettings(place=str(tmp_path), prefixes=("/photos",)), JobQueue()
    submitting = queue.submit(
        settings, ["/photos/it's one.png"], bundle="/bundles/a b", version="a1b2", engine="onnx"
    )
    try:
        return asyncio.run(submitting)
    finally:
        queue._threads.shutdown()


def test_a_job_has_the_code_of_the_replica_and_no_keys(monkeypatch, in_ray, tmp_path):
    monkeypatch.setattr(job_queue, "_client", lambda: client)
    client = Client()
    job = _submit(tmp_path).id
    (submitted,) = client.submitted
    assert submitted["runtime_env"] == {
        "working_dir": "gcs://code.zip", "env_vars": {"AWS_ENDPOINT_URL": "http://s3"}
    }  # fmt: skip
    words = shlex.split(submitted["entrypoint"])
    assert words[:4] == ["env", "RAY_ADDRESS=10.0.0.1:6379", "python", "jobs/predict.py"]
    flags = dict(zip(words[4::2], words[5::2], strict=True))
    assert (flags["--bundle"], flags["--output"]) == ("/bundles/a b", str(tmp_path / job))
    assert flags["--bundle-version"] == "a1b2"
    assert pyarrow.parquet.read_table(flags["--input"])["uri"].to_pylist() == ["/photos/it's one.png"]


def test_a_client_that_was_told_to_try_again_has_no_job_later(monkeypatch, in_ray, tmp_path):
    client = Client(delay=0.5)
    monkeypatch.setattr(job_queue, "_client", lambda: client)
    monkeypatch.setattr(job_queue, "_CALL_SECONDS", 0.1)
    with pytest.raises(RequestError) as raised:
        _submit(tmp_path)  # ends when the thread has ended
    assert raised.value.status == 503
    assert not client.submitted


def test_the_rows_of_a_job_are_where_it_was_told_to_write_them(monkeypatch, in_ray, tmp_path):
    client = Client()
    monkeypatch.setattr(job_queue, "_client", lambda: client)
    job = _submit(tmp_path)
    assert job.rows == str(tmp_path / job.id)
    later = JobSettings(place="/elsewhere", prefixes=("/photos",))  # of another deployment
    found = asyncio.run(JobQueue().find(later, job.id))
    assert (found.state, found.rows) == ("RUNNING", job.rows)
    client.submitted[0]["metadata"] = None  # as of an earlier version
    assert asyncio.run(JobQueue().find(later, job.id)).rows == f"/elsewhere/{job.id}"


def test_a_job_api_that_hangs_holds_no_thread_of_others(start_client, monkeypatch):
    monkeypatch.setattr(job_queue, "_CALL_SECONDS", 0.05)
    answers = threading.Event()
    monkeypatch.setattr(job_queue, "_client", answers.wait)
    client = start_client(jobs=SETTINGS)
    client.app.service.queue = queue = JobQueue()
    try:
        for _ in range(40):  # more than the event loop has threads
            assert client.get("/jobs/cnnray-predict-404").status_code == 503
        # Bodies of this size are parsed in a thread.
        image = {"image": "A" * 2**20}
        assert client.post("/predict", json=image).status_code == 415
        monkeypatch.setattr(job_queue, "_MOST_CALLS", 4)
        refused = client.get("/jobs/cnnray-predict-404")
        assert (refused.status_code, "Too many" in refused.json()["error"]) == (503, True)
    finally:
        answers.set()
        queue._threads.shutdown()


def test_a_cluster_that_has_just_started_is_asked_again(monkeypatch, in_ray, tmp_path):
    client = Client(refusals=["Request failed with status code 500: No available agent to submit job."])
    monkeypatch.setattr(job_queue, "_client", lambda: client)
    _submit(tmp_path)
    assert len(client.submitted) == 1
    client = Client(refusals=["Request failed with status code 500: Something else."])
    with pytest.raises(RequestError, match="RuntimeError"):
        _submit(tmp_path)


def test_jobs_that_are_not_done_are_bounded(monkeypatch, in_ray, tmp_path):
    client = Client(unfinished=16)
    monkeypatch.setattr(job_queue, "_client", lambda: client)
    with pytest.raises(RequestError, match="16 jobs are not done yet"):
        _submit(tmp_path)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"jobs_output": "/rows"}, "--jobs-output and --jobs-from need each other"),
        ({"jobs_from": ["/photos"]}, "--jobs-output and --jobs-from need each other"),
        ({"jobs_output": "/rows", "jobs_from": ["/photos/../x"]}, "has .. in it"),
        ({"jobs_output": "/rows", "jobs_from": ["ftp://x"]}, "ftp://"),
        ({"log_images": True}, "need --log-requests"),
        ({"log_requests": "/log", "log_days": 1e6}, "--log-days"),
        ({"log_requests": "/log", "log_share": 2}, "--log-share"),
    ],
)
def test_flags_that_cannot_work_get_a_sentence(flags, sentence):
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
        ServeConfig(bundle="/nowhere", **flags)
