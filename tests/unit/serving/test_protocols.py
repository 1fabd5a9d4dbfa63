"""The Open Inference Protocol v2 and TensorFlow Serving's API."""

import base64
import json
import struct

import numpy as np
import pytest

from cnnray.images.decode import decode
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from tests.unit.serving.conftest import GOOD, SIZE


def _pixels(bundle, data=GOOD):
    return decode(data, SIZE)[None]


def test_open_inference_protocol_in_json_and_binary(client, bundle):
    pixels = _pixels(bundle)
    (expected,) = Predictor(Bundle.load(bundle)).probabilities(pixels)
    texts = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(GOOD).decode()]}
    numbers = {"name": "image", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3], "data": pixels.ravel().tolist()}
    nested = numbers | {"data": pixels.tolist()}
    for tensor in (texts, numbers, nested):
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


V2_REFUSED = {
    "no inputs": ({"inputs": []}, "inputs: List should have at least 1 item"),
    "another input": (_infer_request("x", "FP32", [1], 1), "expected 'image'"),
    "another shape": (
        _infer_request("image", "UINT8", [1, 2, 2, 3], *range(12)),
        "image is [1, 2, 2, 3]; expected [N, 32",
    ),
    "less data": (_infer_request("image", "UINT8", [1, 32, 32, 3], 0), "has 1 values"),
    "no data": (_infer_request("image_bytes", "BYTES", [1]), "has no data"),
    "fractions": (_infer_request("image", "UINT8", [1, 1, 1, 3], 0.5, 0.5, 0.5), "not integers"),
    "numbers for strings": (_infer_request("image_bytes", "BYTES", [1], 1), "not strings"),
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
