"""A bundle of several labels, through every protocol of the service."""

import base64
import dataclasses
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import tritonclient.grpc

from cnnray.images.decode import BadImage, decode
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.serving.settings import LogSettings
from tests.awkward import awkward_images, bad_images
from tests.networks import GEOMETRY
from tests.unit.serving.conftest import GOOD
from tests.unit.serving.test_grpc import asking, infer_request

NAMES = ["red", "green", "blue"]
BYTES = {"Content-Type": "application/octet-stream"}
PIXELS = np.asarray(decode(GOOD, GEOMETRY))


@pytest.fixture(scope="module")
def several(bundle, tmp_path_factory):
    """By number of labels that `GOOD` has: a bundle, and the probabilities of `GOOD`."""
    folder = tmp_path_factory.mktemp("bundles")
    uri = str(shutil.copytree(bundle, folder / "all"))
    info = Bundle.load(bundle).info
    bundles.write_info(uri, dataclasses.replace(info, thresholds=[0.0] * 3, exports={}))
    (row,) = Predictor(Bundle.load(uri)).probabilities(PIXELS[None])
    found = {3: (uri, row)}
    for count, threshold in ((2, float(np.sort(row)[1])), (0, 1.0)):
        uri = str(shutil.copytree(bundle, folder / str(count)))
        bundles.write_info(uri, dataclasses.replace(info, thresholds=[threshold] * 3, exports={}))
        found[count] = uri, row
    return found


@pytest.fixture
def start(several, start_client):
    def start(count, **changes):
        uri, row = several[count]
        return start_client(("colours", uri, 1.0), **changes), row

    return start


def _text():
    return base64.b64encode(GOOD).decode()


@pytest.mark.parametrize("count", [3, 2, 0])
def test_predict(count, start):
    client, row = start(count)
    answer = client.post("/predict", files={"image": ("a", GOOD)}).json()
    order = np.argsort(-row)
    assert [one["class"] for one in answer["labels"]] == [NAMES[index] for index in order[:count]]
    assert [one["confidence"] for one in answer["labels"]] == [float(row[index]) for index in order[:count]]
    assert answer["prediction"] == (NAMES[order[0]] if count else None)
    assert answer["confidence"] == float(row[order[0]])
    assert len(answer["all_predictions"]) == 3
    assert "status" not in answer
    assert row.sum() != pytest.approx(1.0, abs=0.01)  # sigmoids


def test_a_threshold_of_the_request_leaves_out_labels(start):
    client, row = start(3)
    highest = float(row.max())
    answer = client.post("/predict", params={"threshold": highest}, files={"image": ("a", GOOD)}).json()
    assert [one["confidence"] for one in answer["labels"]] == [highest]
    answer = client.post("/predict", params={"threshold": 1.0}, files={"image": ("a", GOOD)}).json()
    assert (answer["labels"], answer["prediction"]) == ([], None)


@pytest.mark.parametrize("count", [2, 0])
def test_open_inference(count, start):
    client, row = start(count)
    outputs = client.get("/v2/models/colours").json()["outputs"]
    assert [(output["name"], output["datatype"], output["shape"]) for output in outputs] == [
        ("probabilities", "FP32", [-1, 3]), ("label", "BYTES", [-1]), ("labels", "BOOL", [-1, 3]),
    ]  # fmt: skip
    body = {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [_text()]}]}
    values = {
        output["name"]: output["data"]
        for output in client.post("/v2/models/colours/infer", json=body).json()["outputs"]
    }
    order = np.argsort(-row)
    wanted = [index in order[:count] for index in range(3)]
    assert values["labels"] == wanted
    assert values["label"] == [NAMES[order[0]] if count else ""]
    np.testing.assert_allclose(values["probabilities"], row, atol=1e-6)
    asked = [tritonclient.grpc.InferRequestedOutput(name) for name in ("labels", "label")]
    response, _ = asking(client)("ModelInfer", infer_request("image", PIXELS[None], outputs=asked))
    masks, label = response.raw_output_contents
    assert list(masks) == [int(value) for value in wanted]
    assert label[4:].decode() == values["label"][0]


@pytest.mark.parametrize("count", [2, 0])
def test_tensorflow_serving(count, start):
    client, row = start(count)
    (answer,) = client.post("/v1/models/colours:predict", json={"instances": [{"b64": _text()}]}).json()[
        "predictions"
    ]
    assert answer["labels"] == [index in np.argsort(-row)[:count] for index in range(3)]
    signature = client.get("/v1/models/colours/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert signature["serving_default"]["outputs"]["labels"]["dtype"] == "DT_BOOL"


def test_metadata_has_the_thresholds(start, several, start_client):
    client, _ = start(2)
    (version,) = client.get("/metadata").json()["models"]["colours"]
    assert version["thresholds"] == Bundle.load(several[2][0]).info.thresholds
    (version,) = start_client().get("/metadata").json()["models"]["colours"]
    assert "thresholds" not in version


@pytest.mark.parametrize("count", [2, 0])
def test_the_request_log_has_the_labels(count, start, tmp_path):
    client, row = start(count, log=LogSettings(place=str(tmp_path / "log"), share=1.0, images=False, days=1))
    client.post("/predict", files={"image": ("a", GOOD)})
    client.service.close()
    (file,) = (tmp_path / "log").rglob("*.parquet")
    table = pyarrow.parquet.read_table(file, partitioning=None)
    names = [NAMES[index] for index in np.argsort(-row)[:count]]
    assert table["labels"].to_pylist() == [names]
    assert table["prediction"].to_pylist() == [names[0] if names else None]


def test_the_awkward_set_has_the_labels_that_the_predictor_gives(start, several):
    client, _ = start(2)
    images = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    answers = Predictor(Bundle.load(several[2][0]))(list(images.values()))
    responses = [client.post("/predict", content=data, headers=BYTES) for data in images.values()]
    for name, answer, response in zip(images, answers, responses, strict=True):
        if isinstance(answer, BadImage):
            assert response.status_code >= 400, name
        else:
            assert tuple(one["class"] for one in response.json()["labels"]) == answer.labels, name
            assert response.json()["prediction"] == answer.label, name
