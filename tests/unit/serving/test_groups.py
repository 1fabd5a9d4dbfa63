"""Groups of classes, through every protocol of the service."""

import base64
import dataclasses
import shutil

import numpy as np
import pyarrow.parquet
import pytest
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

GROUPS = {"red": "warm", "green": "cold", "blue": "cold"}
TEXT = base64.b64encode(GOOD).decode()


@pytest.fixture(scope="module")
def group(bundle):
    """The most probable group of `GOOD`."""
    ((red, green, blue),) = Predictor(Bundle.load(bundle)).probabilities(np.asarray(decode(GOOD, GEOMETRY))[None])
    return "warm" if red > green + blue else "cold"


@pytest.fixture
def start(bundle, start_client, tmp_path):
    """A function that starts a client of a bundle that is unsure of every class, and of the group or not."""

    def start(*, named, **changes):
        threshold = Threshold(
            confidence=1.0, candidate=0.0, group=0.0, group_below=1.0 if named else 0.0, images=400, coverage=0.9,
            observed_precision=1.0,
        )  # fmt: skip
        decision = Decision(precision=0.99, certainty=0.95, candidate_coverage=0.95, thresholds={FLOAT32: threshold})
        uri = str(shutil.copytree(bundle, tmp_path / "grouped"))
        bundles.write_info(uri, dataclasses.replace(Bundle.load(uri).info, decision=decision, groups=GROUPS))
        return start_client(("colours", uri, 1.0), **changes)

    return start


@pytest.mark.parametrize("named", [True, False])
def test_every_protocol_names_the_group(named, start, group, tmp_path):
    client = start(named=named, log=LogSettings(place=str(tmp_path / "log")))
    answer = client.post("/predict", files={"image": ("a", GOOD)}).json()
    assert (answer["status"], answer["prediction"], answer["group"]) == ("unsure", None, group if named else None)
    described = {output["name"]: output for output in client.get("/v2/models/colours").json()["outputs"]}
    assert described["group"] == {"name": "group", "datatype": "BYTES", "shape": [-1]}
    body = {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [TEXT]}]}
    outputs = client.post("/v2/models/colours/infer", json=body).json()["outputs"]
    values = {output["name"]: output["data"] for output in outputs}
    assert (values["unsure"], values["group"]) == ([True], [group if named else ""])
    metadata, _ = asking(client)("ModelMetadata", service_pb2.ModelMetadataRequest(name="colours"))
    assert (metadata.outputs[-1].name, metadata.outputs[-1].datatype) == ("group", "BYTES")
    response, _ = asking(client)("ModelInfer", infer_request("image", np.asarray(decode(GOOD, GEOMETRY))[None]))
    assert response.raw_output_contents[-1][4:].decode() == (group if named else "")
    (row,) = client.post("/v1/models/colours:predict", json={"instances": [{"b64": TEXT}]}).json()["predictions"]
    assert (row["unsure"], row["group"]) == (True, group if named else "")
    signatures = client.get("/v1/models/colours/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert signatures["encoded"]["outputs"]["group"]["dtype"] == "DT_STRING"
    (version,) = client.get("/metadata").json()["models"]["colours"]
    assert version["groups"] == GROUPS
    client.service.close()
    (file,) = (tmp_path / "log").rglob("*.parquet")
    logged = pyarrow.parquet.read_table(file, partitioning=None).to_pylist()
    assert [row.get("group") for row in logged] == [group if named else None] * 4
    assert [row["unsure"] for row in logged] == [True] * 4
