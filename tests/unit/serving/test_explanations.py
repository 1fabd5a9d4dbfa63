"""Pictures of the regions that support an answer."""

import asyncio
import base64
import io
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from cnnray.models.bundle import BundleError
from cnnray.models.heat_maps import HeatMapProcess, HeatMapsLostError
from cnnray.serving import explanations
from tests.unit.serving.conftest import GOOD, check_answer

PNG = {"content-type": "image/png"}


def test_the_heat_map_is_that_of_the_class_that_is_asked_for(client, expected):
    answer = client.post("/predict?explain=true", content=GOOD, headers=PNG).json()
    check_answer(answer, expected["rgb.png"][1])
    picture = Image.open(io.BytesIO(base64.b64decode(answer["heat_map"])))
    assert max(picture.size) == explanations._LONGER_SIDE
    found = client.post("/explain", content=GOOD, headers=PNG)
    assert found.headers["content-type"] == "image/png"
    assert found.content == base64.b64decode(answer["heat_map"])
    assert (found.headers["x-class"], found.headers["x-model"]) == (answer["prediction"], answer["model"])
    other = next(score["class"] for score in answer["all_predictions"] if score["class"] != answer["prediction"])
    found = client.post(f"/explain?label={other}", content=GOOD, headers=PNG)
    assert found.headers["x-class"] == other
    assert found.content != base64.b64decode(answer["heat_map"])


def test_several_images_have_heat_maps_where_they_have_answers(client):
    files = [("image", GOOD), ("image", b"nothing"), ("image", GOOD)]
    first, second, third = client.post("/predict?explain=true", files=files).json()
    assert first["heat_map"] == third["heat_map"]
    assert "heat_map" not in second
    assert "heat_map" not in client.post("/predict", content=GOOD, headers=PNG).json()


@pytest.mark.parametrize(
    ("query", "files", "status", "sentence"),
    [
        ("?label=purple", [("image", GOOD)], 404, "no class 'purple'"),
        ("", [("image", GOOD), ("image", GOOD)], 400, "Expected one image"),
        ("", [("image", b"nothing")], 415, "not an image"),
        ("?version=none", [("image", GOOD)], 404, "no version"),
    ],
)
def test_what_cannot_be_explained_gets_a_sentence(client, query, files, status, sentence):
    found = client.post(f"/explain{query}", files=files)
    assert found.status_code == status
    assert sentence in found.json()["error"]


def test_a_service_can_refuse_to_explain(start_client):
    client = start_client(explain=False)
    assert client.post("/explain", content=GOOD, headers=PNG).status_code == 403
    answer = client.post("/predict?explain=true", content=GOOD, headers=PNG).json()
    assert answer["heat_map"] is None
    assert "--explain false" in answer["heat_map_problem"]


@pytest.mark.parametrize(
    ("error", "status"), [(HeatMapsLostError("It has ended."), 503), (BundleError("It has no features."), 422)]
)
def test_what_fails_gets_a_sentence_and_the_answer_is_given_all_the_same(
    start_client, expected, monkeypatch, error, status
):
    client, real = start_client(), HeatMapProcess.__call__

    def fail(self, images, classes):
        raise error

    monkeypatch.setattr(HeatMapProcess, "__call__", fail)
    found = client.post("/explain", content=GOOD, headers=PNG)
    assert found.status_code == status
    answer = client.post("/predict?explain=true", content=GOOD, headers=PNG).json()
    check_answer(answer, expected["rgb.png"][1])
    assert (answer["heat_map"], answer["heat_map_problem"]) == (None, found.json()["error"])
    monkeypatch.setattr(HeatMapProcess, "__call__", real)
    assert client.post("/explain", content=GOOD, headers=PNG).status_code == 200
    process = client.app.service._explanations._process._process
    assert process.is_alive()
    client.app.service.close()
    assert not process.is_alive()


def test_requests_that_wait_are_bounded_and_the_process_outlives_those_that_give_up(start_client, monkeypatch):
    client = start_client(timeout_seconds=0.3)
    service = client.app.service
    monkeypatch.setattr(explanations, "_draw", lambda *_: time.sleep(1.0) or [b"a picture"])
    (served,) = service.models.all

    async def ask():
        return await service.explain(served, [GOOD], [0])

    async def ask_many():
        waiting = [asyncio.create_task(ask()) for _ in range(explanations._MOST_WAITING)]
        await asyncio.sleep(0.1)
        return await asyncio.gather(ask(), *waiting, return_exceptions=True)

    first, *others = client.portal.call(ask_many)
    assert "Too many requests" in str(first)
    assert all("longer than 0.3 seconds" in str(error) for error in others)
    assert {error.status for error in (first, *others)} == {503}
    process = service._explanations._process
    assert process is not None
    client.portal.call(asyncio.sleep, explanations._MOST_WAITING + 0.5)
    assert not service._explanations._tasks
    assert service._explanations._process is process


def test_a_process_that_does_not_answer_is_ended(start_client, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(explanations, "_LONGEST_SECONDS", 0.2)
    monkeypatch.setattr(explanations, "_draw", lambda *_: ended.wait(10))
    monkeypatch.setattr(HeatMapProcess, "end", lambda self: ended.set())
    client = start_client()
    assert client.post("/explain", content=GOOD, headers=PNG).status_code == 503
    assert ended.is_set()


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_is_not_needed_ends(start_client, monkeypatch, fails):
    monkeypatch.setattr(explanations, "_IDLE_SECONDS", 0.1)
    if fails:
        monkeypatch.setattr(explanations, "_draw", _fail)
    client = start_client()
    assert client.post("/explain", content=GOOD, headers=PNG).status_code == (422 if fails else 200)
    service = client.app.service
    client.portal.call(asyncio.sleep, 0.5)
    assert service._explanations._process is None


def _fail(*_):
    raise BundleError("It has no features.")


def test_another_network_in_the_place_of_the_bundle_explains_nothing(start_client, bundle, newer, tmp_path):
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    client = start_client(("colours", str(place), 1.0))
    shutil.rmtree(place)
    shutil.copytree(newer, place)
    found = client.post("/explain", content=GOOD, headers=PNG)
    assert found.status_code == 422
    assert "cannot explain the answers of" in found.json()["error"]
    client.app.service.close()


def test_colours_of_a_heat_map():
    from cnnray.models.heat_maps import overlay

    heat = np.linspace(0, 1, 5, dtype=np.float32)[None]
    colours = overlay(np.zeros((1, 5, 3), np.uint8), heat)[0]
    strongest = [int(colour.argmax()) for colour in colours[[0, 2, 4]]]
    assert strongest == [2, 1, 0]  # blue, green, red
