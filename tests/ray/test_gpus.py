"""What runs on GPUs. A node that says that it has one stands in for it: Ray hands it out, TensorFlow finds none."""

import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from cnnray import cluster
from cnnray.cluster import free_port
from cnnray.models import startup
from cnnray.prediction import job
from cnnray.prediction.config import PredictConfig
from cnnray.training.config import TrainConfig
from cnnray.training.job import train
from cnnray.training.output import TrainingError
from tests.e2e.conftest import kill, until
from tests.runs import read_rows

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module", autouse=True)
def node():
    """A second node of the cluster, with a GPU.

    In a folder of its own: `ray start` writes down the address of its cluster, to which `ray.init()` of others then
    connects. Not pytest's folder: Ray puts sockets into it, whose paths may have at most 107 characters.
    """
    folder = tempfile.mkdtemp(prefix="r")
    address = ray.get_runtime_context().gcs_address
    command = [
        RAY, "start", "--block", f"--address={address}", "--num-cpus=3", "--num-gpus=1", "--disable-usage-stats",
        f"--object-store-memory={2**28}", f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        until(lambda: cluster.resources().gpus == 1, 60, "the second node")
        yield
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        kill(alive)
    shutil.rmtree(folder, ignore_errors=True)
    until(lambda: not cluster.resources().gpus, 60, "the end of the second node")


@pytest.mark.parametrize("options", [{"decoding": "workers"}, {"decoding": "tasks"}, {"rows_per_part": 7}])
def test_predictions_on_a_gpu_are_those_without(options, onnx_bundle, digits, tmp_path):
    config = {"bundle": onnx_bundle, "input": str(digits), "rows_per_part": 64, "max_workers": 1} | options
    on_gpu = job.run(PredictConfig(**config, output=str(tmp_path / "gpu")))
    without = job.run(PredictConfig(**config, output=str(tmp_path / "cpu"), engine="keras", gpus_per_worker=0))
    assert on_gpu["engine"] == without["engine"] == "keras"  # auto is keras where there are GPUs
    for row, wanted in zip(*(read_rows(tmp_path / name) for name in ("gpu", "cpu")), strict=True):
        np.testing.assert_allclose(row.pop("top_k_scores"), wanted.pop("top_k_scores"), atol=1e-5)
        assert row.pop("confidence") == pytest.approx(wanted.pop("confidence"), abs=1e-5)
        assert row == wanted


def test_a_worker_of_training_has_a_gpu_that_tensorflow_must_find(digits, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = TrainConfig(
        data=str(digits), output=str(tmp_path / "gpus"), architecture="small_cnn", image_size=16, epochs=1,
        max_workers=1, gpus_per_worker=1, data_checks=False,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"TensorFlow finds 0 GPU\(s\) on a worker that was to have 1: NVIDIA's"):
        train(config)
    assert "workers: 1, each of 1 GPU and 1 CPU(s) (1 thread(s)), computing in float32;" in caplog.text
    if not startup.is_built_for_gpus():
        assert train(replace(config, gpus_per_worker=None, output=str(tmp_path / "cpus")))["epochs"] == 1
        assert "1 GPUs, which this TensorFlow cannot use: install requirements-gpu.lock" in caplog.text
