"""The application of a replica: requests and responses of its own API."""

import base64
import dataclasses
import importlib.metadata
import io
import json
import re
import threading
import time
from datetime import UTC, datetime
from importlib.resources import files

import numpy as np
import pytest
import yaml
from PIL import Image

import cnnray
from cnnray.images.decode import BadImage
from cnnray.serving.config import ServeConfig
from cnnray.serving.keys import Key
from cnnray.serving.service import STATUS_BY_REASON
from cnnray.serving.settings import Settings
from tests.awkward import awkward_images
from tests.networks import GEOMETRY
from tests.unit.serving.conftest import GOOD, check_answer

# -- the same answers -----------------------------------------------------------------------------------------


def test_one_image_in_each_form_has_the_answer_of_predictor(client, expected):
    for name, (data, answer) in expected.items():
        forms = [{"files": {"image": (name, data)}}, {"json": {"image": base64.b64encode(data).decode()}}]
        if data:
            forms.append({"content": data, "headers": {"content-type": "image/x"}})
        for form in forms:
            response = client.post("/predict", **form)
            if isinstance(answer, BadImage) and data:
                assert response.status_code == STATUS_BY_REASON.get(answer.reason, 422), name
            else:
                assert response.status_code == (200 if data else 400), name
            if data:
                check_answer(response.json(), answer)
            else:
                assert response.json()["error"] == "No image provided"


def test_several_images_each_have_their_own_answer_or_error(client, expected):
    images = [(data, answer) for data, answer in expected.values()]
    for start in range(0, len(images), 10):
        # An empty image first, in the middle and last; one of them as a browser sends an input without a file.
        chosen = [expected["empty.jpg"], *images[start : start + 10], expected["empty.jpg"]]
        chosen.insert(5, expected["empty.jpg"])
        form = [("image", (f"{index}.jpg" if index else "", data)) for index, (data, _) in enumerate(chosen)]
        texts = [base64.b64encode(data).decode() for data, _ in chosen]
        for options in ({"content": _form(form), "headers": _FORM}, {"json": {"images": texts}}):
            response = client.post("/predict", **options)
            assert response.status_code == 200, response.text
            for entry, (_, answer) in zip(response.json(), chosen, strict=True):
                check_answer(entry, answer)
                if isinstance(answer, BadImage):
                    assert entry["status"] == STATUS_BY_REASON.get(answer.reason, 422)


_FORM = {"content-type": "multipart/form-data; boundary=x"}


def _form(parts):
    """A form with a file for each part, ("NAME", ("FILENAME", CONTENT)), as browsers write it."""
    head = '--x\r\nContent-Disposition: form-data; name="{}"; filename="{}"\r\n\r\n'
    return b"".join(head.format(name, file).encode() + data + b"\r\n" for name, (file, data) in parts) + b"--x--\r\n"


def test_an_image_that_is_no_base64_has_an_error_in_its_place(client):
    text = base64.b64encode(GOOD).decode()
    good, error, empty = client.post("/predict", json={"images": [text, "%", "data:,"]}).json()
    assert good["confidence"] > 0
    assert (error["error"], error["status"]) == ("The image cannot be used: not valid base64.", 400)
    assert (empty["error"], empty["status"]) == ("The image cannot be used: empty.", 400)
    assert [entry["status"] for entry in client.post("/predict", json={"images": ["", ""]}).json()] == [400, 400]


def test_one_image_of_a_list_has_a_list(client):
    text = base64.b64encode(GOOD).decode()
    assert len(client.post("/predict", json={"images": [text]}).json()) == 1
    assert len(client.post("/predict", json={"images": [text, f"data:image/png;base64,{text}"]}).json()) == 2


def test_top_k_and_threshold(client):
    def ask(**parameters):
        return client.post("/predict", content=GOOD, headers={"content-type": "image/png"}, params=parameters).json()

    whole = ask()
    assert len(whole["all_predictions"]) == 3  # five were requested
    assert ask(top_k=1)["all_predictions"] == whole["all_predictions"][:1]
    second = whole["all_predictions"][1]["confidence"]
    assert len(ask(threshold=second)["all_predictions"]) == 2
    none = ask(threshold=1)
    assert (none["prediction"], none["all_predictions"], none["confidence"]) == (None, [], whole["confidence"])


# -- refused requests -----------------------------------------------------------------------------------------

REFUSED = {
    "nothing": ({}, 400, "No image provided"),
    "an empty file": ({"files": {"image": ("a.png", b"")}}, 400, "No image provided"),
    "another field": (
        {"files": {"photo": ("a.png", GOOD)}},
        400,
        "No image provided. The form has a file in the field 'photo'; expected image.",
    ),
    "text for a file": ({"files": [("image", ("a", GOOD)), ("image", (None, "x"))]}, 400, "image is text at index 1"),
    "a file in another field, too": (
        {"files": [("image", ("a", GOOD)), ("images", ("b", GOOD))]},
        400,
        "The form has a file in the field 'images'; expected image.",
    ),
    "a list with null": ({"json": {"images": ["", None]}}, 400, "images.1: Input should be a valid string"),
    "empty base64": ({"json": {"image": ""}}, 400, "No image provided"),
    "no images": ({"json": {"images": []}}, 400, "No image provided"),
    "text": ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "'text/plain' is not supported"),
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
    "another model": ({"content": GOOD, "params": {"model": "x"}}, 404, "no model 'x'; served are colours"),
    "another version": ({"content": GOOD, "params": {"version": "x"}}, 404, "no version 'x'; it has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_are_refused(case, client):
    options, status, sentence = REFUSED[case]
    if "content" in options:
        options = {"headers": {"content-type": "image/png"}} | options
    response = client.post("/predict", **options)
    assert response.status_code == status, response.text
    assert sentence in response.json()["error"]
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_limits(start_client):
    client = start_client(max_bytes=5000, max_images=2, max_pixels=5000)
    for content in (b"x" * 5001, iter([b"x" * 3000, b"x" * 3000])):
        response = client.post("/predict", content=content, headers={"content-type": "image/png"})
        assert (response.status_code, "larger than the 5000 bytes" in response.text) == (413, True)
    small = awkward_images()["tiny.png"]
    response = client.post("/predict", files=[("image", (str(number), small)) for number in range(3)])
    assert (response.status_code, "3 images are more than the 2" in response.text) == (413, True)
    response = client.post("/predict", content=awkward_images()["one_bit.png"], headers={"content-type": "image/png"})
    assert (response.status_code, "90x60, at most 5000" in response.text) == (413, True)
    assert client.post("/predict", files={"image": ("a", small)}).status_code == 200


def test_an_answer_that_takes_too_long(start_client, monkeypatch):
    client, free = start_client(timeout_seconds=0.2), threading.Event()
    (served,) = [served for served, _ in client.app.service.models.versions("colours")]
    monkeypatch.setattr(served.compute, "predict", lambda images: free.wait(20))
    response = client.post("/predict", files={"image": ("a", GOOD)})
    free.set()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "takes longer than 0.2 seconds" in response.json()["error"]


def test_an_internal_error_shows_no_trace(start_client, monkeypatch):
    client = start_client()
    (served,) = [served for served, _ in client.app.service.models.versions("colours")]
    monkeypatch.setattr(served.compute, "predict", lambda images: 1 / 0)
    response = client.post("/predict", files={"image": ("a", GOOD)})
    assert response.status_code == 500
    assert response.json() == {"error": "Internal error.", "request_id": response.headers["x-request-id"]}


def test_values_that_are_no_probabilities_are_an_error_in_every_protocol(start_client, monkeypatch):
    client, black = start_client(), np.zeros(GEOMETRY.image_size.shape, np.uint8)
    (served,) = [served for served, _ in client.app.service.models.versions("colours")]

    def run(images):
        rows = np.full((len(images), 3), 1 / 3, np.float32)
        rows[~images.any((1, 2, 3))] = np.nan
        return rows

    monkeypatch.setattr(served.compute, "predict", run)
    buffer = io.BytesIO()
    Image.fromarray(black).save(buffer, "PNG")
    bad, texts = buffer.getvalue(), [base64.b64encode(data).decode() for data in (GOOD, buffer.getvalue())]
    sentence = "cannot be used: no probabilities: the network's output is not finite."
    response = client.post("/predict", files={"image": ("a", bad)})
    assert (response.status_code, response.json()["error"]) == (500, f"The image {sentence}")
    good, error = client.post("/predict", json={"images": texts}).json()
    assert good["confidence"] == pytest.approx(1 / 3)
    assert (error["status"], error["error"]) == (500, f"The image {sentence}")
    pixels = np.stack([black + 1, black])
    encoded = {"name": "image_bytes", "datatype": "BYTES", "shape": [2], "data": texts}
    decoded = {"name": "image", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.ravel().tolist()}
    for path, content in (
        ("/v2/models/colours/infer", {"inputs": [encoded]}),
        ("/v2/models/colours/infer", {"inputs": [decoded]}),
        ("/v1/models/colours:predict", {"instances": [{"b64": text} for text in texts]}),
        ("/v1/models/colours:predict", {"instances": pixels.tolist()}),
    ):
        response = client.post(path, json=content)
        assert (response.status_code, response.json()["error"]) == (500, f"The image at index 1 {sentence}")


def test_the_api_key(start_client):
    client = start_client(keys=[Key(key="geheim")])
    for headers in ({}, {"x-api-key": "x"}, {"authorization": "Bearer x"}, {"authorization": "Basic geheim"}):
        response = client.post("/predict", files={"image": ("a", GOOD)}, headers=headers)
        assert (response.status_code, "API key" in response.json()["error"]) == (401, True)
    for headers in ({"x-api-key": "geheim"}, {"authorization": "Bearer geheim"}):
        assert client.post("/predict", files={"image": ("a", GOOD)}, headers=headers).status_code == 200
    assert client.get("/metadata").status_code == 401
    # A browser asks for pages without a key, which is entered there.
    public = ("/", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/health/live", "/health/ready")
    assert [client.get(path).status_code for path in public] == [200] * len(public)
    assert client.get("/docs2").status_code == 401


def test_request_ids(client):
    assert client.get("/health/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    ids = [client.get("/health/live", headers={"x-request-id": "a b\t"}).headers["x-request-id"] for _ in range(2)]
    assert len({*ids, "a b\t"}) == 3
    assert client.get("/nowhere").json()["error"] == "Not Found."
    response = client.get("/predict")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"] == "Method Not Allowed."


@pytest.fixture
def read_access_log(caplog):
    """A function that returns the lines of the requests to a client's service since then; others may come later."""
    caplog.set_level("INFO", "cnnray.access")
    start = datetime.now(UTC).isoformat(timespec="milliseconds")

    def read(client):
        client.service.close()
        blocks = [record.getMessage() for record in caplog.records if record.name == "cnnray.access"]
        lines = [json.loads(line) for block in blocks for line in block.splitlines()]
        return [line for line in lines if line["time"] >= start]

    return read


def test_requests_are_logged_as_json(start_client, read_access_log):
    client = start_client(keys=[Key(key="secret", name="shop"), Key(key="other")])
    client.get("/health/live?secret=1", headers={"x-request-id": "mine"})
    for key in ("secret", "other"):
        client.get("/metadata", headers={"x-api-key": key})
    lines = read_access_log(client)
    for line in lines:
        assert line.pop("milliseconds") >= 0
        assert abs(time.time() - datetime.fromisoformat(line.pop("time")).timestamp()) < 60
    assert lines[0] == {"request_id": "mine", "method": "GET", "path": "/health/live", "status": 200}
    assert [line.get("key") for line in lines] == [None, "shop", None]


@pytest.mark.parametrize(("which", "logged"), [("all", [200, 404]), ("errors", [404]), ("none", [])])
def test_which_requests_are_logged(which, logged, start_client, read_access_log):
    client = start_client(access_log=which)
    client.get("/health/live")
    client.get("/nowhere")
    assert [line["status"] for line in read_access_log(client)] == logged


def test_the_pages_need_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.text == files("cnnray.serving").joinpath("page.html").read_text()
    assert not re.search(r"src=|@import|url\(", page.text)
    docs = client.get("/docs")
    assert "SwaggerUIBundle({" in docs.text
    for response in (page, docs):
        assert response.headers["content-type"].startswith("text/html")
        assert "//" not in re.sub(r"^\s*//.*", "", response.text, flags=re.MULTILINE)
        # Browsers enforce it for scripts, too.
        policy = response.headers["content-security-policy"]
        assert policy == "default-src 'self' 'unsafe-inline' data: blob:"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', docs.text)
    assert loaded == ["docs/swagger-ui.css", "data:,", "docs/swagger-ui-bundle.js"]
    for path, kind in ((loaded[0], "text/css"), (loaded[2], "text/javascript")):
        asset = client.get(f"/{path}")
        assert (asset.status_code, asset.headers["content-type"].partition(";")[0]) == (200, kind)
        assert len(asset.content) > 50_000
    assert client.get("/redoc").status_code == client.get("/docs/nothing").status_code == 404


def test_every_answer_is_in_the_description_of_the_api(client):
    paths = client.get("/openapi.json").json()["paths"]
    responses = paths["/predict"]["post"]["responses"]
    assert responses.keys() == {"200", "400", "401", "404", "408", "413", "415", "422", "429", "500", "503"}
    assert set(paths["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data", "image/*", "application/octet-stream", "application/json",
    }  # fmt: skip
    for path, methods in paths.items():
        for method in methods.values():
            needs_key = not path.startswith(("/health", "/v2/health"))
            assert ({"401", "429"} <= method["responses"].keys()) == needs_key, path


def test_the_description_says_which_operations_need_a_key_where_there_are_keys(client, start_client):
    assert "security" not in client.get("/openapi.json").text
    description = start_client(keys=[Key(key="geheim")]).get("/openapi.json").json()
    assert description["security"] == [{"key": []}, {"bearer": []}]
    assert description["components"]["securitySchemes"]["key"]["name"] == "X-API-Key"
    public = {
        path for path, methods in description["paths"].items() for entry in methods.values() if "security" in entry
    }
    assert public == {"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"}


def test_all_references_in_the_description_are_defined(client):
    text = client.get("/openapi.json").text
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert {"JsonImages", "InferInput", "Answer"} <= references <= json.loads(text)["components"]["schemas"].keys()


def test_nodes_need_the_code_of_cnnray_and_no_installation(start_client, monkeypatch):
    """A job's working directory and the image for Kubernetes bring the code alone."""
    of_name = importlib.metadata.distribution

    def distribution(name):
        if name == "cnnray":
            raise importlib.metadata.PackageNotFoundError(name)
        return of_name(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    client = start_client()
    assert client.get("/openapi.json").json()["info"]["version"] == cnnray.__version__
    assert client.get("/v2").json()["version"] == cnnray.__version__


def test_pages_of_other_hosts_may_ask_where_they_are_named(start_client, bundle):
    page, other = {"Origin": "https://example.com"}, {"Origin": "https://example.org"}
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    client = start_client(keys=[Key(key="geheim")], cors_origins=("https://example.com",))
    first = client.options("/predict", headers=page | asking)  # a browser sends no key with it
    assert first.status_code == 200
    assert first.headers["access-control-allow-origin"] == "https://example.com"
    assert "x-api-key" in first.headers["access-control-allow-headers"]
    assert client.options("/predict", headers=other | asking).status_code == 400
    for sender, allowed in ((page, "https://example.com"), (other, None)):
        for key, status in (({}, 401), ({"X-API-Key": "geheim"}, 200)):
            answer = client.post("/predict", files={"image": ("a", GOOD)}, headers=sender | key)
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert "x-request-id" in answer.headers
    everybody = dataclasses.replace(client.app.service.settings, cors_origins=("*",))
    client.portal.call(client.app.service.change_settings, everybody)
    answer = client.get("/health/live", headers=other)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in start_client().get("/health/live", headers=page).headers


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://a b", "ftp://example.com"])
def test_an_origin_that_is_none_gets_a_sentence(origin):
    with pytest.raises(ValueError, match="is no origin, such as"):
        ServeConfig(bundle="/b", cors_origins=[origin])


def test_settings_stay_the_same_in_yaml(bundle):
    chosen = ServeConfig(bundle=bundle, cors_origins=["https://example.com"], rollback_on={"errors": 0.1}).settings
    assert Settings.from_dict(yaml.safe_load(yaml.safe_dump(chosen.as_dict()))) == chosen
