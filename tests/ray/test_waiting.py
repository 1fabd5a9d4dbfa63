"""Jobs that begin while others hold the cluster."""

import contextlib
import logging
import signal
import threading
import time

import pytest
import ray

from cnnray import cluster, waiting
from cnnray.cluster import ClusterError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.data_checks import check_data
from cnnray.prediction import job
from cnnray.prediction.config import PredictConfig
from cnnray.training.config import TrainConfig
from cnnray.training.job import train
from tests.runs import read_rows


class Other:
    def ready(self):
        pass


@contextlib.contextmanager
def _holding(cpus):
    """An actor of another job that holds so many CPUs."""
    other = ray.remote(num_cpus=cpus)(Other).remote()
    ray.get(other.ready.remote())
    try:
        yield other
    finally:
        ray.kill(other)


@pytest.fixture
def others(monkeypatch):
    """Another job holds three of four CPUs; gives the actor that does."""
    monkeypatch.setattr(cluster, "is_own", lambda: False)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.2)
    with _holding(3) as other:
        yield other


def _wait(cpus, minutes):
    waiting.wait_for_room([{"CPU": cpus, "GPU": 0.0}, {"CPU": 0.5}, {"CPU": 0.0}], minutes)


def _free_cpus():
    return cluster.free_resources().cpus


def test_a_job_that_other_jobs_leave_no_room_for_ends_with_a_sentence(others):
    with pytest.raises(ClusterError) as raised:
        _wait(1, 0.02)
    assert str(raised.value) == (
        "Other jobs leave 1 of the cluster's 4 CPUs and 0 of its 0 GPUs, and this job begins with 2 process(es), of "
        "up to 1 CPUs and 0 GPUs on one node: end them, or give --wait-minutes. (Waited 0.02 minutes for room.)"
    )


def test_a_job_begins_once_other_jobs_leave_room(others, caplog):
    caplog.set_level(logging.INFO)
    threading.Timer(1.0, ray.kill, [others]).start()
    started = time.monotonic()
    _wait(3, None)
    assert 1 < time.monotonic() - started < 60
    first, last = [record.message for record in caplog.records if record.name == "cnnray.waiting"]
    assert first.startswith("waiting for room, at most 10m00s: Other jobs leave 1 of the cluster's 4 CPUs")
    assert last.startswith("there is room, after ")
    while _free_cpus() < 4:  # what it asked for is given back, after a moment
        time.sleep(0.1)


def test_on_its_own_ray_a_job_asks_for_nothing(others, monkeypatch):
    monkeypatch.setattr(cluster, "is_own", lambda: True)
    _wait(5, 0)


def test_the_wait_hears_a_signal_at_once(others, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(waiting, "POLL_SECONDS", 60.0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            _wait(3, None)
        assert time.monotonic() - started < 2.5  # Ray kills a job three seconds after it has asked it to end
    finally:
        signal.signal(signal.SIGALRM, before)


def test_workers_without_a_node_are_noticed_and_those_that_have_one_are_not(others):
    now = [0.0]
    placements = {
        name: waiting.Placement(name, [{"CPU": cpus, "GPU": 0.0}], clock=lambda: now[0])
        for name, cpus in {"Other": 2, "Nobody": 2, "Small": 1}.items()
    }
    for now[0] in (0.0, 29.0):
        for placement in placements.values():
            placement.check(cluster.resources())
    now[0] = 31.0
    placements["Other"].check(cluster.resources())
    placements["Small"].check(cluster.resources())  # there is room: it is starting
    with pytest.raises(ClusterError, match=r"^Other jobs leave 1 of the cluster's 4 CPUs"):
        placements["Nobody"].check(cluster.resources())


def test_prediction_waits_before_it_replaces_anything(others, onnx_bundle, digits, tmp_path, monkeypatch):
    has_actor, seen = cluster.has_actor, set()
    monkeypatch.setattr(cluster, "has_actor", lambda name: seen.add(has_actor(name)))
    config = {"bundle": str(onnx_bundle), "input": str(digits), "output": str(tmp_path / "out")}
    job.run(PredictConfig(**config, cpus_per_worker=1))
    assert True in seen  # its worker has room
    with pytest.raises(ClusterError, match="of up to 2 CPUs"):
        job.run(PredictConfig(**config, cpus_per_worker=2, overwrite=True, wait_minutes=0.01))
    assert len(read_rows(tmp_path / "out")) == 200
    with pytest.raises(ClusterError, match="of up to 1 CPUs"):
        job.run(PredictConfig(**config, cpus_per_worker=1, decoding="tasks", overwrite=True, wait_minutes=0.01))


def test_training_waits_before_it_writes_anything(others, digits, tmp_path):
    with pytest.raises(ClusterError, match=r"begins with 3 process\(es\), of up to 1 CPUs"):
        train(
            TrainConfig(
                data=str(digits), output=str(tmp_path / "out"), architecture="small_cnn", image_size=16,
                max_workers=2, cpus_per_worker=1.0, wait_minutes=0.01,
            )
        )  # fmt: skip
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_check_of_data_waits(others, digits):
    with _holding(1), pytest.raises(ClusterError, match=r"^Other jobs leave 0 of the cluster's 4 CPUs"):
        check_data(EvaluateConfig(data=str(digits), check_data=True, wait_minutes=0.02))
