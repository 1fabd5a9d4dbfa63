"""Bundles, rows, answers and reports of one label for each image are what they were before there were several.

`tests/compatibility/0.2.0.tar.xz` was made by commit 78d981d in /tmp/compat/v2, on the 73 images of three digits (one
of them broken) of `0.1.0.tar.xz`, with `small_cnn` at 16x16:

    run                    train.py --epochs 12 --batch-size 16 --max-workers 1 --schedule constant, then export.py
                           --formats onnx,onnx-int8,litert; without its checkpoints
    predictions-ENGINE     predict.py --probabilities, by keras and onnx-int8
    report                 evaluate.py of the held-out images; metrics.json and predictions.parquet
    answers.json           requests to the service in that process, and its answers, by keras and onnx-int8
"""

import base64
import dataclasses
import json
import tarfile

import pyarrow.parquet
import pytest
from starlette.testclient import TestClient

from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.job import evaluate
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.job import run as predict
from cnnray.serving.application import create_application
from cnnray.serving.config import ServeConfig
from cnnray.serving.service import Service
from cnnray.serving.settings import ModelSettings
from tests.conftest import REPOSITORY

MADE_IN = "/tmp/compat/v2"
TOLERANCES = {"keras": 1e-4, "onnx-int8": 0.03}
"""Other processors round in another way, and int8 engines more."""


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with the outputs of 78d981d, in which their paths point to this folder."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(REPOSITORY / "tests/compatibility/0.2.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for path in (folder / "run" / "manifest.parquet", *folder.glob("predictions-*/part-*")):
        table = pyarrow.parquet.read_table(path)
        uris = [uri.replace(MADE_IN, str(folder)) for uri in table["uri"].to_pylist()]
        place = table.column_names.index("uri")
        pyarrow.parquet.write_table(table.set_column(place, table.field("uri"), [uris]), path)
    return folder


def _close(value, expected, tolerance):
    """Whether JSON values are the same, but for roundings."""
    if isinstance(expected, dict):
        assert isinstance(value, dict)
        assert value.keys() == expected.keys()
        for name in expected:
            _close(value[name], expected[name], tolerance)
    elif isinstance(expected, list):
        assert isinstance(value, list)
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            _close(one, other, tolerance)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, abs=tolerance)
    else:
        assert value == expected


def test_the_bundle_is_written_as_before(before, tmp_path):
    bundle = Bundle.load(str(before / "run/bundle"))
    assert not bundle.info.is_multi_label
    bundles.write_info(str(tmp_path), bundle.info)
    written, expected = (path.read_text() for path in (tmp_path / "bundle.json", before / "run/bundle/bundle.json"))
    assert written == expected


@pytest.mark.parametrize("engine", ["keras", "onnx-int8"])
def test_the_service_answers_as_before(engine, before):
    uri = str(before / "run/bundle")
    chosen = dataclasses.replace(
        ServeConfig(bundle=uri, engine=engine, batch_size=8).settings,
        models=(ModelSettings(name="model", uri=uri, share=1.0),),
    )
    service, tolerance = Service(threads=1), TOLERANCES[engine]
    requests = [one for one in json.loads((before / "answers.json").read_text()) if one["engine"] == engine]
    assert len(requests) > 20
    with TestClient(create_application(service), raise_server_exceptions=False) as client:
        client.portal.call(service.change_settings, chosen)
        for one in requests:
            headers = {"X-Request-ID": "golden"} | ({"Content-Type": one["type"]} if one["type"] else {})
            body = base64.b64decode(one["body"]) if one["body"] else None
            response = client.request(one["method"], one["path"], content=body, headers=headers)
            assert response.status_code == one["status"]
            _close(response.json(), one["answer"], tolerance)


@pytest.mark.parametrize("engine", ["keras", "onnx-int8"])
def test_prediction_writes_the_rows_of_before(engine, before, tmp_path):
    predict(
        PredictConfig(
            bundle=str(before / "run/bundle"), input=str(before / "digits"), output=str(tmp_path), engine=engine,
            probabilities=True, max_error_fraction=0.05,
        )
    )  # fmt: skip
    tables = [
        pyarrow.parquet.read_table(sorted(folder.glob("part-*.parquet"))[0]).replace_schema_metadata(None)
        for folder in (tmp_path, before / f"predictions-{engine}")
    ]
    assert tables[0].schema == tables[1].schema
    _close(tables[0].to_pylist(), tables[1].to_pylist(), TOLERANCES[engine])
    written, expected = (
        json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, before / f"predictions-{engine}")
    )
    assert written.keys() == expected.keys()
    assert written["classes"] == expected["classes"]


def test_an_evaluation_gives_the_figures_of_before(before, tmp_path):
    data = str(before / "run/manifest.parquet")
    evaluate(EvaluateConfig(bundle=str(before / "run/bundle"), data=data, output=str(tmp_path), engine="keras"))
    results, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, before / "report")
    )
    for name in ("bundle", "data", "engine", "data_checks"):
        del results[name], expected[name]
    # Bundles that may be unsure came in between.
    assert (results.pop("answers"), results.pop("certainty")) == (None, 0.95)
    _close(results, expected, 0.01)
    columns = [
        pyarrow.parquet.read_schema(folder / "predictions.parquet") for folder in (tmp_path, before / "report")
    ]
    assert columns[0].names == columns[1].names
