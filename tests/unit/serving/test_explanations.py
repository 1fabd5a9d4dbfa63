"""Pictures of the regions that support an answer."""

import asyncio
import base64
import io

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
        ("", [("image", GOOD), ("image", GOOD)], 400, "expected one"),
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
    assert client.post("/predict?explain=true", content=GOOD, headers=PNG).status_code == 403
    assert client.post("/predict", content=GOOD, headers=PNG).status_code == 200


@pytest.mark.parametrize(
    ("error", "status"), [(HeatMapsLostError("It has ended."), 503), (BundleError("It has no features."), 422)]
)
def test_a_process_that_fails_gives_a_sentence_and_the_next_request_another_process(
    start_client, monkeypatch, error, status
):
    client, real = start_client(), HeatMapProcess.__call__

    def fail(self, images, classes):
        raise error

    monkeypatch.setattr(HeatMapProcess, "__call__", fail)
    found = client.post("/explain", content=GOOD, headers=PNG)
    assert found.status_code == status
    monkeypatch.setattr(HeatMapProcess, "__call__", real)
    assert client.post("/explain", content=GOOD, headers=PNG).status_code == 200
    process = client.app.service._explanations._process._process
    assert process.is_alive()
    client.app.service.close()
    assert not process.is_alive()


def test_requests_that_wait_are_bounded_and_a_slow_process_is_ended(start_client, monkeypatch):
    client = start_client(timeout_seconds=0.5)
    service = client.app.service
    ended = []
    monkeypatch.setattr(HeatMapProcess, "end", lambda self: ended.append(self))
    monkeypatch.setattr(explanations, "_draw", lambda *_: __import__("time").sleep(1.5))
    (served,) = service.models.all

    async def ask():
        tasks = [service.explain(served, [GOOD], [0]) for _ in range(explanations._MOST_WAITING + 1)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = client.portal.call(ask)
    assert [error.status for error in errors] == [503] * len(errors)
    assert "Too many requests" in str(errors[-1])
    assert "longer than 0.5 seconds" in str(errors[0])
    assert ended


def test_a_process_that_is_not_needed_ends(start_client, monkeypatch):
    monkeypatch.setattr(explanations, "_IDLE_SECONDS", 0.1)
    client = start_client()
    assert client.post("/explain", content=GOOD, headers=PNG).status_code == 200
    service = client.app.service
    client.portal.call(asyncio.sleep, 0.5)
    assert service._explanations._process is None


def test_colours_of_a_heat_map():
    from cnnray.models.heat_maps import overlay

    heat = np.linspace(0, 1, 5, dtype=np.float32)[None]
    colours = overlay(np.zeros((1, 5, 3), np.uint8), heat)[0]
    strongest = [int(colour.argmax()) for colour in colours[[0, 2, 4]]]
    assert strongest == [2, 1, 0]  # blue, green, red
