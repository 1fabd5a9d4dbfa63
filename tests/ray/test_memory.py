"""Workers whose memory is too small for their images: they take half as many at once, as often as it is needed."""

import json
import sys

import pytest
import ray.cloudpickle

from cnnray.training import job
from cnnray.training.config import TrainConfig
from cnnray.training.job import train
from cnnray.training.output import IMAGES_PER_WORKER, TrainingError


@pytest.fixture(autouse=True)
def _pickled_by_value():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def _train_with_memory_for(images, assignment):
    """Run the training loop, in which TensorFlow cannot allocate memory for more than so many images on rank 1."""
    from cnnray.models import startup

    startup.load_tensorflow(gpus=False)
    import ray.train
    import tensorflow as tf

    from cnnray.training import step, worker

    def gradients(self, batch, *others, original=step.Steps._gradients):
        count = tf.shape(batch, tf.int64)[0]
        with tf.control_dependencies([tf.random.uniform([tf.where(count > images, 2**40, count)])]):
            return original(self, tf.identity(batch), *others)

    if ray.train.get_context().get_world_rank() == 1:
        step.Steps._gradients = gradients
    return worker.run(assignment)


def _config(digits, output, **changes):
    defaults = {
        "architecture": "small_cnn", "image_size": 16, "epochs": 1, "batch_size": 32, "max_workers": 2,
        "cpus_per_worker": 0.5, "data_checks": False, "max_failures": 0,
    }  # fmt: skip
    return TrainConfig(data=str(digits), output=str(output), **defaults | changes)


def test_a_run_goes_on_with_half_as_many_images_at_once(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "train_on_worker", lambda assignment: _train_with_memory_for(4, assignment))
    assert train(_config(digits, tmp_path))["epochs"] == 1
    assert (tmp_path / IMAGES_PER_WORKER).read_text() == "4"
    # A run that begins anew tries all again.
    monkeypatch.undo()
    train(_config(digits, tmp_path, overwrite=True))
    assert not (tmp_path / IMAGES_PER_WORKER).exists()


def test_a_single_image_that_does_not_fit_ends_the_run(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "train_on_worker", lambda assignment: _train_with_memory_for(0, assignment))
    with pytest.raises(TrainingError, match=r"out of memory with a single image at once: .* smaller --image-size"):
        train(_config(digits, tmp_path, images_per_worker=2, max_failures=3))
    assert json.loads((tmp_path / IMAGES_PER_WORKER).read_text()) == 1
    assert not (tmp_path / "bundle").exists()
