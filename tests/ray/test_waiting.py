"""Jobs that begin while others hold the cluster."""

import logging
import threading
import time

import pytest
import ray

from cnnray import cluster, waiting
from cnnray.cluster import ClusterError


@pytest.fixture
def others(monkeypatch):
    """Another job holds three of four CPUs; gives the actor that does."""
    monkeypatch.setattr(cluster, "is_own", lambda: False)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.2)

    class Other:
        def ready(self):
            pass

    other = ray.remote(num_cpus=3)(Other).remote()
    ray.get(other.ready.remote())
    yield other
    ray.kill(other)


def _wait(cpus, minutes):
    waiting.wait_for_room([{"CPU": cpus, "GPU": 0.0}, {"CPU": 0.5}], minutes)


def test_a_job_that_other_jobs_leave_no_room_for_ends_with_a_sentence(others):
    with pytest.raises(ClusterError) as raised:
        _wait(1, 0.02)
    assert str(raised.value) == (
        "The job begins with 1.5 CPUs and 0 GPUs, and other jobs leave 1 of the cluster's 4 CPUs and 0 of its 0 "
        "GPUs: end them, or give --wait-minutes. (Waited 0.02 minutes for room.)"
    )
    _wait(0.5, 0)  # nothing is left of what it asked for


def test_a_job_begins_once_other_jobs_leave_room(others, caplog):
    caplog.set_level(logging.INFO)
    end = threading.Timer(1.0, ray.kill, [others])
    end.start()
    started = time.monotonic()
    _wait(3, None)
    assert 1 < time.monotonic() - started < 60
    first, last = [record.message for record in caplog.records if record.name == "cnnray.waiting"]
    assert first.startswith("waiting for room, at most 10m00s: The job begins with 3.5 CPUs")
    assert last.startswith("there is room, after ")


def test_on_its_own_ray_a_job_asks_for_nothing(others, monkeypatch):
    monkeypatch.setattr(cluster, "is_own", lambda: True)
    _wait(5, 0)
