"""The wait for a service's replicas, with an imitation of Serve."""

import functools
import io
import json
import types
import urllib.request

import pytest

from cnnray import cluster, waiting
from cnnray.cluster import ClusterError, Node, Resources
from cnnray.serving import rollout
from cnnray.serving.config import ServeConfig
from cnnray.serving.keys import API_KEY
from cnnray.serving.rollout import ServingError, wait_until_served

VERSIONS = {"model": [("1", "a", 1.0)]}


class Serve:
    """Reports these replicas, (state, node), again and again; time passes by a second with each report."""

    def __init__(self, status, *replicas, free=0.0, served=VERSIONS, key=None, direct=True):
        self.now, self._free, self._key = 0.0, free, key
        self.metadata = served and {
            "models": {
                name: [{"version": version, "digest": digest, "share": share} for version, digest, share in versions]
                for name, versions in served.items()
            },
            "problem": None,
            "direct": direct,
        }
        self._details = {
            "status": status,
            "deployments": {
                "Classifier": {
                    "replicas": [
                        {"state": state, "node_id": node, "replica_id": str(number)}
                        for number, (state, node) in enumerate(replicas)
                    ]
                }
            },
        }

    def get_serve_details(self):
        self.now += 1.0
        assert self.now < 1000, "the wait has no end"
        return {"applications": {"cnnray": self._details} if self._details["status"] else {}}

    def wait(self, monkeypatch, replaced=(), **flags):
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(rollout, "time", clock)
        monkeypatch.setattr(waiting, "Shortage", functools.partial(waiting.Shortage, clock=clock.monotonic))
        monkeypatch.setattr(
            rollout, "_fetch_metadata", lambda _, key: self.metadata if self._key in (None, key) else None
        )
        total = Resources((Node(cpus=4.0),))
        monkeypatch.setattr(cluster, "resources", lambda: total)
        monkeypatch.setattr(cluster, "free_resources", lambda: Resources((Node(cpus=self._free),)))
        never = types.SimpleNamespace(wait=lambda seconds: False)
        return wait_until_served(
            self, "http://127.0.0.1:8000", ServeConfig(bundle="/b", **flags), VERSIONS, never, replaced
        )


RUNNING, UNPLACED = ("RUNNING", "node"), ("STARTING", None)


def test_it_ends_when_all_replicas_report_the_versions(monkeypatch):
    serve = Serve("RUNNING", RUNNING, RUNNING)
    assert serve.wait(monkeypatch, min_replicas=2) == 2
    assert serve.now < 10


def test_requests_that_go_through_rays_wrapper_are_said(monkeypatch, caplog):
    Serve("RUNNING", RUNNING).wait(monkeypatch)
    assert not caplog.messages
    Serve("RUNNING", RUNNING, direct=False).wait(monkeypatch)
    (message,) = caplog.messages
    assert "through Ray's wrapper" in message
    assert "set RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in message


def test_replicas_that_are_replaced_are_not_the_service(monkeypatch):
    serve = Serve("DEPLOYING", RUNNING, UNPLACED, free=1.0)
    with pytest.raises(AssertionError, match="no end"):  # the new one's environment may take minutes to be built
        serve.wait(monkeypatch, replaced=["0"])
    with pytest.raises(ClusterError, match="1 of 1 replicas have no room"):
        Serve("DEPLOYING", RUNNING, UNPLACED).wait(monkeypatch, replaced=["0"])
    with pytest.raises(AssertionError, match="no end"):  # the old one still holds the room
        Serve("DEPLOYING", ("STOPPING", "node"), UNPLACED).wait(monkeypatch, replaced=["0"])
    assert Serve("RUNNING", RUNNING, RUNNING).wait(monkeypatch, replaced=["0"]) == 1


def test_a_service_that_answers_without_the_key_that_is_set_is_refused(monkeypatch):
    monkeypatch.setenv(API_KEY, "secret")
    with pytest.raises(
        ServingError, match=r"^The service answers requests without an API key, because CNNRAY_API_KEY"
    ):
        Serve("RUNNING", RUNNING).wait(monkeypatch)
    assert Serve("RUNNING", RUNNING, key="secret").wait(monkeypatch) == 1
    with pytest.raises(ServingError, match="answers requests without an API key"):  # autoscaling wants more than fits
        Serve("DEPLOYING", RUNNING, UNPLACED).wait(monkeypatch)
    # One of before, which needs no key, still runs.
    with pytest.raises(AssertionError, match="no end"):
        Serve("DEPLOYING", RUNNING, ("STOPPING", "node"), free=1.0).wait(monkeypatch, replaced=["1"])


def test_the_shares_of_a_canary_that_was_decided_about_are_not_waited_for(monkeypatch):
    def report(verdict, *shares):
        versions = [
            {"version": str(number), "digest": "a", "share": share, "verdict": verdict}
            for number, share in enumerate(shares)
        ]
        answer = io.BytesIO(json.dumps({"models": {"c": versions}, "problem": None}).encode())
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: answer)
        return rollout._versions(rollout._fetch_metadata("http://127.0.0.1:1", None), wanted)

    wanted = {"c": [("0", "a", 0.9), ("1", "a", 0.1)]}
    assert report(None, 0.9, 0.1) == wanted
    assert report("wait: 3 images", 0.5, 0.5) != wanted
    assert report("promoted: it is good", 0.0, 1.0) == wanted
    assert report("promoted: it is good", 0.0, 0.0, 1.0) != wanted


def test_replicas_for_which_others_leave_no_room_end_it(monkeypatch):
    serve = Serve("DEPLOYING", RUNNING, UNPLACED, free=0.5)
    with pytest.raises(ClusterError, match=r"^1 of 2 replicas have no room: .* 0\.5 of the cluster's 4 CPUs .* free"):
        serve.wait(monkeypatch, min_replicas=2)
    assert 30 < serve.now < 60
    # Scaled to zero, and there is no room for the first request's replica.
    with pytest.raises(ClusterError, match=r"^1 of 1 replicas have no room"):
        Serve("RUNNING", UNPLACED, served=None).wait(monkeypatch, min_replicas=0)


def test_wait_minutes_is_how_long_it_waits_for_room(monkeypatch):
    serve = Serve("DEPLOYING", UNPLACED)
    with pytest.raises(ClusterError, match=r"Waited 2 minutes"):
        serve.wait(monkeypatch, wait_minutes=2)
    assert 150 <= serve.now < 170


def test_a_replica_whose_process_starts_slowly_is_waited_for(monkeypatch):
    serve = Serve("DEPLOYING", UNPLACED, free=1.0)
    with pytest.raises(AssertionError, match="has no end"):
        serve.wait(monkeypatch)
    # While one that drains holds the room for its successor, there is no shortage.
    with pytest.raises(AssertionError, match="has no end"):
        Serve("DEPLOYING", ("STOPPING", "node"), UNPLACED).wait(monkeypatch)


def test_more_replicas_than_the_smallest_number_are_not_waited_for(monkeypatch):
    serve = Serve("DEPLOYING", RUNNING, UNPLACED)
    assert serve.wait(monkeypatch) == 1
    assert serve.now < 60


@pytest.mark.parametrize("other", [("0", "a", 1.0), ("1", "b", 1.0)], ids=["model", "export"])
@pytest.mark.parametrize("status", ["RUNNING", None, "DELETING"])
def test_a_service_that_does_not_report_the_models_is_not_waited_for(status, other, monkeypatch):
    serve = Serve(status, *([RUNNING] if status == "RUNNING" else []), served={"model": [other]})
    with pytest.raises(ServingError, match=f"has not reported the new models .* is {status or 'not there'}"):
        serve.wait(monkeypatch)
    assert 120 < serve.now < 130


def test_a_service_that_cannot_start_ends_it(monkeypatch):
    serve = Serve("DEPLOY_FAILED")
    serve._details["message"] = "Traceback ...\nBundleError: /b is not a bundle."
    with pytest.raises(ServingError, match=r"does not start: BundleError: /b is not a bundle\."):
        serve.wait(monkeypatch)
