"""What Ray Train's workers get before TensorFlow starts."""

import json
import os
import socket

import pytest

from cnnray import cluster
from tests.ray.workers import run_on_workers


def _sum_of_ranks(rank, world):
    import tensorflow as tf

    assert cluster.has_actor("RayTrainWorker")  # by which a job knows that its workers have room
    port = int(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][rank].rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    return float(strategy.reduce("SUM", strategy.run(lambda: tf.constant(float(rank + 1))), axis=None))


def test_no_other_program_gets_the_port_of_a_worker_before_tensorflow_does(tmp_path):
    assert run_on_workers(_sum_of_ranks, 2, tmp_path) == [3.0, 3.0]
