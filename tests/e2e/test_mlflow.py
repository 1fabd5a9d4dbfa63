"""jobs/train.py and jobs/tune.py with an MLflow server, which is installed in an environment of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import requests
import yaml

from cnnray.cluster import free_port
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from tests.e2e.conftest import survivors, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
FAST = (
    "--architecture", "small_cnn", "--image-size", "16", "--batch-size", "16", "--cache", "none",
    "--data-checks", "false", "--augment", "none", "--max-workers", "1",
)  # fmt: skip
UV = str(Path(sys.executable).with_name("uv"))


class Server:
    """`mlflow server` with a database and artifacts of its own."""

    def __init__(self, program, folder):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = [
            program, "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination", str(folder / "artifacts"),
        ]  # fmt: skip
        self._folder = folder
        self.start()

    def start(self):
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            )  # fmt: skip
        until(self._answers, 120, "MLflow")

    def _answers(self):
        try:
            return requests.get(f"{self.address}/health", timeout=2).ok
        except requests.RequestException:
            return False

    def stop(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, path, **parameters):
        """Call the server's REST API."""
        address = f"{self.address}/api/2.0/mlflow/{path}"
        post = path.endswith("runs/search")
        answer = requests.post(address, json=parameters) if post else requests.get(address, params=parameters)
        answer.raise_for_status()
        return answer.json()

    def runs(self, name):
        experiment = self.ask("experiments/get-by-name", experiment_name=name)["experiment"]["experiment_id"]
        return self.ask("runs/search", experiment_ids=[experiment]).get("runs", [])

    def points(self, run, key):
        """The step and the value of each point of a metric, sorted by step."""
        points = self.ask("metrics/get-history", run_id=run["info"]["run_id"], metric_key=key).get("metrics", [])
        return sorted((int(point["step"]), point["value"]) for point in points)

    def versions(self, name):
        return self.ask("model-versions/search", filter=f"name = '{name}'").get("model_versions", [])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The full MLflow package, in the version of the client that the jobs use."""
    from importlib.metadata import version

    folder = tmp_path_factory.mktemp("mlflow")
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")], check=True)
    subprocess.run(
        [UV, "pip", "install", "--quiet", "--python", str(folder / "venv/bin/python"),
         f"mlflow=={version('mlflow-skinny')}"],
        check=True,
    )  # fmt: skip
    server = Server(str(folder / "venv/bin/mlflow"), folder)
    yield server
    server.stop()


def _first_points(server, experiment):
    """The points of an experiment's validation loss; empty before its first epoch."""
    try:
        return server.points(server.runs(experiment)[0], "val_loss")
    except (requests.HTTPError, IndexError):
        return []


def _check_points(server, run, output):
    """Check that the server has each epoch of the output's history once."""
    history = pd.read_csv(output / "history.csv")
    steps, values = zip(*server.points(run, "val_loss"), strict=True)
    assert list(steps) == history["epoch"].tolist()
    assert list(values) == pytest.approx(history["val_loss"].tolist())


def test_a_run_with_its_epochs_and_a_model_that_gives_the_bundles_answers(
    server, start_job, digits, tmp_path, monkeypatch
):
    output = tmp_path / "runs" / "digits"
    job = start_job(
        "train", "--data", digits, "--output", output, *FAST, "--epochs", "2",
        "--mlflow", server.address, "--mlflow-experiment", "first", "--mlflow-model", "digits",
    )  # fmt: skip
    assert job.wait(300) == 0, job.err.read_text()
    assert len(job.out.read_text().splitlines()) == 1  # MLflow prints nothing to stdout
    summary = json.loads(job.out.read_text())
    (run,) = server.runs("first")
    assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "runs/digits")
    flags = {flag["key"]: flag["value"] for flag in run["data"]["params"]}
    assert (flags["epochs"], flags["learning_rate"], flags["architecture"]) == ("2", "0.003", "small_cnn")
    _check_points(server, run, output)
    for name in ("loss", "accuracy", "val_accuracy", "learning_rate", "images_per_second"):
        assert [step for step, _ in server.points(run, name)] == [1, 2]
    ((_, best),) = server.points(run, "best_val_accuracy")
    assert best == pytest.approx(summary["metrics"]["val_accuracy"])

    (version,) = server.versions("digits")
    assert (version["version"], version["run_id"]) == ("1", run["info"]["run_id"])
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow.artifacts
    import mlflow.pyfunc

    mlflow.set_tracking_uri(server.address)
    downloaded = mlflow.artifacts.download_artifacts("models:/digits/1", dst_path=str(tmp_path / "fetched"))
    flavour = yaml.safe_load(Path(downloaded, "MLmodel").read_text())["flavors"]["python_function"]
    assert flavour["loader_module"] == "cnnray.models.mlflow_flavor"
    assert not flavour.get("code")
    bundle = Bundle.load(f"{downloaded}/data/bundle")
    assert bundle.version == Bundle.load(summary["bundle"]).version
    assert {"key": "cnnray.bundle", "value": bundle.version} in version["tags"]
    loaded = mlflow.pyfunc.load_model(downloaded)
    images = [path.read_bytes() for path in sorted(digits.rglob("*.png"))[:20]] + [b"not an image"]
    answers = loaded.predict(pd.DataFrame({"image": images}))
    expected = Predictor(Bundle.load(summary["bundle"]))(images)
    assert answers["prediction"].tolist()[:-1] == [answer.label for answer in expected[:-1]]
    np.testing.assert_array_equal(
        np.stack(answers["probabilities"][:-1]), [answer.probabilities for answer in expected[:-1]]
    )
    assert answers["error"].isna().tolist() == [True] * 20 + [False]
    assert answers["error"].iloc[-1] == str(expected[-1])

    resumed = start_job(
        "train", "--data", digits, "--output", output, *FAST, "--epochs", "2",
        "--mlflow", server.address, "--mlflow-experiment", "first", "--mlflow-model", "digits",
    )  # fmt: skip
    assert resumed.wait(120) == 0, resumed.err.read_text()
    assert len(server.versions("digits")) == len(server.runs("first")) == 1


def test_a_killed_run_that_is_resumed_is_one_run(server, start_job, digits, tmp_path):
    command = (
        "train", "--data", digits, "--output", tmp_path / "out", *FAST, "--epochs", "8",
        "--mlflow", server.address, "--mlflow-experiment", "killed",
    )  # fmt: skip
    job = start_job(*command)

    until(lambda: job.process.poll() is not None or _first_points(server, "killed"), 180, "an epoch")
    children = job.named_children()
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.process.wait() == -signal.SIGKILL
    assert not survivors(children, 30)
    assert server.runs("killed")[0]["info"]["status"] == "RUNNING"
    resumed = start_job(*command)
    assert resumed.wait(300) == 0, resumed.err.read_text()
    assert "going on from epoch" in resumed.err.read_text()
    (run,) = server.runs("killed")
    assert run["info"]["status"] == "FINISHED"
    _check_points(server, run, tmp_path / "out")
    assert [step for step, _ in server.points(run, "loss")] == list(range(1, 9))
    (version,) = server.versions("killed")
    assert version["run_id"] == run["info"]["run_id"]


def test_a_server_that_stops_does_not_end_the_training(server, start_job, digits, tmp_path):
    output = tmp_path / "out"
    command = (
        "train", "--data", digits, "--output", output, *FAST, "--epochs", "60",
        "--mlflow", server.address, "--mlflow-experiment", "vanished",
    )  # fmt: skip
    job = start_job(*command)
    until(lambda: job.process.poll() is not None or _first_points(server, "vanished"), 180, "an epoch")
    server.stop()
    try:
        assert job.process.poll() is None, job.err.read_text()
        until(lambda: job.process.poll() is not None or (output / "summary.json").exists(), 300, "the training's end")
        started = time.monotonic()
        assert job.wait(300) == 0, job.err.read_text()
        seconds = time.monotonic() - started
        assert seconds < 90  # MLflow's own retries would take many minutes
        log = job.err.read_text()
        assert re.search(r"lacks (epochs [\d to]+ and )?the end of the run \(Connection refused\)", log), log
        assert "tracking.py" not in log  # no traceback
        assert json.loads(job.out.read_text())["epochs"] == 60
        print(f"without its server: {seconds:.0f} s from the last epoch to the end")

        fresh = start_job(*[tmp_path / "2" if part == output else part for part in command])
        started = time.monotonic()
        assert fresh.wait(120) == 1
        assert re.fullmatch(r"Error: No MLflow server at \S+: Connection refused\n", fresh.err.read_text())
        assert not (tmp_path / "2").exists()
        print(f"an address that does not answer: {time.monotonic() - started:.1f} s")
    finally:
        server.start()
    resumed = start_job(*command)
    assert resumed.wait(240) == 0, resumed.err.read_text()
    (run,) = server.runs("vanished")
    assert run["info"]["status"] == "FINISHED"
    _check_points(server, run, output)
    assert len(server.versions("vanished")) == 1


def test_a_search_is_a_run_with_its_trials_as_children(server, start_job, digits, tmp_path):
    job = start_job(
        "tune", "--data", digits, "--output", tmp_path / "out", *FAST, "--epochs", "2", "--trials", "2",
        "--search", "learning_rate=choice([0.001,0.003])",
        "--mlflow", server.address, "--mlflow-experiment", "search",
    )  # fmt: skip
    assert job.wait(400) == 0, job.err.read_text()
    assert len(job.out.read_text().splitlines()) == 1
    runs = server.runs("search")
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
    (parent,) = [run for run, own in zip(runs, tags, strict=True) if "mlflow.parentRunId" not in own]
    trials = [run for run in runs if run is not parent]
    assert {own.get("mlflow.parentRunId") for own in tags} == {None, parent["info"]["run_id"]}
    assert len(trials) == 2
    for run in trials:
        assert server.points(run, "val_loss")
        assert run["info"]["status"] in ("FINISHED", "KILLED")
    best = json.loads(job.out.read_text())["val_accuracy"]
    assert [value for _, value in server.points(parent, "best_val_accuracy")] == pytest.approx([best])
    assert parent["info"]["status"] == "FINISHED"


def test_outputs_on_s3(server, start_job, digits, tmp_path):
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        variables = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        requests.put(f"{variables['AWS_ENDPOINT_URL']}/bucket").raise_for_status()
        job = start_job(
            "train", "--data", digits, "--output", "s3://bucket/runs/1", *FAST, "--epochs", "1",
            "--mlflow", server.address, "--mlflow-experiment", "s3", environment=variables,
        )  # fmt: skip
        assert job.wait(300) == 0, job.err.read_text()
        (run,) = server.runs("s3")
        assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "runs/1")
        assert [step for step, _ in server.points(run, "val_loss")] == [1]
        assert len(server.versions("s3")) == 1
    finally:
        store.stop()
