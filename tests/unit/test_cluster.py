"""Waiting for nodes: log lines, requests to the autoscaler, and the end of the wait."""

import logging
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import ray.autoscaler.sdk
from ray._private import worker

from cnnray import cluster, waiting
from cnnray.cluster import ClusterError, Node, Resources
from cnnray.waiting import Shortage, in_background, interruptible


@pytest.fixture
def growing(monkeypatch):
    """A cluster that has one more node at each reading, up to 3; returns the requests to the autoscaler."""
    readings, requests = [], []

    def resources():
        readings.append(1)
        return Resources((Node(cpus=2),) * min(len(readings), 3))

    monkeypatch.setattr(cluster, "resources", resources)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: requests.append(bundles))
    return requests


def _needing(cpus):
    def plan(available):
        if available.cpus < cpus:
            raise ClusterError(f"{available.cpus:g} CPUs are not {cpus}.")
        return available.cpus

    return plan


def test_a_job_that_fits_requests_nothing(growing):
    assert waiting.wait_for_resources(_needing(2), [{"CPU": 1.0}], 10) == 2
    assert growing == []


@pytest.mark.parametrize("minutes", [None, 0])
def test_without_minutes_a_job_does_not_wait(growing, minutes):
    with pytest.raises(ClusterError, match=r"^2 CPUs are not 6\.$"):
        waiting.wait_for_resources(_needing(6), [{"CPU": 1.0}], minutes)
    assert growing == []


def test_a_job_repeats_its_request_until_it_fits_and_then_withdraws_it(growing, caplog):
    caplog.set_level(logging.INFO)
    assert waiting.wait_for_resources(_needing(6), [{"CPU": 2.0, "GPU": 0.0}] * 3, 10) == 6
    assert growing == [[{"CPU": 2.0}] * 3, [{"CPU": 2.0}] * 3, []]
    messages = [record.message for record in caplog.records]
    assert messages[0] == "waiting for room, at most 10m00s: 2 CPUs are not 6."
    assert messages[1].startswith("there is room, after ")
    assert len(messages) == 2


def test_the_wait_ends_with_an_error_that_says_what_is_missing(growing):
    with pytest.raises(ClusterError, match=r"^6 CPUs are not 8\. \(Waited 0\.002 minutes for room\.\)$"):
        waiting.wait_for_resources(_needing(8), [{"CPU": 1.0}], 0.002)
    assert growing[-1] == []


def test_a_shortage_is_logged_every_minute_and_each_has_its_own_limit(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now, cpus = [0.0], [0.0]
    monkeypatch.setattr(cluster, "resources", lambda: Resources((Node(cpus=cpus[0]),)))
    shortage = Shortage(minutes=10, clock=lambda: now[0])
    for now[0] in range(0, 200, 5):
        shortage.try_plan(_needing(2))
    assert [record.message for record in caplog.records] == [
        f"waiting for room, at most {minutes}m00s: 0 CPUs are not 2." for minutes in (10, 9, 8, 7)
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


def test_a_wait_for_lost_nodes_is_interrupted(growing):
    with pytest.raises(ClusterError, match="Waited"), waiting.watch(_needing(8), 0.001):
        time.sleep(30)
    with pytest.raises(KeyboardInterrupt), waiting.watch(_needing(2), None):
        raise KeyboardInterrupt
    with waiting.watch(_needing(2), 0):
        pass


def test_training_is_watched_while_it_runs(monkeypatch):
    ended = threading.Event()

    def shortage():
        raise ClusterError("2 workers do not fit.")

    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.05)
    with pytest.raises(ClusterError, match="2 workers do not fit"):
        interruptible(in_background(lambda: ended.wait(30)), shortage)
    ended.set()
    assert interruptible(in_background(lambda: 5), shortage) == 5
    with pytest.raises(TimeoutError, match="its own"):
        interruptible(in_background(_times_out), shortage)


def _times_out():
    raise TimeoutError("its own")


class _Process:
    """One of Ray's processes."""

    def __init__(self, exit_code=None):
        self.exit_code, self.killed = exit_code, threading.Event()

    def poll(self):
        return self.exit_code

    def kill(self):
        self.killed.set()


@pytest.fixture
def own_ray(monkeypatch):
    """A Ray that `connected` starts: its processes by name."""
    processes = {name: _Process() for name in ("gcs_server", "raylet", "log_monitor")}
    node = SimpleNamespace(all_processes={name: [SimpleNamespace(process=p)] for name, p in processes.items()})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # This process may be connected to the Ray of other tests.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(worker, "_global_node", None)
    monkeypatch.setattr(ray, "init", lambda **_: monkeypatch.setattr(worker, "_global_node", node))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "resources", lambda: Resources((Node(cpus=2),)))
    return processes


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_an_error_of_a_ray_that_has_died_says_so(name, own_ray):
    def job():
        with cluster.connected():
            own_ray[name].exit_code = -9
            raise ray.exceptions.RayError("pages")

    with pytest.raises(ClusterError, match=rf"Ray has died .*\({name}\).*the same command goes on") as raised:
        job()
    assert str(raised.value.__cause__) == "pages"


def test_an_error_of_a_ray_that_lives_stays_as_it_is(own_ray):
    def job():
        with cluster.connected():
            own_ray["log_monitor"].exit_code = 1
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        job()


def test_a_shutdown_that_hangs_ends_with_the_control_service(own_ray, monkeypatch):
    service = own_ray["gcs_server"]
    monkeypatch.setattr(ray, "shutdown", service.killed.wait)
    ray.init()
    started = time.monotonic()
    cluster.shut_down(0.2)
    assert service.killed.is_set()
    assert time.monotonic() - started < 5


def test_a_shutdown_that_hangs_for_ever_is_left(own_ray, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(ray, "shutdown", ended.wait)
    cluster.shut_down(0.2)  # of a cluster that this process has not started
    ended.set()


@pytest.mark.timeout(20)
def test_the_trace_of_errors_that_hold_each_other_has_an_end():
    of_worker, of_ray = ClusterError("the worker's"), RuntimeError("Ray's")
    of_ray.cause = of_worker
    of_worker.__cause__ = of_ray
    trace = cluster.full_trace(of_worker)
    assert "ClusterError: the worker's" in trace
    assert "RuntimeError: Ray's" in trace


def test_a_free_port_is_none_that_the_system_or_ray_gives_to_others(monkeypatch):
    port = cluster.free_port()
    assert 20_000 <= port < 30_000
    monkeypatch.setattr(cluster, "_PORTS", range(port, port + 1))
    with socket.socket() as listener:
        listener.bind(("", port))
        with pytest.raises(ClusterError, match=f"no port from {port} to {port} that is free"):
            cluster.free_port()
    assert cluster.free_port() == port
