"""Models and versions of a service: flags, shares, changes."""

import base64
import contextlib
import dataclasses
import json
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import yaml
from starlette.testclient import TestClient

from cnnray import cluster, commandline
from cnnray.cluster import Node, Resources
from cnnray.models import bundle as bundles
from cnnray.models import engines
from cnnray.models.bundle import Bundle, BundleError
from cnnray.serving import deploy
from cnnray.serving import service as service_module
from cnnray.serving.application import create_application
from cnnray.serving.bodies import RequestError
from cnnray.serving.config import ModelVersion, ServeConfig
from cnnray.serving.models import Loader
from cnnray.serving.service import Service
from cnnray.serving.settings import ModelSettings, Settings
from tests.networks import GEOMETRY
from tests.unit.serving.conftest import GOOD, settings


def test_a_canary_answers_its_share(start_client, bundle, newer):
    client = start_client(("colours", bundle, 0.8), ("colours", newer, 0.2), ("others", newer, 1.0))
    service = client.app.service
    old, new = Bundle.load(bundle).version, Bundle.load(newer).version
    answers = Counter(service.choose_model("colours").version for _ in range(2000))
    assert answers.keys() == {old, new}
    assert 0.15 < answers[new] / 2000 < 0.25
    for version in (old, new):
        response = client.post("/predict", files={"image": ("a", GOOD)}, params={"version": version})
        assert response.json()["model"] == version
    assert service.choose_model("others").version == new
    metadata = client.get("/metadata").json()
    assert {name: [version["share"] for version in versions] for name, versions in metadata["models"].items()} == {
        "colours": [0.8, 0.2], "others": [1.0],
    }  # fmt: skip
    assert metadata["default_model"] == "colours"


def test_a_canary_has_the_same_clients_as_long_as_they_name_themselves(start_client, bundle, newer):
    client = start_client(("colours", bundle, 0.8), ("colours", newer, 0.2))
    service, new = client.app.service, Bundle.load(newer).version

    def chosen():
        return {key for key in map(str, range(2000)) if service.choose_model("colours", key=key).version == new}

    tenth = chosen()
    assert 0.15 < len(tenth) / 2000 < 0.25
    assert chosen() == tenth
    client.portal.call(service.change_settings, settings(("colours", bundle, 0.5), ("colours", newer, 0.5)))
    half = chosen()
    assert 0.45 < len(half) / 2000 < 0.55
    assert tenth < half  # who had it keeps it
    inside, outside = min(half), min(set(map(str, range(2000))) - half)
    image = {"b64": base64.b64encode(GOOD).decode()}
    tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [image["b64"]]}
    for key, is_new in ((inside, True), (outside, False)):
        for headers in ({"X-Canary-Key": key}, {"X-Forwarded-For": f"{key}, 10.0.0.1"}):
            for _ in range(5):
                answer = client.post("/predict", files={"image": ("a", GOOD)}, headers=headers).json()
                assert (answer["model"] == new) == is_new
                answer = client.post("/v2/models/colours/infer", json={"inputs": [tensor]}, headers=headers).json()
                assert (answer["model_version"] == new) == is_new
        answer = client.post("/v1/models/colours:predict", json={"instances": [image]}, headers={"X-Canary-Key": key})
        assert answer.is_success
    description = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["parameters"]
    assert "X-Canary-Key" in [parameter["name"] for parameter in description]
    assert "model" in [parameter["name"] for parameter in description]


def test_models_change_while_the_present_ones_answer(start_client, bundle, newer, tmp_path):
    client = start_client()
    service = client.app.service
    (first,) = [served for served, _ in service.models.versions("colours")]
    client.portal.call(service.change_settings, settings(("colours", bundle, 0.5), ("colours", newer, 0.5)))
    assert service.models.versions("colours")[0][0] is first
    client.portal.call(service.change_settings, settings(("colours", str(tmp_path), 1.0)))
    assert "is not a bundle" in client.get("/metadata").json()["problem"]
    assert len(service.models.versions("colours")) == 2
    damaged = Bundle.load(bundle).model
    damaged.get_layer("logits").bias.assign([np.nan] * 3)
    bundles.save(damaged, Bundle.load(bundle).info, tmp_path / "damaged")
    client.portal.call(service.change_settings, settings(("colours", str(tmp_path / "damaged"), 1.0)))
    assert "of a black image are not finite" in client.get("/metadata").json()["problem"]
    client.portal.call(service.change_settings, settings(("colours", newer, 1.0)))
    assert client.get("/metadata").json()["problem"] is None
    assert client.post("/predict", files={"image": ("a", GOOD)}).json()["model"] == Bundle.load(newer).version


def test_nothing_is_ready_before_there_are_models(bundle, tmp_path):
    service = Service(threads=1)
    with TestClient(create_application(service)) as client:
        for path in ("/health/ready", "/v2/health/ready", "/metadata"):
            assert client.get(path).status_code == 503
        assert client.get("/health/live").status_code == 200
        assert client.post("/predict", files={"image": ("a", GOOD)}).status_code == 503
        with pytest.raises(BundleError, match="is not a bundle"):
            client.portal.call(service.change_settings, settings(("colours", str(tmp_path), 1.0)))


def test_a_replica_serves_the_bundle_that_was_deployed_and_no_other(start_client, bundle, newer, tmp_path):
    place = str(tmp_path / "place")
    shutil.copytree(bundle, place)
    config = ServeConfig(models=[ModelVersion(name="colours", uri=bundle), ModelVersion(name="colours", uri=place)])
    (application,) = deploy.build_configuration(config, deploy.pin_models(config), 1)["applications"]
    deployed = Settings.from_dict(application["deployments"][0]["user_config"])
    version = Bundle.load(bundle).version
    assert [model.version for model in deployed.models] == [version, version]
    client = start_client()
    service = client.app.service
    client.portal.call(service.change_settings, deployed)
    assert service.problem is None
    bundles.replace(place, newer)  # another training into the same place
    client.portal.call(service.change_settings, dataclasses.replace(deployed, max_images=7))
    assert (service.problem, service.settings.max_images) == (None, 7)  # what is loaded is what was deployed
    assert [served.version for served in service.models.all] == [version, version]
    shutil.rmtree(place)
    client.portal.call(service.change_settings, dataclasses.replace(deployed, max_images=8))
    assert (service.problem, service.settings.max_images) == (None, 8)
    shutil.copytree(newer, place)
    refused = f"holds {Bundle.load(newer).version} now, and {version} was deployed"
    load = Loader(threads=1, gpus=False, metrics=service.metrics)  # of a new replica
    with pytest.raises(BundleError, match=refused):
        load(_with(deployed, share=(0.0, 1.0)), starts=True)


@pytest.mark.parametrize(("own_ray", "most"), [(True, 3), (False, deploy._MOST_REPLICAS)])
def test_a_cluster_may_grow_and_a_machine_does_not(own_ray, most, bundle, tmp_path, monkeypatch):
    deployed, checked = [], []
    resources = Resources((Node(cpus=3.0),))
    monkeypatch.setattr(cluster, "starts_own", lambda: own_ray)
    monkeypatch.setattr(cluster, "connected", lambda **_: contextlib.nullcontext(resources))
    monkeypatch.setattr(deploy.waiting, "wait_for_resources", lambda plan, requests, minutes: plan(resources))
    monkeypatch.setattr(deploy.paths, "check_shared", lambda resources, uris: checked.extend(uris))
    for name in ("OwnServe", "rest_client", "_check_port", "_prepare_environment", "_log_usage", "_log_changes"):
        monkeypatch.setattr(deploy, name, lambda *_: None)

    def deploy_it(client, config, pinned, max_replicas, stop):
        stop.set()
        deployed.append((max_replicas, [model.version for model in pinned]))
        return {}

    monkeypatch.setattr(deploy, "_deploy", deploy_it)
    monkeypatch.setattr(deploy.signal, "signal", lambda *_: None)
    log, rows = str(tmp_path / "log"), str(tmp_path / "rows")
    deploy.serve(
        ServeConfig(
            bundle=bundle, log_requests=log, jobs_output=rows, jobs_from=[str(tmp_path)], cpus_per_replica=1.0
        )
    )
    assert deployed == [(most, [Bundle.load(bundle).version])]
    # Replicas on other nodes write there.
    assert checked == [bundle, log, rows]
    assert (tmp_path / "log").is_dir()
    assert (tmp_path / "rows").is_dir()


def test_a_replica_serves_the_export_that_was_deployed_and_no_other(
    start_client, bundle, newer, tmp_path, monkeypatch
):
    place = tmp_path / "place"
    shutil.copytree(bundle, place)
    config = ServeConfig(bundle=str(place))
    (application,) = deploy.build_configuration(config, deploy.pin_models(config), 1)["applications"]
    deployed = Settings.from_dict(application["deployments"][0]["user_config"])
    (model,) = deployed.models
    assert (model.engine, model.digest) == ("keras", Bundle.load(str(place)).digest("model.keras"))
    client = start_client()
    service = client.app.service
    client.portal.call(service.change_settings, deployed)
    assert service.problem is None
    (version,) = client.get("/metadata").json()["models"]["model"]
    assert version["digest"] == model.digest
    (served,) = service.models.all
    # Another export of the same model: the version stays.
    monkeypatch.setattr(engines, "digest", lambda bundle, name: "0" * 64)
    client.portal.call(service.change_settings, dataclasses.replace(deployed, max_images=7))
    assert (service.problem, service.models.all) == (None, [served])
    load = Loader(threads=1, gpus=False, metrics=service.metrics)  # of a new replica
    with pytest.raises(BundleError, match="holds another export for keras now than was deployed: deploy it again"):
        load(deployed, starts=True)
    again = deploy.build_configuration(config, deploy.pin_models(config), 1)["applications"][0]
    client.portal.call(service.change_settings, Settings.from_dict(again["deployments"][0]["user_config"]))
    assert service.problem is None
    assert [(other.version, other.digest) for other in service.models.all] == [(served.version, "0" * 64)]


def _with(settings, **values):
    """The settings with other values of their models, such as share=(0.4, 0.6)."""
    changes = [dict(zip(values, of_model, strict=True)) for of_model in zip(*values.values(), strict=True)]
    pairs = zip(settings.models, changes, strict=True)
    return dataclasses.replace(
        settings, models=tuple(dataclasses.replace(model, **change) for model, change in pairs)
    )


@pytest.mark.parametrize("gone", [0, 2])
def test_a_replica_starts_without_versions_that_have_no_requests(bundle, newer, tmp_path, gone):
    """A canary that was rolled back, or the version before one that was promoted."""
    places = [str(tmp_path / name) for name in "abc"]
    for place, source in zip(places, (bundle, newer, bundle), strict=True):
        shutil.copytree(source, place)
    wanted = settings(*(("colours", place, share) for place, share in zip(places, (0.0, 1.0, 0.0), strict=True)))
    wanted = _with(wanted, verdict=(None, None, "rolled back: it was wrong"))
    shutil.rmtree(places[gone])
    service = Service(threads=1)
    with TestClient(create_application(service)) as client:
        client.portal.call(service.change_settings, wanted)
        assert client.get("/health/ready").status_code == 200
        metadata = client.get("/metadata").json()
        assert sorted(version["share"] for version in metadata["models"]["colours"]) == [0.0, 1.0]
        assert metadata["problem"] is None
        answer = client.post("/predict", files={"image": ("a", GOOD)}).json()
        assert answer["model"] == Bundle.load(newer).version


def test_a_replica_starts_without_a_canary_and_loads_it_when_it_can(bundle, newer, tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_FIRST_PAUSE", 0.1)
    late = str(tmp_path / "late")
    service, old, new = Service(threads=1), Bundle.load(bundle).version, Bundle.load(newer).version
    wanted = settings(("colours", bundle, 0.8), ("colours", late, 0.2), ("others", bundle, 1.0))
    with TestClient(create_application(service)) as client:

        def shares():
            return [version["share"] for version in client.get("/metadata").json()["models"]["colours"]]

        client.portal.call(service.change_settings, wanted)
        assert "is not a bundle" in client.get("/metadata").json()["problem"]
        assert shares() == pytest.approx([1.0])
        assert {service.choose_model("colours").version for _ in range(100)} == {old}
        # What else is changed meanwhile does not wait for it.
        client.portal.call(service.change_settings, dataclasses.replace(wanted, max_images=7))
        assert service.settings.max_images == 7
        assert "is not a bundle" in client.get("/metadata").json()["problem"]
        shutil.copytree(newer, late)
        deadline = time.monotonic() + 20
        while client.get("/metadata").json()["problem"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert shares() == [0.8, 0.2]
        assert service.choose_model("colours", new).version == new
        # A change of what is served, of which a version cannot be loaded, is still none.
        for share in (0.1, 0.0):
            other = ("colours", bundle, 1 - share), ("colours", str(tmp_path / "none"), share)
            client.portal.call(service.change_settings, settings(*other))
            assert "is not a bundle" in client.get("/metadata").json()["problem"]
            assert shares() == [0.8, 0.2]


def test_a_canary_whose_engine_fails_does_not_end_the_replica(start_client, bundle, newer, monkeypatch):
    client = start_client(("colours", bundle, 0.9), ("colours", newer, 0.1))
    service = client.app.service
    stable, canary = service.models.all
    monkeypatch.setattr(canary.batcher, "_run", lambda images: 1 / 0)
    client.portal.call(service.check_health)
    # One that hangs may do so in this process alone.
    canary.compute._calls["hangs"] = time.monotonic() - 100
    with pytest.raises(RequestError, match="has made no progress for 100 seconds"):
        client.portal.call(service.check_health)
    del canary.compute._calls["hangs"]
    monkeypatch.setattr(stable.batcher, "_run", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client.portal.call(service.check_health)


def test_a_change_that_failed_is_tried_again(start_client, bundle, newer, tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_FIRST_PAUSE", 0.1)
    client = start_client()
    service, recorded = client.app.service, []
    monkeypatch.setattr(service.metrics, "record_change", lambda *, failed: recorded.append(failed))
    late = tmp_path / "late"
    client.portal.call(service.change_settings, settings(("colours", str(late), 1.0)))
    assert "is not a bundle" in client.get("/metadata").json()["problem"]
    assert client.post("/predict", files={"image": ("a", GOOD)}).json()["model"] == Bundle.load(bundle).version
    shutil.copytree(newer, late)
    deadline = time.monotonic() + 20
    while client.get("/metadata").json()["problem"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.post("/predict", files={"image": ("a", GOOD)}).json()["model"] == Bundle.load(newer).version
    assert recorded[0] is True
    assert recorded[-1] is False


def test_other_settings_end_the_attempts_at_those_that_failed(start_client, bundle, newer, tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_FIRST_PAUSE", 0.1)
    client = start_client()
    service, late = client.app.service, tmp_path / "late"
    client.portal.call(service.change_settings, settings(("colours", str(late), 1.0)))
    client.portal.call(service.change_settings, settings(("colours", bundle, 1.0)))
    shutil.copytree(newer, late)
    time.sleep(0.5)
    assert client.get("/metadata").json()["problem"] is None
    assert service.models.all[0].version == Bundle.load(bundle).version


def test_the_health_check_does_not_wait_behind_images(start_client, bundle, newer, monkeypatch):
    client = start_client(("colours", bundle, 0.5), ("colours", newer, 0.5))
    service, free = client.app.service, threading.Event()
    slow, other = service.models.all
    image = np.zeros(GEOMETRY.image_size.shape, np.uint8)
    compute = slow.batcher._run

    async def overload():
        return [slow.batcher.submit(image) for _ in range(1000)]

    monkeypatch.setattr(slow.batcher, "_run", lambda images: (free.wait(20), compute(images))[1])
    client.portal.call(overload)
    client.portal.call(service.check_health)
    # A version does not wait for the engine of another one.
    assert client.post("/predict", files={"image": ("a", GOOD)}, params={"version": other.version}).is_success
    assert len(slow.batcher._waiting) == 1000 - 2 * 8
    monkeypatch.setattr(type(slow.compute), "seconds_without_progress", property(lambda compute: 30.4))
    with pytest.raises(RequestError, match=r"^colours .* has made no progress for 30 seconds\.$"):
        client.portal.call(service.check_health)
    free.set()


def test_an_idle_engine_that_fails_is_not_healthy(start_client, monkeypatch):
    client = start_client()
    service = client.app.service
    client.portal.call(service.check_health)
    monkeypatch.setattr(service.models.all[0].batcher, "_run", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client.portal.call(service.check_health)


def _shares(config):
    return [(model.name, model.uri, model.share) for model in config.settings.models]


def test_one_bundle(tmp_path):
    assert ServeConfig(bundle=f"{tmp_path}/a").settings.models == (ModelSettings(name="model", uri=f"{tmp_path}/a"),)
    chosen = ServeConfig(bundle="/1").settings
    assert Settings.from_dict(json.loads(json.dumps(chosen.as_dict()))) == chosen


CATS_AND_DOGS = [
    {"name": "cats", "uri": "/1"}, {"name": "dogs", "uri": "s3://b/d=1"}, {"name": "cats", "uri": "/2"},
    {"name": "cats", "uri": "/3", "share": 0.25},
]  # fmt: skip
SHARES = [("cats", "/1", 0.0), ("cats", "/2", 0.75), ("cats", "/3", 0.25), ("dogs", "s3://b/d=1", 1.0)]
EARLIER_FORM = ("cats=/1,dogs=s3://b/d=1,cats=/2,cats=/3", "cats=0.25")


def test_several_models_from_python_json_and_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"models": CATS_AND_DOGS}))
    config = ServeConfig(models=CATS_AND_DOGS)
    assert _shares(config) == SHARES
    for arguments in (["--models", json.dumps(CATS_AND_DOGS)], ["--config", str(tmp_path / "c.yaml")]):
        assert commandline.parse(ServeConfig, "jobs/serve.py", arguments) == config
    assert [share for _, _, share in _shares(ServeConfig(models=CATS_AND_DOGS[:3]))] == [0.0, 1.0, 1.0]


def test_the_earlier_form_of_bundle_and_canary_is_read(tmp_path):
    bundle, canary = EARLIER_FORM
    config = ServeConfig(models=CATS_AND_DOGS)
    assert ServeConfig(bundle=bundle, canary=canary) == config
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"bundle": bundle, "canary": canary}))
    (tmp_path / "bundle.yaml").write_text(yaml.safe_dump({"bundle": bundle}))
    for arguments in (
        ["--bundle", bundle, "--canary", canary],
        [f"--bundle={bundle}", f"--canary={canary}"],
        ["--config", str(tmp_path / "c.yaml")],
        ["--config", str(tmp_path / "bundle.yaml"), "--canary", canary],
    ):
        assert commandline.parse(ServeConfig, "jobs/serve.py", arguments) == config
    assert [share for _, _, share in _shares(ServeConfig(bundle="cats=/1,cats=/2"))] == [0.0, 1.0]
    assert _shares(ServeConfig(bundle="/1,/2", canary="model=0.5")) == [("model", "/1", 0.5), ("model", "/2", 0.5)]
    assert ServeConfig(bundle="model=/1") == ServeConfig(bundle="/1")
    # A config that was read from the earlier form can be changed.
    assert dataclasses.replace(ServeConfig(bundle=bundle, canary=canary), port=1).models == config.models


def test_a_path_that_exists_is_one_bundle_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dt=1/bundle", "a,b=2", "1/bundle"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("dt=1/bundle", "./dt=1/bundle", "a,b=2", f"{tmp_path}/dt=1/bundle"):
        config = ServeConfig(bundle=name)
        assert config.settings.models == (ModelSettings(name="model", uri=str(tmp_path / name)),)
        assert dataclasses.replace(config, port=1).models is None
    assert _shares(ServeConfig(bundle="cats=1/bundle")) == [("cats", f"{tmp_path}/1/bundle", 1.0)]
    both = ServeConfig(bundle="dt=1/bundle,model=1/bundle")
    assert _shares(both) == [("model", f"{tmp_path}/dt=1/bundle", 0.0), ("model", f"{tmp_path}/1/bundle", 1.0)]


def _models(*versions):
    """`models` for versions (NAME, URI) or (NAME, URI, SHARE); no bundle."""
    return {"bundle": None, "models": [dict(zip(("name", "uri", "share"), v, strict=False)) for v in versions]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bundle": " ,"}, "--bundle names no bundle"),
        ({"bundle": None}, "--bundle or --models is needed"),
        ({"models": [{"name": "cats", "uri": "/1"}]}, "--bundle and --models exclude each other"),
        ({"canary": "model=0.5"}, "--canary model: --bundle has not two versions"),
        ({"canary": "model=2"}, "expected NAME=SHARE"),
        (_models(), "--models is empty"),
        (_models(("cats", "/1"), ("cats", "/2")) | {"canary": "cats=0.5"}, "--canary is for --bundle NAME=URI"),
        (_models(("cats", "/1"), ("dogs", "/1"), ("cats", "/1")), "--models lists /1 twice for cats"),
        (_models(("cats", "/1"), ("cats", "/2", 1.1)), "--models: share of cats must be 0 to 1, not 1.1"),
        (_models(("cats", "/1", 0.5)), "--models: cats has one version, which answers all requests"),
        (_models(("cats", "/1", 0.5), ("cats", "/2")), "--models: /1 is not the newest version of cats"),
        (_models(("a/b", "/1")), "--models: 'a/b' cannot be a name"),
        (_models(("cats", "")), "--models: cats has an empty uri"),
        ({"engine": "x"}, "--engine 'x'"),
        ({"port": 70_000}, "--port 70000 is no port"),
        ({"min_replicas": 3, "max_replicas": 2}, "--min-replicas 3 is not from 0 to --max-replicas"),
        ({"timeout_seconds": 0}, "--timeout-seconds must be more than 0"),
    ],
)
def test_impossible_flags_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ServeConfig(**{"bundle": "/b"} | changes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[{name: cats, uris: /1}]", "'uris' is not accepted"),
        ("[{name: cats}]", "required: uri"),
        ("cats=/1", "models"),
        ("[{name: cats, uri: /1}, {name: cats, uri: /2, share: 2}]", "share of cats must be 0 to 1, not 2.0"),
    ],
)
def test_mistakes_in_models_get_one_line(text, sentence, capsys):
    with pytest.raises(SystemExit):
        commandline.parse(ServeConfig, "jobs/serve.py", ["--models", text])
    message = capsys.readouterr().err
    assert sentence in message
    assert len(message.strip().splitlines()) == 1


def test_a_service_may_grow_with_its_cluster(bundle, tmp_path):
    """What the cluster has room for when the service is deployed is no bound for later."""
    path = tmp_path / "serve.yaml"
    for flags, most in (({}, 1000), ({"max_replicas": 3}, 3)):
        deploy.write_configuration(ServeConfig(bundle=bundle, engine="keras", write_config=str(path), **flags))
        (application,) = yaml.safe_load(path.read_text())["applications"]
        assert application["deployments"][0]["autoscaling_config"]["max_replicas"] == most


def test_other_code_or_resources_replace_replicas_and_other_models_do_not():
    def application(bundle, environment=None, **flags):
        config = ServeConfig(bundle=bundle, **flags)
        (application,) = deploy.build_configuration(config, None, 1)["applications"]
        return application | ({"runtime_env": environment} if environment else {})

    deployed = application("/a", {"working_dir": "gcs://1.zip"})
    assert not deploy._replaces_replicas(deployed, application("/b", {"working_dir": "gcs://1.zip"}))
    assert deploy._replaces_replicas(deployed, application("/a", {"working_dir": "gcs://2.zip"}))
    assert deploy._replaces_replicas(deployed, application("/a", {"working_dir": "gcs://1.zip"}, cpus_per_replica=2))


def test_settings_of_an_earlier_version_are_read(bundle):
    values = settings(("colours", bundle, 1.0)).as_dict()
    for name in ("max_queued_images", "max_bytes_in_flight"):
        del values[name]
    for earlier, present in ((True, "all"), (False, "none")):
        read = Settings.from_dict(values | {"access_log": earlier})
        assert (read.access_log, read.max_queued_images, read.max_bytes_in_flight) == (present, 512, 2**27)


def test_an_access_log_that_is_none_of_three():
    with pytest.raises(ValueError, match="--access-log 'some': expected all, errors or none"):
        ServeConfig(bundle="/nowhere", access_log="some")


def test_the_access_log_of_an_earlier_version():
    assert [ServeConfig(bundle="/nowhere", access_log=earlier).access_log for earlier in (True, "false")] == [
        "all", "none",
    ]  # fmt: skip


def test_a_replica_beside_a_gpu_has_cpus_to_decode_with():
    nodes = cluster.Resources((cluster.Node(cpus=8), cluster.Node(cpus=96, gpus=8), cluster.Node(cpus=64, gpus=8)))
    assert nodes.cpus_beside(0) == 1
    assert nodes.cpus_beside(1) == 8
    assert nodes.cpus_beside(0.5) == 4
    assert ServeConfig(bundle="/b").resources == (1, 0)
    assert ServeConfig(bundle="/b", gpus_per_replica=1).resources == (4, 1)  # where no cluster is known
    assert ServeConfig(bundle="/b", gpus_per_replica=1, cpus_per_replica=2).resources == (2, 1)
