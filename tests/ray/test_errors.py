"""An error of a worker reaches the driver with its class and its message."""

from types import SimpleNamespace

import pytest
import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cnnray import cluster, training
from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.models.bundle import BundleError
from cnnray.training import job

ERRORS = [
    storage.ThrottledError("S3 asks for fewer requests."),
    storage.DeniedError("S3 denies access."),
    BundleError("x is not a bundle."),
    BadImage("corrupt", "it ends early"),
]


def _in_a_task(fail, folder):
    ray.get(ray.remote(num_cpus=0, max_retries=0)(fail).remote())


def _in_an_actors_method(fail, folder):
    class Actor:
        def call(self):
            fail()

    ray.get(ray.remote(num_cpus=0)(Actor).remote().call.remote())


def _in_an_actors_start(fail, folder):
    class Actor:
        def __init__(self):
            fail()

        def call(self):
            pass

    ray.get(ray.remote(num_cpus=0)(Actor).remote().call.remote())


def _in_a_dataset(fail, folder):
    ray.data.range(10).map_batches(lambda rows: fail(), num_cpus=0.25).materialize()


def _in_a_datasets_actor(fail, folder):
    class Actor:
        def __init__(self):
            fail()

        def __call__(self, rows):
            return rows

    ray.data.range(10).map_batches(Actor, num_cpus=0.25, concurrency=1).materialize()


def _on_a_training_worker(fail, folder):
    DataParallelTrainer(
        fail,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.25}),
        run_config=ray.train.RunConfig(storage_path=folder),
    ).fit()


PLACES = [_in_a_task, _in_an_actors_method, _in_an_actors_start, _in_a_dataset, _in_a_datasets_actor]


@pytest.mark.parametrize(
    ("run", "error"), [(run, error) for run in PLACES for error in ERRORS] + [(_on_a_training_worker, ERRORS[0])]
)
def test_it_is_the_same_at_the_driver(run, error, tmp_path):
    def fail():
        raise error

    with pytest.raises(Exception) as raised:  # noqa: PT011 - Ray's, of many classes
        run(fail, str(tmp_path))
    received = cluster.user_error(raised.value)
    assert (type(received), str(received)) == (type(error), str(error))
    assert "in fail\n" in cluster.full_trace(raised.value)


def test_other_errors_are_not_the_users():
    def fail():
        raise ZeroDivisionError("division by zero")

    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        _in_a_task(fail, None)
    assert cluster.user_error(raised.value) is None
    assert cluster.last_line(raised.value) == "ZeroDivisionError: division by zero"


def test_the_trace_of_a_training_worker_is_whole(tmp_path):
    """Ray Train's own message has its first and its last 500 characters."""

    # Two functions in turn, because Python leaves out lines that repeat the one before.
    def left(depth):
        right(depth - 1)

    def right(depth):
        if depth > 0:
            left(depth - 1)
        raise ZeroDivisionError("division by zero")

    def train():
        job.startup.load_tensorflow = lambda **_: None
        training.worker = SimpleNamespace(run=lambda _: left(20))
        job.train_on_worker(SimpleNamespace(config=SimpleNamespace(gpus=0.0), network=None))

    with pytest.raises(ray.train.TrainingFailedError) as raised:
        _on_a_training_worker(train, str(tmp_path))
    trace = cluster.full_trace(raised.value)
    assert trace.count("in left\n") >= 10
    assert "in test_the_trace_of_a_training_worker_is_whole" in trace
    assert cluster.last_line(raised.value) == "ZeroDivisionError: division by zero"
