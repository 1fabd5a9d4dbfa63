"""The Open Inference Protocol v2 and TensorFlow Serving's API."""

import asyncio
import base64
import json
import struct
import threading
import time
import tracemalloc

import numpy as np
import pytest

from cnnray.images.decode import BadImage, decode
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.serving import bodies
from cnnray.serving.bodies import RequestError
from cnnray.serving.service import STATUS_BY_REASON
from tests.malformed import malformed_json
from tests.networks import GEOMETRY
from tests.unit.serving.conftest import GOOD

SHAPE = GEOMETRY.image_size.shape


def _pixels(bundle, data=GOOD):
    return decode(data, GEOMETRY)[None]


def test_open_inference_protocol_in_json_and_binary(client, bundle):
    pixels = _pixels(bundle)
    (expected,) = Predictor(Bundle.load(bundle)).probabilities(pixels)
    texts = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(GOOD).decode()]}
    numbers = {"name": "image", "datatype": "UINT8", "shape": [1, *SHAPE], "data": pixels.ravel().tolist()}
    nested = numbers | {"data": pixels.tolist()}
    rows = numbers | {"data": pixels[0].tolist()}
    for tensor in (texts, numbers, nested, rows):
        response = client.post("/v2/models/colours/infer", json={"id": "7", "inputs": [tensor]})
        assert response.status_code == 200, response.text
        probabilities, label = response.json()["outputs"]
        assert (response.json()["id"], response.json()["model_name"]) == ("7", "colours")
        np.testing.assert_allclose(probabilities["data"], expected, atol=1e-5)
        best = ["red", "green", "blue"][expected.argmax()]
        assert label == {"name": "label", "datatype": "BYTES", "shape": [1], "data": [best]}
    for tensor, content in (
        ({k: v for k, v in texts.items() if k != "data"}, struct.pack("<I", len(GOOD)) + GOOD),
        ({k: v for k, v in numbers.items() if k != "data"}, pixels.tobytes()),
    ):
        header = json.dumps(
            {
                "inputs": [tensor | {"parameters": {"binary_data_size": len(content)}}],
                "outputs": [
                    {"name": "probabilities", "parameters": {"binary_data": True}},
                    {"name": "probabilities", "parameters": {"classification": 2}},
                ],
            }
        ).encode()
        response = client.post(
            "/v2/models/colours/infer",
            content=header + content,
            headers={"Inference-Header-Content-Length": str(len(header)), "content-type": "application/octet-stream"},
        )
        assert response.status_code == 200, response.text
        length = int(response.headers["inference-header-content-length"])
        answer = json.loads(response.content[:length])
        np.testing.assert_allclose(np.frombuffer(response.content[length:], "<f4"), expected, atol=1e-5)
        assert answer["outputs"][0]["parameters"] == {"binary_data_size": 12}
        best = int(expected.argmax())
        assert answer["outputs"][1]["shape"] == [1, 2]
        assert answer["outputs"][1]["data"][0].endswith(f":{best}:{['red', 'green', 'blue'][best]}")


def _infer_request(name, kind, shape, *data):
    return {"inputs": [{"name": name, "datatype": kind, "shape": shape} | ({"data": list(data)} if data else {})]}


TEXT = base64.b64encode(GOOD).decode()
NO_PIXELS = {"name": "image", "datatype": "UINT8", "shape": [2, 1, 1, 3], "data": []}
V2_REFUSED = {
    "no inputs": ({"inputs": []}, "inputs: List should have at least 1 item"),
    "another input": (_infer_request("x", "FP32", [1], 1), "expected 'image'"),
    "another shape": (
        _infer_request("image", "UINT8", [1, 2, 2, 3], *range(12)),
        "image is [1, 2, 2, 3]; expected [N, 24, 36, 3]",
    ),
    "less data": (_infer_request("image", "UINT8", [1, *SHAPE], 0), "has 1 values"),
    "no data": (_infer_request("image_bytes", "BYTES", [1]), "has no data"),
    "fractions": (_infer_request("image", "UINT8", [1, 1, 1, 3], 0.5, 0.5, 0.5), "not integers"),
    "true among pixels": (
        _infer_request("image", "UINT8", [2, 1, 1, 2], 0, 1, 1, True),
        "at index 1 are not integers",
    ),
    "pixels of one image too many, of the next too few": (
        _infer_request("image", "UINT8", [2, 1, 1, 3], [0, 0, 0, 0], [0, 0]),
        "at index 0 has 4 values, and its shape is [1, 1, 3]",
    ),
    "pixels of one image for two": (
        _infer_request("image", "UINT8", [2, 1, 1, 3], [0, 0, 0]),
        "image has 1 images, and its shape is [2, 1, 1, 3]",
    ),
    "pixels nested in two ways": (
        _infer_request("image", "UINT8", [2, 1, 1, 3], [0, 0, 0], [[[0, 0, 0]]]),
        "image is [2, 1, 1, 3]; expected [N,",
    ),
    "no pixels": ({"inputs": [NO_PIXELS]}, "image has 0 images"),
    "ragged pixels": (
        _infer_request("image", "UINT8", [2, 1, 2, 1], [[[0], [1]]], [[[0], []]]),
        "index 1 are not all of",
    ),
    "numbers for strings": (_infer_request("image_bytes", "BYTES", [2], "", 1), "at index 1 is no string"),
    "fewer images": (_infer_request("image_bytes", "BYTES", [2], "eA=="), "has 1 elements, and its shape says 2"),
    "no base64": (
        _infer_request("image_bytes", "BYTES", [2], TEXT, "%"),
        "at index 1 cannot be used: not valid base64",
    ),
    "a negative shape": (_infer_request("image", "UINT8", [1, -1, 1, 3], 0), "its shape"),
    "a huge shape": (_infer_request("image", "UINT8", [1, 2**62, 2**62, 3], 0), "its shape"),
    "another output": (
        _infer_request("image_bytes", "BYTES", [1], "eA==") | {"outputs": [{"name": "x"}]},
        "no output 'x'",
    ),
}


@pytest.mark.parametrize("case", V2_REFUSED)
def test_open_inference_requests_that_are_refused(case, client):
    content, sentence = V2_REFUSED[case]
    response = client.post("/v2/models/colours/infer", json=content)
    assert (response.status_code, sentence in response.json()["error"]) == (400, True), response.text


def test_tensorflow_serving(client, bundle):
    pixels = _pixels(bundle)
    (expected,) = Predictor(Bundle.load(bundle)).probabilities(pixels)
    encoded = {"b64": base64.b64encode(GOOD).decode()}
    for body in (
        {"instances": [encoded]}, {"instances": [{"image_bytes": encoded}], "signature_name": "encoded"},
        {"instances": pixels.tolist()}, {"instances": [{"image": pixels[0].tolist()}]},
        {"inputs": {"image": pixels.tolist()}}, {"inputs": {"image_bytes": [encoded]}}, {"inputs": [encoded]},
    ):  # fmt: skip
        response = client.post("/v1/models/colours:predict", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()["predictions"][0] if "instances" in body else response.json()["outputs"]
        np.testing.assert_allclose(np.ravel(answer["probabilities"]), expected, atol=1e-5)
    version = Bundle.load(bundle).version
    response = client.post(f"/v1/models/colours/versions/{version}:predict", json={"instances": [encoded]})
    assert response.status_code == 200
    assert client.get("/v1/models/colours").json()["model_version_status"][0]["state"] == "AVAILABLE"
    signatures = client.get("/v1/models/colours/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert signatures.keys() == {"serving_default", "encoded"}
    for body in (
        {}, {"instances": []}, {"instances": [1], "inputs": [1]}, {"instances": [{"b64": 1}]}, {"instances": [[0.5]]},
        {"instances": [{"x": 1}]}, {"instances": [encoded], "signature_name": "x"},
    ):  # fmt: skip
        assert client.post("/v1/models/colours:predict", json=body).status_code == 400, body


def _rows(response):
    """The probabilities in a response of any of the two protocols."""
    answer = response.json()
    if "outputs" in answer and isinstance(answer["outputs"], list):
        return np.reshape(answer["outputs"][0]["data"], answer["outputs"][0]["shape"])
    if "predictions" in answer:
        return np.asarray([row["probabilities"] for row in answer["predictions"]])
    return np.asarray(answer["outputs"]["probabilities"])


def _batches(images):
    """Requests with encoded images: path, options of `client.post`."""
    texts = [base64.b64encode(data).decode() for data in images]
    tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [len(images)]}
    content = b"".join(struct.pack("<I", len(data)) + data for data in images)
    header = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(content)}}]}).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    encoded = [{"b64": text} for text in texts]
    return [
        ("/v2/models/colours/infer", {"json": {"inputs": [tensor | {"data": texts}]}}),
        ("/v2/models/colours/infer", {"content": header + content, "headers": length}),
        ("/v1/models/colours:predict", {"json": {"instances": encoded}}),
        ("/v1/models/colours:predict", {"json": {"inputs": {"image_bytes": encoded}}}),
    ]


def test_the_awkward_set_has_a_row_for_each_image_or_a_refusal_that_names_the_index(client, expected):
    good = [(data, answer.probabilities) for data, answer in expected.values() if not isinstance(answer, BadImage)]
    bad = [(data, answer) for data, answer in expected.values() if isinstance(answer, BadImage)]
    assert (b"", "empty") in [(data, answer.reason) for data, answer in bad]
    for start in range(0, len(good), 16):
        images, rows = zip(*good[start : start + 16], strict=True)
        for path, options in _batches(images):
            response = client.post(path, **options)
            assert response.status_code == 200, response.text
            np.testing.assert_allclose(_rows(response), rows, atol=1e-5)
    for index, (data, answer) in enumerate(bad):
        images = [GOOD] * len(bad)
        images[index] = data
        for path, options in _batches(images):
            response = client.post(path, **options)
            assert response.status_code == STATUS_BY_REASON.get(answer.reason, 422)
            assert response.json()["error"].startswith(f"The image at index {index} cannot be used: {answer.reason}")


def test_a_missing_image_or_one_of_another_kind_is_refused_by_its_index(client):
    pixels, good = np.zeros(SHAPE, int).tolist(), {"b64": TEXT}
    for instances in (
        [good, good, None], [good, good, {"b64": None}], [good, good, pixels], [pixels, pixels, None],
        [pixels, pixels, good], [pixels, pixels, pixels[1:]], [pixels, pixels, [[[0, 1, 2], [3]]]], [good, good, {}],
        [{"image": pixels}, {"image": pixels}, {"image": [[[256, 0, 0]]]}],
    ):  # fmt: skip
        for content in ({"instances": instances}, {"inputs": instances}):
            response = client.post("/v1/models/colours:predict", json=content)
            assert response.status_code == 400
            assert "at index 2 " in response.json()["error"], response.text


ZEROS = [0] * GEOMETRY.image_size.bytes
JSON_ROUTES = {
    "an image": ("/predict", {"image": TEXT}),
    "images": ("/predict", {"images": [TEXT]}),
    "v2, encoded": ("/v2/models/colours/infer", _infer_request("image_bytes", "BYTES", [1], TEXT)),
    "v2, pixels": (
        "/v2/models/colours/versions/{}/infer",
        _infer_request("image", "UINT8", [1, *SHAPE], *ZEROS),
    ),
    "v2, parameters": (
        "/v2/models/colours/infer",
        _infer_request("image_bytes", "BYTES", [1], TEXT)
        | {
            "parameters": {"binary_data_output": False},
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": False, "classification": 1}}],
        },
    ),
    "v1, rows": ("/v1/models/colours:predict", {"signature_name": "encoded", "instances": [{"b64": TEXT}]}),
    "v1, columns": ("/v1/models/colours/versions/{}:predict", {"inputs": {"image_bytes": [{"b64": TEXT}]}}),
    "v1, pixels": ("/v1/models/colours:predict", {"instances": [np.reshape(ZEROS, SHAPE).tolist()]}),
}


@pytest.mark.parametrize("route", JSON_ROUTES)
def test_malformed_json_is_refused_on_every_route(route, client, bundle):
    path, valid = JSON_ROUTES[route]
    path, headers = path.format(Bundle.load(bundle).version), {"content-type": "application/json"}
    assert client.post(path, json=valid).status_code == 200
    for name, body in malformed_json(valid).items():
        response = client.post(path, content=body, headers=headers)
        if name in OPTIONAL:
            assert response.status_code == 200, name
            continue
        answer = response.json()
        if response.status_code == 200 and path == "/predict":
            assert [entry["status"] for entry in answer] == [400], name  # an image that is no base64, in a list
            continue
        assert response.status_code in (400, 413), (name, response.text)
        assert answer["error"] == "No image provided" or answer["error"].endswith("."), name
        assert len(answer["error"]) < 300, name


@pytest.mark.parametrize(
    "part", [b"[],", b"[[[[1,2,3],[4,5,6]]]],", b"1.5,", b"300,", b'"ab",', b"{},", b'{"a":1},', b'"",', b"null,"]
)
def test_json_becomes_no_more_objects_than_it_was_taken_for(part, monkeypatch):
    body = b"[" + (2**20 // len(part)) * part + b"1]"
    tracemalloc.start()
    parsed = bodies.parse_json(body)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(parsed) > 1000
    monkeypatch.setattr(bodies, "_MOST_MEMORY", size - 1)
    with pytest.raises(RequestError, match="The JSON has too many values") as raised:
        bodies.parse_json(body)
    assert raised.value.status == 413


def test_json_of_too_many_values_is_refused(client, monkeypatch):
    monkeypatch.setattr(bodies, "_MOST_MEMORY", 2**20)
    for path, body in (
        ("/predict", b'{"images": [' + 4000 * b"{}," + b"1]}"),
        ("/v1/models/colours:predict", b'{"instances": [' + 9000 * b"[]," + b"[]]}"),
        ("/v2/models/colours/infer", b'{"inputs": [' + 9000 * b"[]," + b"[]]}"),
    ):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert (response.status_code, "too many values" in response.json()["error"]) == (413, True), path


def test_large_bodies_are_parsed_one_after_the_other(client):
    service, most, now, lock = client.app.service, 0, 0, threading.Lock()

    def parse(body):
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return len(body)

    async def parse_all():
        return await asyncio.gather(*(service.parse(bytes(bodies.LARGE_BODY + 1), parse) for _ in range(3)))

    assert client.portal.call(parse_all) == [bodies.LARGE_BODY + 1] * 3
    assert most == 1


OPTIONAL = {
    "no keys at parameters", "null at outputs", "no list elements at outputs", "no keys at outputs.0.parameters",
    "null at outputs.0.parameters.binary_data", "null at outputs.0.parameters.classification",
    "true at outputs.0.parameters.binary_data", "true at parameters.binary_data_output",
    "an object at parameters", "an object at outputs.0.parameters",
}  # fmt: skip
"""Values of JSON_ROUTES that may be left out."""


def test_a_malformed_header_before_binary_data_is_refused(client):
    (path, options) = _batches([GOOD])[1]
    length = int(options["headers"]["Inference-Header-Content-Length"])
    for text in ("x", "-1", str(length - 1), str(length + 1), "9" * 5000, "0"):
        headers = {"Inference-Header-Content-Length": text}
        assert client.post(path, content=options["content"], headers=headers).status_code == 400, text
    deep = b"[" * 5000
    headers = {"Inference-Header-Content-Length": "5000"}
    assert client.post(path, content=deep + options["content"], headers=headers).status_code == 400
