"""Canaries: what decides about them, what is changed then, and how models are loaded and unloaded."""

import asyncio
import dataclasses
import json
import shutil
import threading
import time
import types
from collections import Counter

import numpy as np
import pytest
import ray
from scipy.stats import binomtest

from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from cnnray.serving import canaries, releases, repository
from cnnray.serving.config import ServeConfig
from cnnray.serving.controller import ServedSettings
from cnnray.serving.coordinator import Coordinator
from cnnray.serving.keys import Key
from cnnray.serving.releases import PROMOTE, ROLL_BACK, WAIT, ChangeError, Comparison, Record, Release, Verdict
from cnnray.serving.settings import ModelSettings, Settings
from cnnray.tracking.prometheus import ServingMetrics
from tests.unit.serving.conftest import GOOD, settings

LIMITS = {"errors": 0.01, "latency": 2.0, "agreement": 0.9}
ADMIN = {"X-API-Key": "admin"}


def record(requests, failed=0, seconds=0.01, images=1):
    """How a version has answered requests with so many images each."""
    result = Record()
    for number in range(requests):
        result.add_request(images, seconds, failed=number < failed)
    return result


def served(*models, **changes):
    """Settings with models, each (name, version, share)."""
    versions = tuple(
        ModelSettings(name=name, uri=f"/{version}", version=version, share=share) for name, version, share in models
    )
    flags = {"promote_after": 1000, "rollback_on": LIMITS, "shadow_share": 0.1}
    return dataclasses.replace(settings(**flags | changes), models=versions)


CANARY = served(("cats", "old", 0.9), ("cats", "new", 0.1))
RELEASE = Release(name="cats", stable="old", canary="new", share=0.1, revision=0)


@pytest.mark.parametrize(
    ("comparison", "action", "reason"),
    [
        (Comparison(), WAIT, "0 of 1000 images"),
        (Comparison(stable=record(900), canary=record(999), compared=1000, agreed=1000), WAIT, "999 of 1000 images"),
        (Comparison(stable=record(900), canary=record(1000), compared=999, agreed=999), WAIT, "999 compared"),
        (Comparison(stable=record(900), canary=record(1000), compared=1000, agreed=950), PROMOTE, "950 of them"),
        (Comparison(stable=record(900), canary=record(100, images=10), compared=1000, agreed=950), PROMOTE, "1000"),
        # Nothing is known of the version before.
        (Comparison(stable=record(99), canary=record(1000), compared=1000, agreed=1000), WAIT, "99 of 100 requests"),
        (Comparison(stable=record(1), canary=record(1000, 900), compared=1000, agreed=1000), WAIT, "be chance"),
        (Comparison(stable=record(110), canary=record(1000, 80), compared=1000, agreed=1000), WAIT, "be chance"),
        (Comparison(stable=record(99), canary=record(100, seconds=1)), WAIT, "100 of 1000 images"),
        # 12 and 13 % have another class, and 10 % may: it may be chance among 100, and is not among 2000.
        (Comparison(stable=record(900), canary=record(100), compared=100, agreed=88), WAIT, "be chance"),
        (Comparison(stable=record(900), canary=record(99), compared=2000, agreed=1740), ROLL_BACK, "260 of 2000"),
        (Comparison(stable=record(20), canary=record(5), compared=5, agreed=0), ROLL_BACK, "another class"),
        (Comparison(stable=record(900), canary=record(100, 20), compared=80, agreed=80), ROLL_BACK, "no answer"),
        # One request of many images that fails or is slow says little.
        (Comparison(stable=record(900), canary=record(100) + record(1, 1, images=32)), WAIT, ""),
        (Comparison(stable=record(900), canary=record(100) + record(1, seconds=9, images=32)), WAIT, ""),
        # Errors that both have are not the canary's.
        (Comparison(stable=record(900, 180), canary=record(1000, 200), compared=1000, agreed=1000), PROMOTE, ""),
        (Comparison(stable=record(900), canary=record(100, seconds=0.025)), ROLL_BACK, "take longer than"),
        (Comparison(stable=record(900), canary=record(100, seconds=0.015)), WAIT, "100 of 1000 images"),
    ],
)  # fmt: skip
def test_the_verdict(comparison, action, reason):
    verdict = releases.judge(comparison, CANARY)
    assert (verdict.action, reason in verdict.reason) == (action, True), verdict


def test_a_good_canary_is_hardly_ever_called_bad():
    """Canaries whose true rate is at the limit, looked at as often as a release is: 1 in 100 may go back."""
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(200):
        differ = np.cumsum(rng.random(20_000) < 0.1)
        last = 0
        for images in range(1, 20_001):
            if not releases.is_due(images, last):
                continue
            last = images
            comparison = Comparison(compared=images, agreed=images - int(differ[images - 1]))
            if releases.judge(comparison, CANARY).action == ROLL_BACK:
                bad += 1
                break
    assert bad <= 4


def test_a_bound_is_that_of_scipy():
    for bad, total in ((1, 10), (3, 1000), (0, 5), (5, 5)):
        interval = binomtest(bad, total).proportion_ci(1 - 2e-4, "exact")
        assert releases.bound(bad, total, 1e-4, upper=False) == pytest.approx(interval.low, abs=1e-9)
        assert releases.bound(bad, total, 1e-4, upper=True) == pytest.approx(interval.high, abs=1e-9)


def test_which_canaries_are_compared():
    assert releases.find_release(CANARY, "cats") == RELEASE
    assert releases.find_release(CANARY, "dogs") is None
    assert releases.find_release(served(("cats", "old", 0.0), ("cats", "new", 1.0)), "cats") is None
    shadowed = served(("cats", "old", 1.0), ("cats", "new", 0.0))
    assert releases.find_release(shadowed, "cats").share == 0
    assert releases.find_release(served(("cats", "old", 1.0), ("cats", "new", 0.0), shadow_share=0.0), "cats") is None
    assert releases.find_release(served(("cats", "old", 0.5), ("cats", "old", 0.5)), "cats") is None
    decided = releases.carry_out(CANARY, RELEASE, Verdict(action=ROLL_BACK, reason="so"))
    assert releases.find_release(decided, "cats") is None


def test_what_a_verdict_changes():
    more = served(("dogs", "d", 1.0), ("cats", "older", 0.0), ("cats", "old", 0.9), ("cats", "new", 0.1))
    for action, shares, words in ((PROMOTE, [0, 1], "promoted"), (ROLL_BACK, [1, 0], "rolled back")):
        changed = releases.carry_out(more, RELEASE, Verdict(action=action, reason="so"))
        assert [model.share for model in changed.models] == [1.0, 0.0, *shares]
        assert [model.verdict for model in changed.models] == [None, None, None, f"{words}: so"]
        assert Settings.from_dict(changed.as_dict()) == changed
    with pytest.raises(ChangeError, match="have been changed meanwhile"):
        releases.carry_out(served(("cats", "new", 1.0)), RELEASE, Verdict(action=PROMOTE))


def test_what_loading_and_unloading_change():
    def models(settings):
        return [(model.name, model.version, model.share) for model in settings.models]

    def load(settings, version, share=1.0, name="cats"):
        return releases.load(settings, ModelSettings(name=name, uri="/x", version=version, share=share))

    two = served(("cats", "old", 1.0), ("dogs", "d", 1.0))
    assert models(load(two, "new")) == [("cats", "new", 1.0), ("dogs", "d", 1.0)]
    canary = load(two, "new", 0.25)
    assert models(canary) == [("cats", "old", 0.75), ("cats", "new", 0.25), ("dogs", "d", 1.0)]
    assert models(load(canary, "newest", 0.5))[:2] == [("cats", "old", 0.5), ("cats", "newest", 0.5)]
    assert models(load(canary, "new", 0.5))[:2] == [("cats", "old", 0.5), ("cats", "new", 0.5)]
    assert models(load(canary, "new"))[:1] == [("cats", "new", 1.0)]
    assert models(load(two, "m", 0.5, "mice"))[2:] == [("mice", "m", 1.0)]
    assert models(releases.unload(two, "cats")) == [("dogs", "d", 1.0)]
    with pytest.raises(ChangeError, match="There is no model 'mice'; served are cats, dogs"):
        releases.unload(two, "mice")
    with pytest.raises(ChangeError, match="only model"):
        releases.unload(releases.unload(two, "cats"), "dogs")


class Store:
    """The settings of all replicas, in this process."""

    def __init__(self, settings):
        self.settings, self.writes = settings, 0

    def read(self):
        return self.settings

    def write(self, before, after):
        if self.settings != before:
            raise ChangeError("changed")
        self.settings = after
        self.writes += 1


def test_the_coordinator_adds_up_what_replicas_have_seen():
    store = Store(CANARY)
    coordinator = Coordinator(store)
    half = Comparison(stable=record(4500), canary=record(500), compared=500, agreed=490)
    assert coordinator.report("a", {RELEASE: half}, CANARY)[RELEASE].action == WAIT
    assert coordinator.report("a", {RELEASE: half}, CANARY)[RELEASE].action == WAIT  # the same once more
    assert store.writes == 0
    verdict = coordinator.report("b", {RELEASE: half}, CANARY)[RELEASE]
    assert verdict.action == PROMOTE
    assert "1000 compared, 980 of them" in verdict.reason
    assert [model.share for model in store.settings.models] == [0, 1]
    # A replica that has not heard of it yet changes nothing.
    more = Comparison(stable=record(9000), canary=record(2000), compared=2000, agreed=0)
    coordinator.report("b", {RELEASE: more}, CANARY)
    assert store.writes == 1
    assert store.settings.models[-1].verdict.startswith("promoted")


def test_a_canary_that_is_deployed_once_more_begins_anew():
    store = Store(CANARY)
    coordinator = Coordinator(store)
    wrong = Comparison(stable=record(900), canary=record(900), compared=900, agreed=0)
    assert coordinator.report("a", {RELEASE: wrong}, CANARY)[RELEASE].action == ROLL_BACK
    models = tuple(dataclasses.replace(model, revision=7) for model in CANARY.models)
    store.settings = again = dataclasses.replace(CANARY, models=models)
    release = releases.find_release(again, "cats")
    good = Comparison(stable=record(900), canary=record(400), compared=400, agreed=400)
    assert coordinator.report("b", {release: good}, again)[release].action == WAIT
    assert store.settings == again
    assert coordinator._reports.keys() == {release}  # what has ended is forgotten
    # A file for `serve deploy` has the same revision each time.
    coordinator.report("b", {release: Comparison(canary=record(1))}, again)
    assert coordinator._reports[release]["b"].canary.images == 1
    assert coordinator._looks[release][0] == 1


def test_settings_without_versions_are_decided_about_too():
    """As those of a file for `serve deploy` from an earlier version."""
    models = tuple(dataclasses.replace(model, version=None) for model in CANARY.models)
    store = Store(dataclasses.replace(CANARY, models=models))
    wrong = Comparison(stable=record(900), canary=record(100), compared=100, agreed=0)
    assert Coordinator(store).report("a", {RELEASE: wrong}, CANARY)[RELEASE].action == ROLL_BACK
    assert [model.share for model in store.settings.models] == [1, 0]


def test_a_change_by_somebody_else_is_not_undone():
    store = Store(served(("cats", "old", 1.0)))
    coordinator = Coordinator(store)
    new = ModelSettings(name="cats", uri="/new", version="new")
    before, after = coordinator.load(new, store.settings)
    assert after.models[0].revision > 0
    store.settings = other = served(("cats", "other", 1.0))
    with pytest.raises(ChangeError):
        coordinator.undo(before, after)
    assert store.settings == other


def test_nothing_is_done_that_was_not_asked_for():
    watched = served(("cats", "old", 0.9), ("cats", "new", 0.1), promote_after=None, rollback_on=None)
    store = Store(watched)
    wrong = Comparison(stable=record(900), canary=record(100), compared=100, agreed=0)
    assert Coordinator(store).report("a", {RELEASE: wrong}, watched)[RELEASE].action == ROLL_BACK
    assert store.writes == 0


class InProcess:
    """Stands for `Coordination` and Serve: the coordinator is in this process, and there is one replica."""

    def __init__(self, service):
        self._service, self._coordinator, self._store = service, None, None

    def _call(self, method, *arguments):
        if self._coordinator is None:
            self._store = Store(self._service.settings)
            self._coordinator = Coordinator(self._store)
        writes = self._store.writes
        result = getattr(self._coordinator, method)(*arguments)
        if self._store.writes > writes:
            self._changing = asyncio.create_task(self._service.change_settings(self._store.settings))
        return result

    async def report(self, seen, settings):
        return self._call("report", "a", seen, settings)

    async def load(self, model, settings):
        return self._call("load", model, settings)

    async def unload(self, name):
        return self._call("unload", name)

    async def undo(self, before, after):
        return self._call("undo", before, after)


@pytest.fixture
def start(start_client, monkeypatch):
    """A function that starts a client of a service that has a coordinator."""
    monkeypatch.setattr(canaries, "_REPORT_SECONDS", 0.05)

    def start(*models, **changes):
        client = start_client(*models, keys=[Key(key="admin", name="a", admin=True)], **changes)
        service = client.app.service
        service.coordination = service.canaries._coordination = InProcess(service)
        client.headers.update(ADMIN)
        client.portal.call(follow, service)
        return client

    async def follow(service):
        service.canaries.follow(service.models, service.settings)

    return start


def shares(client):
    models = client.get("/metadata").json()["models"]
    return {name: [version["share"] for version in versions] for name, versions in models.items()}


@pytest.fixture
def recorded(monkeypatch):
    """The metrics of canaries: verdicts, the times of each version, and comparisons."""
    recorded = {"verdict": {}, "request_of_version": Counter(), "comparison": Counter()}
    record_verdict = ServingMetrics.record_verdict
    record_request, record_comparison = ServingMetrics.record_request_of_version, ServingMetrics.record_comparison

    def verdict(metrics, model, version, number):
        recorded["verdict"][model, version] = number
        record_verdict(metrics, model, version, number)

    def request(metrics, model, version, seconds, *, failed):
        recorded["request_of_version"][model, version, failed] += 1
        record_request(metrics, model, version, seconds, failed=failed)

    def comparison(metrics, model, version, *, agree):
        recorded["comparison"][model, version, agree] += 1
        record_comparison(metrics, model, version, agree=agree)

    monkeypatch.setattr(ServingMetrics, "record_verdict", verdict)
    monkeypatch.setattr(ServingMetrics, "record_request_of_version", request)
    monkeypatch.setattr(ServingMetrics, "record_comparison", comparison)
    return recorded


def answer_until(client, condition, seconds=60):
    """Send images until the service is as it should be."""
    end, statuses = time.monotonic() + seconds, Counter()
    while not condition():
        assert time.monotonic() < end, client.get("/metadata").json()
        statuses[client.post("/predict", files={"image": ("a", GOOD)}).status_code] += 1
    return statuses


def test_a_canary_with_other_labels_goes_back_by_itself(start, bundle, relabelled, caplog, recorded):
    client = start(("c", bundle, 0.5), ("c", relabelled, 0.5), shadow_share=0.5, rollback_on={"agreement": 0.9})
    statuses = answer_until(client, lambda: shares(client) == {"c": [1, 0]})
    assert statuses.keys() == {200}
    newest = client.get("/metadata").json()["models"]["c"][-1]
    assert newest["verdict"].startswith("rolled back: ")
    assert "images have another class than before" in newest["verdict"]
    assert any(f"c {newest['version']} is rolled back" in message for message in caplog.messages)
    old, new = Bundle.load(bundle).version, newest["version"]
    assert recorded["verdict"] == {("c", old): 0, ("c", new): -1}
    assert recorded["comparison"]["c", new, False] > recorded["comparison"]["c", new, True]
    assert recorded["request_of_version"].keys() == {("c", old, False), ("c", new, False)}


def test_a_good_canary_is_promoted_by_itself(start, bundle, newer, caplog, recorded):
    client = start(("c", bundle, 0.5), ("c", newer, 0.5), shadow_share=1.0, promote_after=30)
    assert answer_until(client, lambda: shares(client) == {"c": [0, 1]}).keys() == {200}
    newest = client.get("/metadata").json()["models"]["c"][-1]
    assert "promoted: " in newest["verdict"]
    assert any(f"c {newest['version']} is promoted" in message for message in caplog.messages)
    assert recorded["verdict"]["c", newest["version"]] == 1
    assert recorded["comparison"].keys() == {("c", newest["version"], True)}


def test_a_canary_is_only_watched_where_nothing_else_was_asked_for(start, bundle, relabelled):
    client = start(("c", bundle, 1.0), ("c", relabelled, 0.0), shadow_share=1.0)
    said = answer_until(
        client,
        lambda: (client.get("/metadata").json()["models"]["c"][-1]["verdict"] or "").startswith("roll back"),
    )
    assert said.keys() == {200}
    assert shares(client) == {"c": [1, 0]}


def test_an_engine_that_fails_is_counted_as_the_canarys(start, bundle, newer):
    client = start(("c", bundle, 0.5), ("c", newer, 0.5), rollback_on={"errors": 0.05})
    service, version = client.app.service, Bundle.load(newer).version

    def fail(images):
        raise RuntimeError("broken")

    service.models.choose("c", version).compute.predict = fail
    statuses = answer_until(client, lambda: shares(client) == {"c": [1, 0]})
    assert statuses.keys() == {200, 500}


def test_images_are_not_compared_while_many_wait(start, bundle, newer, monkeypatch):
    client = start(("c", bundle, 0.5), ("c", newer, 0.5), shadow_share=1.0)
    service = client.app.service
    client.portal.call(service.canaries.follow, service.models, service.settings)
    service.admission.images = 1000
    monkeypatch.setattr(service.admission, "check_images", lambda *_: None)
    for _ in range(5):
        assert client.post("/predict", files={"image": ("a", GOOD)}).status_code == 200
    service.admission.images = 0
    assert [comparison.compared for comparison in service.canaries._comparisons.values()] == [0]
    for _ in range(5):
        assert client.post("/predict", files={"image": ("a", GOOD)}).status_code == 200
    answer_until(client, lambda: all(item.compared for item in service.canaries._comparisons.values()))


def test_models_are_loaded_and_unloaded(start, bundle, newer, tmp_path):
    client = start(("c", bundle, 1.0))
    old, new = Bundle.load(bundle).version, Bundle.load(newer).version
    load, unload = "/v2/repository/models/{}/load", "/v2/repository/models/{}/unload"
    index = [{"name": "c", "version": old, "state": "READY", "reason": ""}]
    assert client.post("/v2/repository/index").json() == index
    assert client.post(load.format("d"), json={"parameters": {"uri": newer}}).status_code == 200
    assert shares(client) == {"c": [1], "d": [1]}
    assert client.post("/predict?model=d", files={"image": ("a", GOOD)}).json()["model"] == new
    config = json.dumps({"uri": newer, "share": 0.25})
    assert client.post(load.format("c"), json={"parameters": {"config": config}}).status_code == 200
    assert shares(client) == {"c": [0.75, 0.25], "d": [1]}
    assert client.post(unload.format("d"), json={"parameters": {"unload_dependents": False}}).status_code == 200
    assert shares(client) == {"c": [0.75, 0.25]}
    refused = {
        (unload.format("d"), None): "There is no model 'd'; served are c.",
        (unload.format("c"), None): "c is the only model that is served: it cannot be unloaded.",
        (load.format("e"), None): "e is not served yet: give the uri of its bundle.",
        (load.format("c"), str(tmp_path / "none")): "none",
        (
            load.format("-"),
            bundle,
        ): "'-' cannot be a name: expected letters, digits, _, . and -, the first a letter or digit.",
    }
    for (path, uri), sentence in refused.items():
        response = client.post(path, json={"parameters": {"uri": uri}} if uri else None)
        assert (response.status_code, sentence in response.json()["error"]) == (400, True), response.json()
    response = client.post(load.format("c"), json={"parameters": {"share": 2}})
    assert (response.status_code, "share" in response.json()["error"]) == (400, True)
    assert shares(client) == {"c": [0.75, 0.25]}


def test_a_model_that_cannot_be_loaded_leaves_things_as_they_are(start, bundle, newer, monkeypatch):
    client = start(("c", bundle, 1.0))
    service = client.app.service

    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(service._load, "_load", fail)
    response = client.post("/v2/repository/models/c/load", json={"parameters": {"uri": newer}})
    assert (response.status_code, response.json()["error"]) == (400, "the disk is gone")
    monkeypatch.undo()
    answer_until(client, lambda: client.get("/metadata").json()["problem"] is None)
    assert shares(client) == {"c": [1]}


def test_a_problem_of_another_version_does_not_undo_a_change(start, bundle, newer, tmp_path):
    """The service has started without a canary of c, whose bundle is not there yet."""
    client = start(("c", bundle, 0.8), ("c", str(tmp_path / "late"), 0.2))
    assert "is not a bundle" in client.get("/metadata").json()["problem"]
    path = "/v2/repository/models/d"
    response = client.post(f"{path}/load", json={"parameters": {"uri": newer}})
    assert response.status_code == 200, response.json()
    assert shares(client) == {"c": [1], "d": [1]}
    assert "is not a bundle" in client.get("/metadata").json()["problem"]
    assert client.post(f"{path}/unload").status_code == 200
    assert shares(client) == {"c": [1]}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"shadow_share": 1.5}, "--shadow-share 1.5 is not from 0 to 1"),
        ({"promote_after": 0}, "--promote-after 0 is not at least 1"),
        ({"rollback_on": {}}, "--rollback-on: expected limits of errors, latency, agreement"),
        ({"rollback_on": {"accuracy": 0.5}}, "--rollback-on: expected limits of errors, latency, agreement"),
        ({"rollback_on": {"latency": 0.5}}, "--rollback-on: latency is 0.5, and must be at least 1"),
        ({"rollback_on": {"agreement": 95}}, "--rollback-on: agreement is 95, and must be from 0 to 1"),
        ({"rollback_on": {"agreement": 0.9}, "shadow_share": 0}, "--rollback-on: agreement needs images to compare"),
    ],
)
def test_wrong_flags_get_a_sentence(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        ServeConfig(bundle="/b", **flags)


def test_images_are_compared_where_a_verdict_is_acted_on():
    assert ServeConfig(bundle="/b").settings.shadow_share == 0
    assert ServeConfig(bundle="/b", promote_after=1000).settings.shadow_share == 0.1
    assert ServeConfig(bundle="/b", rollback_on={"errors": 0.1}).settings.shadow_share == 0.1
    assert ServeConfig(bundle="/b", promote_after=1000, shadow_share=0).settings.shadow_share == 0


def test_a_load_that_its_client_does_not_wait_for_is_undone_too(start, bundle, newer, monkeypatch):
    client = start(("c", bundle, 1.0))
    service = client.app.service
    monkeypatch.setattr(repository, "_CHANGE_SECONDS", 0.3)
    loading = threading.Event()

    def wait(*_):
        loading.set()
        time.sleep(1.0)
        raise OSError("the disk is gone")

    monkeypatch.setattr(service._load, "_load", wait)
    response = client.post("/v2/repository/models/c/load", json={"parameters": {"uri": newer}})
    assert (response.status_code, "not loaded after" in response.json()["error"]) == (503, True)
    assert loading.is_set()
    monkeypatch.undo()
    answer_until(client, lambda: client.get("/metadata").json()["problem"] is None)
    assert shares(client) == {"c": [1]}


def test_a_canary_in_the_place_of_the_version_before_it_is_refused(start, bundle, newer, tmp_path):
    place = str(shutil.copytree(bundle, tmp_path / "place"))
    client = start(("c", place, 1.0))
    bundles.replace(place, newer)  # another training into the same place
    response = client.post("/v2/repository/models/c/load", json={"parameters": {"share": 0.1}})
    assert (response.status_code, "at another path" in response.json()["error"]) == (400, True)
    assert client.post("/v2/repository/models/c/load").status_code == 200
    assert client.get("/metadata").json()["models"]["c"][0]["version"] == Bundle.load(newer).version


class Controller:
    """Stands for Serve's controller, with two applications."""

    def __init__(self, settings):
        self._settings, self.schema = settings, None

    def _details(self):
        ours = {
            "name": "pets", "route_prefix": "/pets", "import_path": "cnnray.serving.deployment:app",
            "deployments": [{"name": "Classifier", "user_config": self._settings.as_dict()}],
        }  # fmt: skip
        other = {"name": "other", "route_prefix": "/", "import_path": "other:app"}
        return {
            "applications": {
                "pets": {"deployed_app_config": ours}, "other": {"deployed_app_config": other},
                "by hand": {"deployed_app_config": None},
            },
            "target_capacity": 50.0,
        }  # fmt: skip

    def __getattr__(self, name):
        def keep(schema):
            self.schema = schema

        method = self._details if name == "get_serve_instance_details" else keep
        return types.SimpleNamespace(remote=method)


def test_serve_gets_the_settings_of_this_application_and_keeps_the_others(monkeypatch):
    controller = Controller(CANARY)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ServedSettings, "_controller", staticmethod(lambda: controller))
    store = ServedSettings("pets", "Classifier")
    assert store.read() == CANARY
    decided = releases.carry_out(CANARY, RELEASE, Verdict(action=PROMOTE, reason="so"))
    store.write(CANARY, decided)
    ours, other = controller.schema.applications
    assert (ours.name, other.name, controller.schema.target_capacity) == ("pets", "other", 50.0)
    assert Settings.from_dict(ours.deployments[0].user_config) == decided
    controller.schema = None
    with pytest.raises(ChangeError, match="at the same time"):
        store.write(decided, CANARY)
    assert controller.schema is None
