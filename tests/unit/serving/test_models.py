"""Models and versions of a service: flags, canaries, changes."""

import json
from collections import Counter

import pytest
from starlette.testclient import TestClient

from cnnray.models.bundle import Bundle, BundleError
from cnnray.serving.application import application
from cnnray.serving.config import ServeConfig
from cnnray.serving.service import Service
from cnnray.serving.settings import ModelSettings, Settings
from tests.unit.serving.conftest import GOOD, settings


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
    client.portal.call(service.change, settings(("colours", bundle, 0.5), ("colours", newer, 0.5)))
    assert service.models.versions("colours")[0][0] is first
    client.portal.call(service.change, settings(("colours", str(tmp_path), 1.0)))
    assert "is not a bundle" in client.get("/metadata").json()["problem"]
    assert len(service.models.versions("colours")) == 2
    client.portal.call(service.change, settings(("colours", newer, 1.0)))
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
            client.portal.call(service.change, settings(("colours", str(tmp_path), 1.0)))


def test_bundles_and_canaries_of_the_command_line(tmp_path):
    one = ServeConfig(bundle=f"{tmp_path}/a").models
    assert one == (ModelSettings(name="model", uri=f"{tmp_path}/a"),)
    found = ServeConfig(bundle="cats=/1,dogs=s3://b/d=1,cats=/2,cats=/3", canary="cats=0.25").models
    assert [(model.name, model.uri, model.share) for model in found] == [
        ("cats", "/1", 0.0), ("cats", "/2", 0.75), ("cats", "/3", 0.25), ("dogs", "s3://b/d=1", 1.0),
    ]  # fmt: skip
    assert [model.share for model in ServeConfig(bundle="cats=/1,cats=/2").models] == [0.0, 1.0]
    chosen = ServeConfig(bundle="cats=/1").settings
    assert Settings.of(json.loads(json.dumps(chosen.as_dict()))) == chosen


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
