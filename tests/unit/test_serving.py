"""The application of a replica, in this process: what clients of each protocol send and get."""

import asyncio
import base64
import dataclasses
import json
import re
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import numpy as np
import pytest
from starlette.testclient import TestClient

from cnnray.images.decode import BadImage, decode
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleError, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.serving.application import application
from cnnray.serving.batching import Batcher
from cnnray.serving.bodies import RequestError
from cnnray.serving.config import ServeConfig
from cnnray.serving.service import STATUS_OF, Service
from cnnray.serving.settings import ModelSettings, Settings
from tests.awkward import awkward_images, bad_images
from tests.networks import coloured_noise, fitted

SIZE = 32
GOOD = awkward_images()["rgb.png"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle of three classes."""
    folder = tmp_path_factory.mktemp("bundle")
    model = fitted("small_cnn", SIZE, *coloured_noise(48, SIZE))
    bundles.save(model, BundleInfo(class_names=["red", "green", "blue"], image_size=SIZE), folder)
    return str(folder)


@pytest.fixture(scope="module")
def newer(bundle, tmp_path_factory):
    """Another version of it."""
    folder = tmp_path_factory.mktemp("newer")
    old = Bundle.load(bundle)
    bundles.save(old.model, dataclasses.replace(old.info, temperature=2.0), folder)
    return str(folder)


def _settings(*models, **changes):
    named = tuple(ModelSettings(name=name, uri=uri, share=share) for name, uri, share in models)
    return Settings(models=named, engine="keras", batch_size=8, **changes)


@pytest.fixture(scope="module")
def client(bundle):
    with _client(_settings(("colours", bundle, 1.0))) as found:
        yield found


def _client(settings, **options):
    service = Service(threads=2)
    client = TestClient(application(service, **options), raise_server_exceptions=False)
    client.app.state.service = service
    client.__enter__()
    client.portal.call(service.change, settings)
    return client


@pytest.fixture
def another(bundle):
    """A function that gives a client of other settings."""
    opened = []

    def open_one(*models, api_key=None, **changes):
        opened.append(_client(_settings(*models or [("colours", bundle, 1.0)], **changes), api_key=api_key))
        return opened[-1]

    yield open_one
    for one in opened:
        one.__exit__(None, None, None)


def _check(answer, expected):
    if isinstance(expected, BadImage):
        assert expected.reason in answer["error"]
        return
    assert answer["prediction"] == expected.label
    assert answer["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    found = {one["class"]: one["confidence"] for one in answer["all_predictions"]}
    assert list(found) == [name for name, _ in expected.top_k]
    assert found == pytest.approx(dict(expected.top_k), abs=1e-5)


# -- the same answers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(bundle):
    """Bytes and `Predictor`'s answer by name, of the awkward and the bad images."""
    contents = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    return {name: (data, Predictor(Bundle.load(bundle))([data])[0]) for name, data in contents.items()}


def test_one_image_in_each_form_has_the_answer_of_predictor(client, expected):
    for name, (data, answer) in expected.items():
        forms = [{"files": {"image": (name, data)}}, {"json": {"image": base64.b64encode(data).decode()}}]
        if data:
            forms.append({"content": data, "headers": {"content-type": "image/x"}})
        for form in forms:
            got = client.post("/predict", **form)
            if isinstance(answer, BadImage) and data:
                assert got.status_code == STATUS_OF.get(answer.reason, 422), name
            else:
                assert got.status_code == (200 if data else 400), name
            if data:
                _check(got.json(), answer)
            else:
                assert got.json()["error"] == "No image provided"


def test_several_images_each_have_their_own_answer_or_error(client, expected):
    chosen = [(name, data, answer) for name, (data, answer) in expected.items() if data]
    for start in range(0, len(chosen), 20):
        some = chosen[start : start + 20]
        got = client.post("/predict", files=[("image", (name, data)) for name, data, _ in some])
        assert got.status_code == 200
        for one, (_, _, answer) in zip(got.json(), some, strict=True):
            _check(one, answer)
            if isinstance(answer, BadImage):
                assert one["status"] == STATUS_OF.get(answer.reason, 422)


def test_one_image_of_a_list_has_a_list(client):
    text = base64.b64encode(GOOD).decode()
    assert len(client.post("/predict", json={"images": [text]}).json()) == 1
    assert len(client.post("/predict", json={"images": [text, f"data:image/png;base64,{text}"]}).json()) == 2


def test_top_k_and_threshold(client):
    def ask(**parameters):
        return client.post("/predict", content=GOOD, headers={"content-type": "image/png"}, params=parameters).json()

    whole = ask()
    assert len(whole["all_predictions"]) == 3  # of five that were asked for
    assert ask(top_k=1)["all_predictions"] == whole["all_predictions"][:1]
    second = whole["all_predictions"][1]["confidence"]
    assert len(ask(threshold=second)["all_predictions"]) == 2
    none = ask(threshold=1)
    assert (none["prediction"], none["all_predictions"], none["confidence"]) == (None, [], whole["confidence"])


# -- what is refused ------------------------------------------------------------------------------------------

REFUSED = {
    "nothing": ({}, 400, "No image provided"),
    "an empty file": ({"files": {"image": ("a.png", b"")}}, 400, "No image provided"),
    "another field": ({"files": {"photo": ("a.png", GOOD)}}, 400, "No image provided"),
    "text for a file": ({"files": {"image": (None, "x")}}, 400, "image is text"),
    "text": ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "'text/plain' is not read"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "cannot be read"),
    "half a form": (
        {"content": b"--x\r\nContent-Disp", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        400,
        "",
    ),
    "half of JSON": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "JSON cannot be read"),
    "a list": ({"json": []}, 400, "JSON cannot be read"),
    "another key": ({"json": {"url": "http://169.254.169.254/"}}, 400, "url: Extra inputs are not permitted"),
    "both keys": ({"json": {"image": "eA==", "images": []}}, 400, "both image and images"),
    "no base64": ({"json": {"image": "%"}}, 400, "not valid base64"),
    "an address": ({"json": {"image": "http://169.254.169.254/"}}, 400, "not valid base64"),
    "top_k of 0": ({"content": GOOD, "params": {"top_k": 0}}, 422, "top_k: Input should be greater"),
    "a threshold of 2": ({"content": GOOD, "params": {"threshold": 2}}, 422, "threshold: "),
    "another model": ({"content": GOOD, "params": {"model": "x"}}, 404, "no model 'x'; there are colours"),
    "another version": ({"content": GOOD, "params": {"version": "x"}}, 404, "no version 'x'; it has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_are_refused(case, client):
    options, status, sentence = REFUSED[case]
    if "content" in options:
        options = {"headers": {"content-type": "image/png"}} | options
    got = client.post("/predict", **options)
    assert got.status_code == status, got.text
    assert sentence in got.json()["error"]
    assert got.json()["request_id"] == got.headers["x-request-id"]


def test_limits(another):
    client = another(max_bytes=5000, max_images=2, max_pixels=5000)
    for content in (b"x" * 5001, iter([b"x" * 3000, b"x" * 3000])):
        got = client.post("/predict", content=content, headers={"content-type": "image/png"})
        assert (got.status_code, "larger than the 5000 bytes" in got.text) == (413, True)
    small = awkward_images()["tiny.png"]
    got = client.post("/predict", files=[("image", (str(number), small)) for number in range(3)])
    assert (got.status_code, "3 images are more than the 2" in got.text) == (413, True)
    got = client.post("/predict", content=awkward_images()["one_bit.png"], headers={"content-type": "image/png"})
    assert (got.status_code, "90x60, at most 5000" in got.text) == (413, True)
    assert client.post("/predict", files={"image": ("a", small)}).status_code == 200


def test_an_answer_that_takes_too_long(another, monkeypatch):
    client, free = another(timeout_seconds=0.2), threading.Event()
    (served,) = [one for one, _ in client.app.state.service.models.versions("colours")]
    monkeypatch.setattr(served.batcher, "_run", lambda images: free.wait(20))
    got = client.post("/predict", files={"image": ("a", GOOD)})
    free.set()
    assert (got.status_code, got.headers["retry-after"]) == (503, "1")
    assert "takes longer than 0.2 seconds" in got.json()["error"]


def test_an_error_of_ours_shows_no_trace(another, monkeypatch):
    client = another()
    (served,) = [one for one, _ in client.app.state.service.models.versions("colours")]
    monkeypatch.setattr(served.batcher, "_run", lambda images: 1 / 0)
    got = client.post("/predict", files={"image": ("a", GOOD)})
    assert got.status_code == 500
    assert got.json() == {"error": "Internal error.", "request_id": got.headers["x-request-id"]}


def test_the_api_key(another):
    client = another(api_key="geheim")
    for headers in ({}, {"x-api-key": "x"}, {"authorization": "Bearer x"}, {"authorization": "Basic geheim"}):
        got = client.post("/predict", files={"image": ("a", GOOD)}, headers=headers)
        assert (got.status_code, "API key" in got.json()["error"]) == (401, True)
    for headers in ({"x-api-key": "geheim"}, {"authorization": "Bearer geheim"}):
        assert client.post("/predict", files={"image": ("a", GOOD)}, headers=headers).status_code == 200
    assert client.get("/metadata").status_code == 401
    assert [client.get(path).status_code for path in ("/", "/health/live", "/health/ready")] == [200] * 3


def test_request_ids(client):
    assert client.get("/health/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    ids = [client.get("/health/live", headers={"x-request-id": "a b\t"}).headers["x-request-id"] for _ in range(2)]
    assert len({*ids, "a b\t"}) == 3
    assert client.get("/nowhere").json()["error"] == "Not Found."
    assert client.get("/predict").status_code == 405


def test_requests_are_logged_as_json(client, caplog):
    caplog.set_level("INFO", "cnnray.access")
    client.get("/health/live?secret=1", headers={"x-request-id": "mine"})
    line = json.loads(caplog.messages[-1])
    assert line.pop("milliseconds") >= 0
    assert line == {"request_id": "mine", "method": "GET", "path": "/health/live", "status": 200}


# -- models ---------------------------------------------------------------------------------------------------


def test_a_canary_answers_its_share(another, bundle, newer):
    client = another(("colours", bundle, 0.8), ("colours", newer, 0.2), ("others", newer, 1.0))
    service = client.app.state.service
    old, new = Bundle.load(bundle).version, Bundle.load(newer).version
    found = Counter(service.served("colours").version for _ in range(2000))
    assert found.keys() == {old, new}
    assert 0.15 < found[new] / 2000 < 0.25
    for version in (old, new):
        got = client.post("/predict", files={"image": ("a", GOOD)}, params={"version": version})
        assert got.json()["model"] == version
    assert service.served("others").version == new
    stated = client.get("/metadata").json()
    assert {name: [one["share"] for one in versions] for name, versions in stated["models"].items()} == {
        "colours": [0.8, 0.2], "others": [1.0],
    }  # fmt: skip
    assert stated["default_model"] == "colours"


def test_models_are_changed_beside_those_that_answer(another, bundle, newer, tmp_path):
    client = another()
    service = client.app.state.service
    (first,) = [one for one, _ in service.models.versions("colours")]
    client.portal.call(service.change, _settings(("colours", bundle, 0.5), ("colours", newer, 0.5)))
    assert service.models.versions("colours")[0][0] is first
    client.portal.call(service.change, _settings(("colours", str(tmp_path), 1.0)))
    assert "is not a bundle" in client.get("/metadata").json()["problem"]
    assert len(service.models.versions("colours")) == 2
    client.portal.call(service.change, _settings(("colours", newer, 1.0)))
    assert client.get("/metadata").json()["problem"] is None
    assert client.post("/predict", files={"image": ("a", GOOD)}).json()["model"] == Bundle.load(newer).version


def test_nothing_is_ready_before_there_are_models(bundle, tmp_path):
    service = Service(threads=1)
    with TestClient(application(service)) as client:
        for path in ("/health/ready", "/v2/health/ready", "/metadata"):
            assert client.get(path).status_code == 503
        assert client.get("/health/live").status_code == 200
        assert client.post("/predict", files={"image": ("a", GOOD)}).status_code == 503
        with pytest.raises(BundleError, match="is not a bundle"):
            client.portal.call(service.change, _settings(("colours", str(tmp_path), 1.0)))


# -- batches --------------------------------------------------------------------------------------------------


def test_batches_grow_while_the_engine_is_busy():
    sizes, busy = [], threading.Event()

    def run(images):
        busy.wait(5)
        return images.reshape(len(images), -1)[:, :1].astype(np.float32)

    async def ask():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(run, 4, executor, sizes.append)
            images = [np.full((2, 2, 3), number, np.uint8) for number in range(11)]
            first = asyncio.create_task(batcher(images[0]))
            await asyncio.sleep(0.05)
            others = [asyncio.create_task(batcher(image)) for image in images[1:]]
            await asyncio.sleep(0.05)
            others[2].cancel()
            busy.set()
            return [await first, *await asyncio.gather(*others, return_exceptions=True)]

    found = asyncio.run(ask())
    assert sizes == [1, 4, 4, 1]
    assert isinstance(found.pop(3), asyncio.CancelledError)
    assert [float(row[0]) for row in found] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_an_engine_that_fails_fails_its_batch_and_no_other():
    def run(images):
        if images[0, 0, 0, 0] == 0:
            raise RuntimeError("broken")
        if images[0, 0, 0, 0] == 2:
            return np.ones((len(images) + 1, 2), np.float32)
        return np.ones((len(images), 2), np.float32)

    async def ask(value):
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(run, 4, executor, lambda size: None)
            image = np.full((2, 2, 3), value, np.uint8)
            with pytest.raises(RuntimeError, match="broken"):
                await batcher(np.zeros((2, 2, 3), np.uint8))
            with pytest.raises(ValueError, match="longer"):
                await batcher(np.full((2, 2, 3), 2, np.uint8))
            return await batcher(image)

    assert asyncio.run(ask(1)).tolist() == [1, 1]


# -- other protocols ------------------------------------------------------------------------------------------


def _pixels(bundle, data=GOOD):
    return decode(data, SIZE)[None]


def test_open_inference_protocol_in_json_and_binary(client, bundle):
    pixels = _pixels(bundle)
    (wanted,) = Predictor(Bundle.load(bundle)).probabilities(pixels)
    texts = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(GOOD).decode()]}
    numbers = {"name": "image", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3], "data": pixels.ravel().tolist()}
    nested = numbers | {"data": pixels.tolist()}
    for given in (texts, numbers, nested):
        got = client.post("/v2/models/colours/infer", json={"id": "7", "inputs": [given]})
        assert got.status_code == 200, got.text
        probabilities, label = got.json()["outputs"]
        assert (got.json()["id"], got.json()["model_name"]) == ("7", "colours")
        np.testing.assert_allclose(probabilities["data"], wanted, atol=1e-5)
        best = ["red", "green", "blue"][wanted.argmax()]
        assert label == {"name": "label", "datatype": "BYTES", "shape": [1], "data": [best]}
    for given, content in (
        ({k: v for k, v in texts.items() if k != "data"}, struct.pack("<I", len(GOOD)) + GOOD),
        ({k: v for k, v in numbers.items() if k != "data"}, pixels.tobytes()),
    ):
        header = json.dumps(
            {
                "inputs": [given | {"parameters": {"binary_data_size": len(content)}}],
                "outputs": [
                    {"name": "probabilities", "parameters": {"binary_data": True}},
                    {"name": "probabilities", "parameters": {"classification": 2}},
                ],
            }
        ).encode()
        got = client.post(
            "/v2/models/colours/infer",
            content=header + content,
            headers={"Inference-Header-Content-Length": str(len(header)), "content-type": "application/octet-stream"},
        )
        assert got.status_code == 200, got.text
        length = int(got.headers["inference-header-content-length"])
        stated = json.loads(got.content[:length])
        np.testing.assert_allclose(np.frombuffer(got.content[length:], "<f4"), wanted, atol=1e-5)
        assert stated["outputs"][0]["parameters"] == {"binary_data_size": 12}
        best = int(wanted.argmax())
        assert stated["outputs"][1]["shape"] == [1, 2]
        assert stated["outputs"][1]["data"][0].endswith(f":{best}:{['red', 'green', 'blue'][best]}")


def _tensor(name, kind, shape, *data):
    return {"inputs": [{"name": name, "datatype": kind, "shape": shape} | ({"data": list(data)} if data else {})]}


V2_REFUSED = {
    "no inputs": ({"inputs": []}, "inputs: List should have at least 1 item"),
    "another input": (_tensor("x", "FP32", [1], 1), "expected 'image'"),
    "another shape": (_tensor("image", "UINT8", [1, 2, 2, 3], *range(12)), "image is [1, 2, 2, 3]; expected [N, 32"),
    "less data": (_tensor("image", "UINT8", [1, 32, 32, 3], 0), "has 1 values"),
    "no data": (_tensor("image_bytes", "BYTES", [1]), "has no data"),
    "fractions": (_tensor("image", "UINT8", [1, 1, 1, 3], 0.5, 0.5, 0.5), "not integers"),
    "numbers for strings": (_tensor("image_bytes", "BYTES", [1], 1), "not strings"),
    "a negative shape": (_tensor("image", "UINT8", [1, -1, 1, 3], 0), "its shape"),
    "a huge shape": (_tensor("image", "UINT8", [1, 2**62, 2**62, 3], 0), "its shape"),
    "another output": (_tensor("image_bytes", "BYTES", [1], "eA==") | {"outputs": [{"name": "x"}]}, "no output 'x'"),
}


@pytest.mark.parametrize("case", V2_REFUSED)
def test_open_inference_requests_that_are_refused(case, client):
    content, sentence = V2_REFUSED[case]
    got = client.post("/v2/models/colours/infer", json=content)
    assert (got.status_code, sentence in got.json()["error"]) == (400, True), got.text


def test_tensorflow_serving(client, bundle):
    pixels = _pixels(bundle)
    (wanted,) = Predictor(Bundle.load(bundle)).probabilities(pixels)
    encoded = {"b64": base64.b64encode(GOOD).decode()}
    for body in (
        {"instances": [encoded]}, {"instances": [{"image_bytes": encoded}], "signature_name": "encoded"},
        {"instances": pixels.tolist()}, {"instances": [{"image": pixels[0].tolist()}]},
        {"inputs": {"image": pixels.tolist()}}, {"inputs": {"image_bytes": [encoded]}}, {"inputs": [encoded]},
    ):  # fmt: skip
        got = client.post("/v1/models/colours:predict", json=body)
        assert got.status_code == 200, got.text
        found = got.json()["predictions"][0] if "instances" in body else got.json()["outputs"]
        np.testing.assert_allclose(np.ravel(found["probabilities"]), wanted, atol=1e-5)
    version = Bundle.load(bundle).version
    got = client.post(f"/v1/models/colours/versions/{version}:predict", json={"instances": [encoded]})
    assert got.status_code == 200
    assert client.get("/v1/models/colours").json()["model_version_status"][0]["state"] == "AVAILABLE"
    signatures = client.get("/v1/models/colours/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert signatures.keys() == {"serving_default", "encoded"}
    for body in (
        {}, {"instances": []}, {"instances": [1], "inputs": [1]}, {"instances": [{"b64": 1}]}, {"instances": [[0.5]]},
        {"instances": [{"x": 1}]}, {"instances": [encoded], "signature_name": "x"},
    ):  # fmt: skip
        assert client.post("/v1/models/colours:predict", json=body).status_code == 400, body


# -- flags, page, pictures of the API -------------------------------------------------------------------------


def test_bundles_and_canaries_of_the_command_line(tmp_path):
    one = ServeConfig(bundle=f"{tmp_path}/a").models
    assert one == (ModelSettings(name="model", uri=f"{tmp_path}/a"),)
    found = ServeConfig(bundle="cats=/1,dogs=s3://b/d=1,cats=/2,cats=/3", canary="cats=0.25").models
    assert [(model.name, model.uri, model.share) for model in found] == [
        ("cats", "/1", 0.0), ("cats", "/2", 0.75), ("cats", "/3", 0.25), ("dogs", "s3://b/d=1", 1.0),
    ]  # fmt: skip
    assert [model.share for model in ServeConfig(bundle="cats=/1,cats=/2").models] == [0.0, 1.0]
    settings = ServeConfig(bundle="cats=/1").settings
    assert Settings.of(json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bundle": " ,"}, "--bundle names no bundle"),
        ({"canary": "model=0.5"}, "--canary model: --bundle has not two versions"),
        ({"canary": "model=2"}, "expected NAME=SHARE"),
        ({"engine": "x"}, "--engine 'x'"),
        ({"port": 70_000}, "--port 70000 is no port"),
        ({"min_replicas": 3, "max_replicas": 2}, "--min-replicas 3 is not from 0 to --max-replicas"),
        ({"timeout_seconds": 0}, "--timeout-seconds must be more than 0"),
    ],
)
def test_impossible_flags_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ServeConfig(**{"bundle": "/b"} | changes)


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    text = files("cnnray.serving").joinpath("page.html").read_text()
    assert page.text == text
    assert not re.search(r"https?://|src=|@import|url\(", text)


def test_every_answer_is_in_the_description_of_the_api(client):
    paths = client.get("/openapi.json").json()["paths"]
    responses = paths["/predict"]["post"]["responses"]
    assert responses.keys() == {"200", "400", "401", "404", "408", "413", "415", "422", "503"}
    assert set(paths["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data", "image/*", "application/octet-stream", "application/json",
    }  # fmt: skip
    for path, methods in paths.items():
        for method in methods.values():
            assert path.startswith("/health") or method["responses"]["401"]


def test_a_slow_body_is_not_waited_for(another):
    service = another(timeout_seconds=0.1).app.state.service

    async def slowly(request, settings):
        await asyncio.sleep(20)

    with pytest.raises(RequestError, match="did not come in time") as caught:
        asyncio.run(service.read(slowly, None))
    assert caught.value.status == 408
