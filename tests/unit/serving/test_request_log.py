"""The request log: what is written, and that no request waits for it."""

import base64
import hashlib
import io
import threading
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.models.answers import Answer, Rules
from cnnray.serving import request_log
from cnnray.serving.pipeline import Encoded
from cnnray.serving.request_log import SCHEMA, RequestLog
from cnnray.serving.settings import LogSettings
from tests.unit.serving.conftest import GOOD, settings

INFO = SimpleNamespace(class_names=["red", "green", "blue"])
SERVED = SimpleNamespace(name="colours", version="cnn-1", bundle=SimpleNamespace(info=INFO), rules=Rules())
IMAGE = Encoded(GOOD, 10**6)
ANSWER = Answer(np.asarray([0.2, 0.7, 0.1], np.float32), (1,))


class Counted:
    def __init__(self):
        self.written = self.lost = 0

    def __call__(self, written=0, lost=0):
        self.written += written
        self.lost += lost


def read(folder):
    files = sorted(folder.rglob("*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file, partitioning=None).to_pylist()]


def add(log, number, images=(IMAGE,), answers=(ANSWER,)):
    request_log.request_id.set(f"request-{number}")
    log.add(SERVED, images, answers, 0.25)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(request_log, "_MOST_SECONDS", 0.05)
    monkeypatch.setattr(request_log, "_FIRST_PAUSE", 0.05)


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_image_has_a_row_and_by_default_no_image_is_kept(tmp_path):
    counted = Counted()
    log = RequestLog(LogSettings(place=str(tmp_path)), counted)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    reversed_scores = Answer(ANSWER.probabilities[::-1], (1,))
    add(log, 1, [IMAGE, BadImage("empty"), pixels], [ANSWER, BadImage("empty"), reversed_scores])
    log.close()
    first, second, third = read(tmp_path)
    # Of a bundle without thresholds, and with one label for each image.
    assert list(first) == [name for name in SCHEMA.names if name not in ("unsure", "group", "labels")]
    assert first.pop("time") > datetime.now(UTC) - timedelta(minutes=1)
    assert first.pop("confidence") == pytest.approx(0.7)
    assert first.pop("top_k_scores") == pytest.approx([0.7, 0.2, 0.1])
    assert first == {
        "request_id": "request-1", "index": 0, "model": "colours", "version": "cnn-1", "prediction": "green",
        "top_k_labels": ["green", "red", "blue"], "error": None, "seconds": 0.25,
        "sha256": hashlib.sha256(GOOD).hexdigest(), "image": None,
    }  # fmt: skip
    assert (second["index"], second["prediction"], second["sha256"]) == (1, None, None)
    assert second["error"] == "empty"
    assert third["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert (counted.written, counted.lost) == (3, 0)
    (file,) = tmp_path.rglob("*.parquet")
    assert file.parent.name == f"date={datetime.now(UTC):%Y-%m-%d}"


def test_images_are_kept_where_that_is_asked_for(tmp_path):
    log = RequestLog(LogSettings(place=str(tmp_path), images=True), Counted())
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    add(log, 1, [IMAGE, pixels], [ANSWER, ANSWER])
    log.close()
    sent, drawn = read(tmp_path)
    assert sent["image"] == GOOD
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(drawn["image"]))), pixels)


def test_a_share_of_the_requests_is_logged(tmp_path):
    log = RequestLog(LogSettings(place=str(tmp_path), share=0.25), Counted())
    for number in range(2000):
        add(log, number)
    log.close()
    assert 400 < len(read(tmp_path)) < 600  # 5 standard deviations


def test_what_cannot_be_written_is_tried_again_and_no_request_waits(tmp_path, monkeypatch, quick):
    counted, write, broken = Counted(), storage.write_bytes, threading.Event()
    broken.set()
    tried = []

    def write_or_fail(uri, data):
        tried.append(uri)
        if broken.is_set():
            raise storage.UnavailableError("The disk is full.")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write_or_fail)
    log = RequestLog(LogSettings(place=str(tmp_path)), counted)
    for number in range(100):
        add(log, number)
    until(lambda: len(tried) >= 2)
    add(log, 100)
    assert (counted.written, counted.lost) == (0, 0)
    broken.clear()
    until(lambda: counted.written == 101)
    assert [row["request_id"] for row in read(tmp_path)] == [f"request-{number}" for number in range(101)]
    log.close()


def test_rows_that_are_no_text_do_not_end_the_log(tmp_path, quick):
    counted = Counted()
    log = RequestLog(LogSettings(place=str(tmp_path)), counted)
    add(log, 1, [BadImage("corrupt", "\ud800")], [BadImage("corrupt", "\ud800")])
    until(lambda: counted.lost == 1)
    add(log, 2)
    until(lambda: counted.written == 1)
    assert log._held == 0
    log.close()


def test_rows_that_are_all_dropped_are_counted_and_the_log_goes_on(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(request_log, "_ROWS_AT_ONCE", 1)
    counted = Counted()
    log = RequestLog(LogSettings(place=str(tmp_path)), counted)
    add(log, 1, [BadImage("corrupt", "\ud800")], [BadImage("corrupt", "\ud800")])
    until(lambda: counted.lost == 1)
    until(lambda: log._held == 0)
    log.close()


def test_what_waits_is_bounded(tmp_path, monkeypatch):
    counted, blocked = Counted(), threading.Event()
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: blocked.wait(30))
    most = 10 * (len(GOOD) + ANSWER.nbytes + request_log._BYTES_OF_A_ROW)
    monkeypatch.setattr(request_log, "_MOST_HELD", most)
    monkeypatch.setattr(request_log, "_MOST_SECONDS", 0.0)
    log = RequestLog(LogSettings(place=str(tmp_path), images=True), counted)
    start = time.monotonic()
    for number in range(100):
        add(log, number)
    assert time.monotonic() - start < 5
    assert counted.lost == 90
    blocked.set()
    log.close()
    assert counted.written == 10
    assert log._held == 0


def test_rows_that_the_end_cuts_off_are_counted(tmp_path, monkeypatch):
    def fail(uri, data):
        raise OSError("The disk is full.")

    counted = Counted()
    monkeypatch.setattr(storage, "write_bytes", fail)
    log = RequestLog(LogSettings(place=str(tmp_path)), counted)
    add(log, 1)
    log.close()
    assert (counted.written, counted.lost) == (0, 1)


def test_old_files_of_the_log_are_deleted_and_nothing_else(tmp_path):
    today = datetime.now(UTC)
    name = "120000-0123456789ab-000001.parquet"
    days = [f"date={today - timedelta(days=days):%Y-%m-%d}" for days in (0, 2, 3, 4, 400)]
    others = ["date=2020-01-01-mine", "2020-01-01", "other"]
    for folder in [*days, *others]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    (tmp_path / days[-1] / "sales.parquet").touch()
    hidden = tmp_path / "date=2020-01-02" / ".keep"
    hidden.parent.mkdir()
    hidden.touch()
    (hidden.parent / name).touch()
    (tmp_path / "date=2020-02-30").mkdir()  # no day
    log = RequestLog(LogSettings(place=str(tmp_path), days=3), Counted())
    log.close()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet")}
    assert left == {f"{folder}/{name}" for folder in [*days[:3], *others]} | {f"{days[-1]}/sales.parquet"}
    assert not (tmp_path / days[3]).exists()
    assert hidden.exists()


def test_a_file_that_is_tried_again_keeps_its_name(tmp_path, monkeypatch, quick):
    """Its first attempt may have succeeded, and only the answer of the storage been lost."""
    uris, write = [], storage.write_bytes

    def write_and_fail_once(uri, data):
        uris.append(uri)
        write(uri, data)
        if len(uris) == 1:
            raise storage.UnavailableError("There was no answer.")

    monkeypatch.setattr(storage, "write_bytes", write_and_fail_once)
    log = RequestLog(LogSettings(place=str(tmp_path)), Counted())
    add(log, 1)
    until(lambda: len(uris) == 2)
    log.close()
    assert uris[0] == uris[1]
    assert len(read(tmp_path)) == 1


def test_a_request_that_cannot_be_logged_does_not_end_the_log(tmp_path):
    counted = Counted()
    log = RequestLog(LogSettings(place=str(tmp_path)), counted)
    add(log, 1, answers=(ANSWER, ANSWER))
    add(log, 2)
    log.close()
    assert [row["request_id"] for row in read(tmp_path)] == ["request-2"]
    assert (counted.written, counted.lost, log._held) == (1, 1, 0)


def test_the_answers_of_all_protocols_are_logged_with_the_ids_of_their_requests(start_client, tmp_path):
    client = start_client(log=LogSettings(place=str(tmp_path)))
    client.post("/predict", content=GOOD, headers={"content-type": "image/png", "x-request-id": "one"})
    client.post("/predict", files=[("image", GOOD), ("image", b"nothing")], headers={"x-request-id": "two"})
    encoded = {"b64": base64.b64encode(GOOD).decode()}
    client.post("/v1/models/colours:predict", json={"instances": [encoded]}, headers={"x-request-id": "three"})
    client.get("/metadata", headers={"x-request-id": "four"})
    client.app.service.close()
    rows = read(tmp_path)
    assert [(row["request_id"], row["index"]) for row in rows] == [("one", 0), ("two", 0), ("two", 1), ("three", 0)]
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    assert rows[0]["prediction"] == rows[1]["prediction"]


def test_other_settings_begin_another_log(start_client, bundle, tmp_path):
    client = start_client(log=LogSettings(place=str(tmp_path / "first")))
    service = client.app.service
    client.post("/predict", content=GOOD, headers={"content-type": "image/png"})
    models = [("colours", bundle, 1.0)]
    client.portal.call(service.change_settings, settings(*models, log=LogSettings(place=str(tmp_path / "second"))))
    client.post("/predict", content=GOOD, headers={"content-type": "image/png"})
    client.portal.call(service.change_settings, settings(*models))
    client.post("/predict", content=GOOD, headers={"content-type": "image/png"})
    until(lambda: len(read(tmp_path / "first")) == 1 and len(read(tmp_path / "second")) == 1)
