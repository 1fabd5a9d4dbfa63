"""A bundle that may be unsure, through every protocol of the service."""

import base64
import dataclasses
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import tritonclient.grpc
from tritonclient.grpc import service_pb2

from cnnray.images.decode import decode
from cnnray.models import bundle as bundles
from cnnray.models.answers import FLOAT32, Decision, Threshold
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.serving.settings import LogSettings
from tests.networks import GEOMETRY
from tests.unit.serving.conftest import GOOD
from tests.unit.serving.test_grpc import asking, infer_request

NAMES = ["red", "green", "blue"]
SURE = np.asarray(decode(GOOD, GEOMETRY))


@pytest.fixture(scope="module")
def plain(bundle):
    """The probabilities of `GOOD`."""
    return Predictor(Bundle.load(bundle)).probabilities(SURE[None])[0]


@pytest.fixture
def start(bundle, plain, start_client, tmp_path):
    """A function that starts a client of a bundle that is unsure of `GOOD`, or sure; its second best class is a
    candidate."""

    def start(*, unsure, **changes):
        best, second, third = np.sort(plain)[::-1]
        threshold = Threshold(
            confidence=float(np.nextafter(best, np.float32(2), dtype=np.float32) if unsure else best),
            candidate=float((second + third) / 2), images=400, coverage=0.9, observed_precision=1.0,
        )  # fmt: skip
        decision = Decision(precision=0.99, certainty=0.95, candidate_coverage=0.95, thresholds={FLOAT32: threshold})
        uri = str(shutil.copytree(bundle, tmp_path / f"bundle-{unsure}"))
        bundles.write_info(uri, dataclasses.replace(Bundle.load(uri).info, decision=decision))
        return start_client(("colours", uri, 1.0), **changes)

    return start


@pytest.mark.parametrize("unsure", [True, False])
def test_predict(unsure, start, plain):
    answer = start(unsure=unsure).post("/predict", files={"image": ("a", GOOD)}).json()
    order = np.argsort(-plain)
    assert answer["status"] == ("unsure" if unsure else "ok")
    assert answer["prediction"] == (None if unsure else NAMES[order[0]])
    assert answer["confidence"] == float(plain[order[0]])
    assert [one["class"] for one in answer["all_predictions"]] == [NAMES[index] for index in order]
    if unsure:
        assert answer["candidates"] == answer["all_predictions"][:2]
    else:
        assert "candidates" not in answer


def test_several_images_of_which_one_cannot_be_read(start):
    files = [("image", ("a", GOOD)), ("image", ("b", b"none"))]
    answers = start(unsure=True).post("/predict", files=files).json()
    assert (answers[0]["status"], answers[1]["status"]) == ("unsure", 415)


def test_a_bundle_that_answers_for_every_image_has_the_answers_of_before(start_client):
    client = start_client()
    answer = client.post("/predict", files={"image": ("a", GOOD)}).json()
    assert answer.keys() == {"prediction", "confidence", "all_predictions", "model", "request_id"}
    outputs = client.get("/v2/models/colours").json()["outputs"]
    assert [output["name"] for output in outputs] == ["probabilities", "label"]
    body = {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [_text()]}]}
    response = client.post("/v2/models/colours/infer", json=body | {"outputs": [{"name": "unsure"}]})
    assert response.status_code == 400
    assert response.json()["error"] == "There is no output 'unsure'; there are probabilities, label."
    rows = client.post("/v1/models/colours:predict", json={"instances": [{"b64": _text()}]}).json()["predictions"]
    assert rows[0].keys() == {"probabilities", "class_names"}


def _text():
    return base64.b64encode(GOOD).decode()


@pytest.mark.parametrize("unsure", [True, False])
def test_open_inference(unsure, start, plain):
    client = start(unsure=unsure)
    described = {output["name"]: output for output in client.get("/v2/models/colours").json()["outputs"]}
    assert (described["unsure"]["datatype"], described["candidates"]["shape"]) == ("BOOL", [-1, 3])
    body = {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [_text()]}]}
    outputs = client.post("/v2/models/colours/infer", json=body).json()["outputs"]
    values = {output["name"]: output["data"] for output in outputs}
    best, second, _ = np.argsort(-plain)
    wanted = [index in ((best, second) if unsure else (best,)) for index in range(3)]
    assert (values["unsure"], values["candidates"]) == ([unsure], wanted)
    assert values["label"] == ["" if unsure else NAMES[best]]
    np.testing.assert_allclose(values["probabilities"], plain, atol=1e-6)

    asked = [tritonclient.grpc.InferRequestedOutput(name) for name in ("candidates", "unsure", "label")]
    response, _ = asking(client)("ModelInfer", infer_request("image", SURE[None], outputs=asked))
    assert [(output.name, output.datatype, list(output.shape)) for output in response.outputs] == [
        ("candidates", "BOOL", [1, 3]), ("unsure", "BOOL", [1]), ("label", "BYTES", [1]),
    ]  # fmt: skip
    candidates, flag, label = response.raw_output_contents
    assert (list(candidates), list(flag)) == ([int(value) for value in wanted], [int(unsure)])
    assert label[4:].decode() == ("" if unsure else NAMES[best])
    result = tritonclient.grpc.InferResult(response)
    assert result.as_numpy("candidates").tolist() == [wanted]
    metadata, _ = asking(client)("ModelMetadata", service_pb2.ModelMetadataRequest(name="colours"))
    assert [output.name for output in metadata.outputs] == ["probabilities", "label", "unsure", "candidates"]


@pytest.mark.parametrize("unsure", [True, False])
def test_tensorflow_serving(unsure, start, plain):
    client = start(unsure=unsure)
    (row,) = client.post("/v1/models/colours:predict", json={"instances": [{"b64": _text()}]}).json()["predictions"]
    assert (row["unsure"], sum(row["candidates"])) == (unsure, 2 if unsure else 1)
    assert row["class_names"] == NAMES
    columns = client.post("/v1/models/colours:predict", json={"inputs": {"image_bytes": [{"b64": _text()}]}}).json()
    assert {name: values[0] for name, values in columns["outputs"].items()} == row
    signatures = client.get("/v1/models/colours/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert signatures["encoded"]["outputs"]["unsure"]["dtype"] == "DT_BOOL"


@pytest.mark.parametrize("unsure", [True, False])
def test_an_explanation_says_whether_its_class_is_withheld(unsure, start, plain):
    found = start(unsure=unsure).post("/explain", files={"image": ("a", GOOD)})
    assert found.headers["x-class"] == NAMES[plain.argmax()]
    assert found.headers["x-status"] == ("unsure" if unsure else "ok")


def test_the_log_and_the_metrics_say_it(start, tmp_path, monkeypatch):
    client = start(unsure=True, log=LogSettings(place=str(tmp_path / "log"), share=1.0, images=False, days=1))
    counted = []
    monkeypatch.setattr(client.service.metrics, "record_prediction", lambda *values, unsure: counted.append(unsure))
    client.post("/predict", files={"image": ("a", GOOD)})
    client.service.close()
    (file,) = (tmp_path / "log").rglob("*.parquet")
    (logged,) = pyarrow.parquet.read_table(file, partitioning=None).to_pylist()
    assert logged["unsure"] is True
    assert logged["prediction"] == logged["top_k_labels"][0]
    assert counted == [True]
