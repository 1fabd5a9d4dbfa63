"""Waiting for nodes: what is said, what is asked for, and when it ends."""

import logging
import threading
import time

import pytest
import ray.autoscaler.sdk

from cnnray import cluster
from cnnray.cluster import ClusterError, Node, Resources, Shortage
from cnnray.training.job import interruptible


@pytest.fixture
def growing(monkeypatch):
    """A cluster that has a node more at each look, up to 3; gives the bundles that were asked for."""
    looks, asked = [], []

    def resources():
        looks.append(1)
        return Resources((Node(cpus=2),) * min(len(looks), 3))

    monkeypatch.setattr(cluster, "resources", resources)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
    return asked


def _needing(cpus):
    def plan(found):
        if found.cpus < cpus:
            raise ClusterError(f"{found.cpus:g} CPUs are not {cpus}.")
        return found.cpus

    return plan


def test_a_job_that_fits_asks_for_nothing(growing):
    assert cluster.wait_for_resources(_needing(2), [{"CPU": 1.0}], 10) == 2
    assert growing == []


@pytest.mark.parametrize("minutes", [None, 0])
def test_without_minutes_a_job_does_not_wait(growing, minutes):
    with pytest.raises(ClusterError, match=r"^2 CPUs are not 6\.$"):
        cluster.wait_for_resources(_needing(6), [{"CPU": 1.0}], minutes)
    assert growing == []


def test_a_job_asks_again_and_again_until_it_fits_and_then_no_more(growing, caplog):
    caplog.set_level(logging.INFO)
    assert cluster.wait_for_resources(_needing(6), [{"CPU": 2.0, "GPU": 0.0}] * 3, 10) == 6
    assert growing == [[{"CPU": 2.0}] * 3, [{"CPU": 2.0}] * 3, []]
    said = [record.message for record in caplog.records]
    assert said[0] == "waiting for nodes, at most 10m00s: 2 CPUs are not 6."
    assert said[1].startswith("the nodes have come, after ")
    assert len(said) == 2


def test_waiting_ends_with_what_was_lacking(growing):
    with pytest.raises(ClusterError, match=r"^6 CPUs are not 8\. \(Waited 0\.002 minutes for nodes\.\)$"):
        cluster.wait_for_resources(_needing(8), [{"CPU": 1.0}], 0.002)
    assert growing[-1] == []


def test_a_shortage_is_said_every_minute_and_each_one_anew(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now, cpus = [0.0], [0.0]
    monkeypatch.setattr(cluster, "resources", lambda: Resources((Node(cpus=cpus[0]),)))
    shortage = Shortage(minutes=10, clock=lambda: now[0])
    for now[0] in range(0, 200, 5):
        shortage.try_plan(_needing(2))
    assert [record.message for record in caplog.records] == [
        f"waiting for nodes, at most {minutes}m00s: 0 CPUs are not 2." for minutes in (10, 9, 8, 7)
    ]
    cpus[0] = 2.0
    assert shortage.try_plan(_needing(2)) == 2
    cpus[0], now[0] = 0.0, 790.0
    assert shortage.try_plan(_needing(2)) is None  # ten minutes from now on
    now[0] = 1389.0
    shortage.try_plan(_needing(2))
    now[0] = 1390.0
    with pytest.raises(ClusterError, match="Waited 10 minutes"):
        shortage.try_plan(_needing(2))


def test_what_waits_for_lost_nodes_is_interrupted(growing):
    with pytest.raises(ClusterError, match="Waited"), cluster.watch(_needing(8), 0.001):
        time.sleep(30)
    with pytest.raises(KeyboardInterrupt), cluster.watch(_needing(2), None):
        raise KeyboardInterrupt
    with cluster.watch(_needing(2), 0):
        pass


def test_training_is_watched_while_it_runs(monkeypatch):
    ended = threading.Event()

    def shortage():
        raise ClusterError("2 workers do not fit.")

    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.05)
    with pytest.raises(ClusterError, match="2 workers do not fit"):
        interruptible(lambda: ended.wait(30), shortage)
    ended.set()
    assert interruptible(lambda: 5, shortage) == 5
    with pytest.raises(TimeoutError, match="its own"):
        interruptible(_times_out, shortage)


def _times_out():
    raise TimeoutError("its own")
