"""What an MLflow server receives from a run, with MLflow's own store in a folder."""

import csv
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from cnnray import configs
from cnnray.images.decode import BadImage
from cnnray.models.bundle import Bundle
from cnnray.models.mlflow_flavor import BUNDLE_TAG
from cnnray.models.predictor import Predictor
from cnnray.tracking import mlflow as tracking
from cnnray.tracking.mlflow import TrackingError
from cnnray.training.config import TrainConfig
from cnnray.training.job import make_tracker, train
from cnnray.tuning.job import make_tracker as make_search_tracker
from tests.awkward import awkward_images
from tests.configs import decided

pytest.importorskip("mlflow")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    for name in tracking._VARIABLES:
        monkeypatch.setenv(name, tracking._VARIABLES[name])
    monkeypatch.setattr(tracking, "_WAITS", (0.01, 0.01))
    return str(tmp_path / "store")


@pytest.fixture
def run(tmp_path, store):
    """The config of a run, and a function that writes its history up to an epoch and returns its summary."""
    output = tmp_path / "runs" / "digits"
    (output / "bundle").mkdir(parents=True)
    metrics = {"val_loss": 1 / 3, "val_accuracy": 0.8}
    info = {"format_version": 1, "class_names": ["a", "b"], "image_size": 16, "metrics": metrics}
    (output / "bundle" / "bundle.json").write_text(json.dumps(info))
    (output / "bundle" / "model.keras").write_bytes(b"weights")

    def write_epochs(epochs):
        with (output / "history.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "phase", "loss", *metrics, "learning_rate"])
            writer.writerows([epoch, "all", 1 / epoch, *metrics.values(), 0.001] for epoch in range(1, epochs + 1))
        return {"bundle": str(output / "bundle"), "epochs": epochs, "metrics": metrics}

    return decided(output=str(output), architecture="vgg_bn", mlflow=store), write_epochs


def _runs(store):
    import mlflow

    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("cnnray")
    return client, client.search_runs([experiment.experiment_id])


def _steps(client, run, name="loss"):
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


def test_a_resumed_run_is_one_run_without_repeated_points(run, store):
    config, write_epochs = run
    write_epochs(1)

    def interrupted():
        with make_tracker(config).following():
            time.sleep(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    client, (tracked,) = _runs(store)
    assert tracked.info.status == "KILLED"
    assert tracked.data.params["architecture"] == "vgg_bn"
    assert tracked.data.params["learning_rate"] == "0.003"  # the value that null resolves to
    assert tracked.data.params["augmentations.rotation"] == "null"
    assert not [name for name in tracked.data.params if "mlflow" in name]
    assert _steps(client, tracked) == [1]

    summary = write_epochs(3)
    for _ in range(2):  # the second time, the server has everything
        tracker = make_tracker(replace(config, max_workers=4))
        with tracker.following():
            pass
        tracker.finish(summary)
    client, (tracked,) = _runs(store)
    assert tracked.info.status == "FINISHED"
    for name in ("loss", "val_loss", "learning_rate"):
        assert _steps(client, tracked, name) == [1, 2, 3]
    assert [metric.value for metric in client.get_metric_history(tracked.info.run_id, "loss")] == [1, 1 / 2, 1 / 3]
    assert tracked.data.metrics["best_val_accuracy"] == 0.8
    assert (tracked.data.params["max_workers"], tracked.data.tags["now.max_workers"]) == ("1", "4")
    (version,) = client.search_model_versions("name = 'cnnray'")
    assert version.run_id == tracked.info.run_id
    assert version.tags[BUNDLE_TAG].startswith("model-")


def test_a_server_that_is_unreachable_for_a_while_misses_nothing(run, store, monkeypatch, caplog):
    config, write_epochs = run
    monkeypatch.setattr(tracking, "_LOOK_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    tracker = make_tracker(config)
    tracker.reach()
    write_epochs(1)
    log_batch = tracker._client.log_batch
    lost = []

    def log_batch_or_fail(*arguments, metrics=(), **options):
        if metrics and len(lost) < 3:
            lost.append(metrics)
            if len(lost) == 2:  # the request arrives, but its answer is lost
                log_batch(*arguments, metrics=metrics, **options)
            raise OSError(111, "Connection refused")
        log_batch(*arguments, metrics=metrics, **options)

    monkeypatch.setattr(tracker._client, "log_batch", log_batch_or_fail)
    with tracker.following():
        time.sleep(0.5)
        write_epochs(2)
        time.sleep(1.5)
    assert len(lost) == 3
    client, (tracked,) = _runs(store)
    assert _steps(client, tracked) == [1, 2]
    # The first two failures follow one another; a single failure, as the third, is not logged.
    assert caplog.text.count("cannot be reached (Connection refused)") == 1
    assert caplog.text.count("answers again") == 1


def test_requests_whose_answer_was_lost_are_not_sent_twice(run, store, monkeypatch):
    import mlflow
    from mlflow.tracking._model_registry.client import ModelRegistryClient

    lost = []

    def lose_first_answer(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            answer = original(*arguments, **options)
            if name not in lost:
                lost.append(name)
                raise OSError(104, "Connection reset by peer")
            return answer

        monkeypatch.setattr(owner, name, call)

    lose_first_answer(mlflow.MlflowClient, "create_run")
    lose_first_answer(mlflow.MlflowClient, "log_batch")
    lose_first_answer(ModelRegistryClient, "create_model_version")
    config, write_epochs = run
    monkeypatch.setattr(tracking, "_WAITS", (0.01,) * 4)
    make_tracker(config).finish(write_epochs(2))
    assert sorted(lost) == ["create_model_version", "create_run", "log_batch"]
    client, (tracked,) = _runs(store)
    assert tracked.info.status == "FINISHED"
    assert _steps(client, tracked) == [1, 2]
    assert len(client.search_model_versions("name = 'cnnray'")) == 1


def test_what_could_not_be_sent_is_logged_and_sent_by_the_same_command(run, store, monkeypatch, caplog):
    config, write_epochs = run
    tracker = make_tracker(config)
    tracker.reach()
    write_epochs(1)
    with tracker.following():
        time.sleep(0.3)
    summary = write_epochs(3)

    def refuse(*_, **__):
        raise OSError(111, "Connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_batch", refuse)
        tracker.finish(summary)
    assert "lacks epochs 2 to 3 and the end of the run (Connection refused)" in caplog.text
    make_tracker(config).finish(summary)
    client, (tracked,) = _runs(store)
    assert _steps(client, tracked) == [1, 2, 3]
    assert len(client.search_model_versions("name = 'cnnray'")) == 1


def test_more_epochs_make_a_new_version_and_another_server_a_new_run(run, store, tmp_path):
    config, write_epochs = run
    make_tracker(config).finish(write_epochs(1))
    (tmp_path / "runs" / "digits" / "bundle" / "model.keras").write_bytes(b"other weights")
    make_tracker(replace(config, mlflow_model="classifier")).finish(write_epochs(2))
    client, (tracked,) = _runs(store)
    assert _steps(client, tracked) == [1, 2]
    versions = client.search_model_versions(f"run_id = '{tracked.info.run_id}'")
    assert {version.name for version in versions} == {"cnnray", "classifier"}
    other = str(tmp_path / "other")
    make_tracker(replace(config, mlflow=other)).finish(write_epochs(2))
    client, (tracked,) = _runs(other)
    assert _steps(client, tracked) == [1, 2]


def test_a_search_is_a_run_with_its_trials_as_children(run, store, tmp_path):
    config, write_epochs = run
    search = replace(config, output=str(tmp_path / "search"))
    tracker = make_search_tracker(search)
    write_epochs(2)
    with tracker.following():
        for name in ("a", "b"):
            folder = tmp_path / "search" / "trials" / name
            shutil.copytree(tmp_path / "runs" / "digits", folder)
            trial = decided(output=str(folder), learning_rate=0.1)
            (folder / "config.yaml").write_text(yaml.safe_dump(configs.as_dict(trial)))
    tracker.finish_search({"a": "FINISHED", "b": "KILLED"}, {"val_accuracy": 0.8})
    client, runs = _runs(store)
    (parent,) = [trial for trial in runs if "mlflow.parentRunId" not in trial.data.tags]
    parent_id = parent.info.run_id
    trials = {trial.info.run_name: trial for trial in runs if trial.data.tags.get("mlflow.parentRunId") == parent_id}
    assert {name: trial.info.status for name, trial in trials.items()} == {
        "trials/a": "FINISHED",
        "trials/b": "KILLED",
    }
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"best_val_accuracy": 0.8})
    for trial in trials.values():
        assert _steps(client, trial) == [1, 2]
        assert trial.data.params["learning_rate"] == "0.1"
    make_search_tracker(search).finish_search({}, {"val_accuracy": 0.8})
    assert len(_runs(store)[1]) == 3
    assert _steps(client, parent, "best_val_accuracy") == [0]


def test_a_model_from_the_server_answers_as_the_bundle_does(run, store, onnx_bundle):
    import mlflow.pyfunc

    config, write_epochs = run
    make_tracker(config).finish(write_epochs(1) | {"bundle": onnx_bundle})
    images = [*awkward_images().values(), b"not an image"]
    answers = mlflow.pyfunc.load_model("models:/cnnray/1").predict(pd.DataFrame({"image": images}))
    for row, expected in zip(answers.to_dict("records"), Predictor(Bundle.load(onnx_bundle))(images), strict=True):
        if isinstance(expected, BadImage):
            assert row["error"] == str(expected)
            assert pd.isna(row["prediction"])
        else:
            assert row["prediction"] == expected.label
            assert pd.isna(row["error"])
            np.testing.assert_array_equal(np.float32(row["probabilities"]), expected.probabilities)


def test_mistakes_get_a_sentence_before_anything_is_written(digits, tmp_path, monkeypatch):
    for name in tracking._VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    config = TrainConfig(data=str(digits), output=str(tmp_path / "out"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError, match=f"No MLflow server at {address}: Connection refused"):
            train(replace(config, mlflow=address))
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert time.monotonic() - started < 60  # MLflow's own retries would take four minutes
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        replace(config, mlflow="https://me:secret@mlflow.example")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackingError, match="pip install 'mlflow-skinny>=3'"):
        train(replace(config, mlflow=address))
    assert not (tmp_path / "out").exists()


def test_without_the_flag_mlflow_is_not_loaded():
    program = (
        "import sys\nimport cnnray.training.job, cnnray.models.mlflow_flavor\nassert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
