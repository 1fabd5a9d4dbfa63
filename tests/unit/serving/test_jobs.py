"""Predictions that requests ask for: which images they may name, and what they are answered."""

import pytest

from cnnray.serving import job_queue
from cnnray.serving.bodies import RequestError
from cnnray.serving.job_queue import JobQueue, QueuedJob
from cnnray.serving.settings import JobSettings

SETTINGS = JobSettings(place="/rows", prefixes=("/photos", "s3://bucket/cats/", "s3://other"))


class Queue:
    """Stands for Ray's job API."""

    def __init__(self):
        self.submitted, self.jobs = [], {}

    async def submit(self, settings, uris, bundle, engine):
        self.submitted.append((settings, [*uris], bundle, engine))
        return "cnnray-predict-1"

    async def find(self, job):
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
    assert queue.submitted == [(SETTINGS, uris, bundle, "keras")]
    newest = client.app.service.models.versions("colours")[-1][0].version
    client.post("/jobs", json={"uris": uris[:1], "model": "colours", "version": newest})
    assert queue.submitted[-1][2] == newer


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
    queue.jobs["cnnray-predict-1"] = QueuedJob("FAILED", "There are no images.")
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


@pytest.mark.parametrize("error", [ConnectionError("No dashboard."), TimeoutError()])
def test_a_job_api_that_does_not_answer_gives_503(start_client, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(job_queue, "_client", fail)
    client = start_client(jobs=SETTINGS)
    client.app.service.queue = JobQueue()
    assert client.get("/jobs/cnnray-predict-1").status_code == 503
    with pytest.raises(RequestError):
        raise job_queue.no_such_job("x")
