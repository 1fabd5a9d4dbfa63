"""Sends every query of the Grafana dashboard to a Prometheus that scrapes a Ray cluster with jobs and a service."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest
import requests
import yaml

from cnnray.cluster import free_port
from cnnray.serving import deploy
from tests.awkward import awkward_images
from tests.conftest import write_digits
from tests.e2e.conftest import kill, until
from tests.e2e.service import ask
from tests.unit.test_dashboard import PANELS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))
# So many copies that the prediction takes several of Ray's collections of metrics.
IMAGES, COPIES, EPOCHS, BAD = 1797, 40, 12, 7
GOOD = awkward_images()["rgb.png"]
# Panels that have no data in this test.
EMPTY = {"GPU"}


class Prometheus:
    """A Prometheus server that scrapes the nodes in the list that a Ray head writes."""

    def __init__(self, nodes_file, folder):
        self.address = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "2s"},
            "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(nodes_file)]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        program = shutil.which("prometheus")
        assert program, "make test-cluster installs it"
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address={self.address.removeprefix('http://')}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        until(self._ready, 60, "Prometheus")

    def _ready(self):
        try:
            return requests.get(f"{self.address}/-/ready", timeout=2).ok
        except requests.RequestException:
            return False

    def ask(self, query):
        """Evaluate an expression: the labels and the value of each series."""
        answer = requests.get(f"{self.address}/api/v1/query", params={"query": query}, timeout=10).json()
        assert answer["status"] == "success", (query, answer)
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def stop(self):
        self._process.terminate()
        self._process.wait(30)


def _read_command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def head():
    """A Ray head, started as in the README for a service: its folder, and the environment of its jobs."""
    # Not pytest's folder: Ray puts sockets into it, whose paths may have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="r"))
    (folder / "serve").mkdir()
    before = dict(os.environ)
    deploy._prepare_environment(folder / "serve")
    variables = os.environ | {"PATH": f"{Path(RAY).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    os.environ.clear()
    os.environ.update(before)
    variables.pop("RAY_ADDRESS", None)
    port = free_port()
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={port}", f"--dashboard-port={free_port()}",
         "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}",
         f"--ray-client-server-port={free_port()}", f"--metrics-export-port={free_port()}",
         "--min-worker-port=10002", "--max-worker-port=19999",
         f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"],
        env=variables, stdin=subprocess.DEVNULL, stdout=(folder / "out").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    until(lambda: process.poll() is not None or "Ray runtime started" in (folder / "out").read_text(), 60, "Ray")
    assert process.poll() is None, (folder / "out").read_text()
    yield folder / "ray", {**variables, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=10)
    kill(alive)
    # HAProxy is no longer a child of Ray after it has reloaded its configuration, which it does at the end, too.
    kill([other for other in psutil.process_iter() if str(folder) in _read_command(other)])
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def prometheus(head, tmp_path_factory):
    nodes_file = head[0] / "prom_metrics_service_discovery.json"
    until(nodes_file.exists, 60, "Ray's list of nodes")
    server = Prometheus(nodes_file, tmp_path_factory.mktemp("prometheus"))
    yield server
    server.stop()


def _fill_variables(expression):
    """An expression as Grafana sends it: for all runs, with a window of a few scrapes."""
    return expression.replace("$__rate_interval", "1m").replace("$run", ".*")


def test_every_query_of_the_dashboard(head, prometheus, start_job, onnx_bundle, tmp_path):
    _, environment = head
    digits = write_digits(tmp_path / "digits", IMAGES)
    seen = {}
    """The largest value so far by panel and expression. (A gauge disappears 20 s after its process has ended.)"""

    def query_panels():
        for panel in PANELS:
            for target in panel["targets"]:
                values = [value for _, value in prometheus.ask(_fill_variables(target["expr"])) if value == value]
                key = (panel["title"], target["expr"])
                if values:
                    seen[key] = max(*values, seen.get(key, 0), 0)
        return False

    def wait_for(job, seconds):
        end = time.monotonic() + seconds
        while job.process.poll() is None and time.monotonic() < end:
            query_panels()
            time.sleep(1)
        assert job.wait(1) == 0, job.err.read_text()
        return json.loads(job.out.read_text().splitlines()[-1])

    for number in range(BAD):
        (digits / f"{number}" / "bad.png").write_bytes(b"" if number < 2 else b"no image")
    trained = wait_for(
        start_job(
            "train", "--data", digits, "--output", tmp_path / "runs" / "digits", "--architecture", "small_cnn",
            "--image-size", "16", "--max-workers", "1", "--epochs", EPOCHS, "--data-checks", "false",
            environment=environment,
        ),
        300,
    )  # fmt: skip
    history = pd.read_csv(tmp_path / "runs" / "digits" / "history.csv")
    ended = time.monotonic()

    # A long job, and a job that is shorter than the ten seconds between Ray's collections of metrics.
    many = tmp_path / "many"
    many.mkdir()
    for number, path in enumerate(sorted(digits.rglob("*.png")) * COPIES):
        (many / f"{number}.png").hardlink_to(path)
    predicted_many = wait_for(
        start_job(
            "predict", "--bundle", onnx_bundle, "--input", many, "--output", tmp_path / "runs" / "many",
            environment=environment,
        ),
        200,
    )  # fmt: skip
    predicted = wait_for(
        start_job(
            "predict", "--bundle", onnx_bundle, "--input", digits, "--output", tmp_path / "runs" / "predicted",
            environment=environment,
        ),
        120,
    )  # fmt: skip
    assert (predicted["rows"], predicted["errors"]) == (IMAGES + BAD, BAD)

    port = free_port()
    service = start_job(
        "serve", "--bundle", f"colours={onnx_bundle}", "--port", port, "--cpus-per-replica", "0.5",
        environment=environment,
    )  # fmt: skip
    wait_for(service, 180)
    address = f"http://127.0.0.1:{port}"
    sent = Counter()

    def send_requests():
        for status, path, data in ((200, "", GOOD), (415, "", b"no image at all"), (404, "?model=none", GOOD)):
            for _ in range(status // 20):
                assert ask(f"{address}/predict{path}", data)[0] == status
                sent[status] += 1

    def total(metric):
        return sum(value for _, value in prometheus.ask(metric))

    def all_counted():
        query_panels()
        return all(
            total(f'ray_cnnray_requests_total{{status="{status}"}}') >= count for status, count in sent.items()
        )

    # Twice, because Prometheus needs two samples for a rate.
    for _ in range(2):
        send_requests()
        until(all_counted, 60, "the service's metrics")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        query_panels()
        time.sleep(1)

    counted = {
        "train": total('ray_cnnray_train_images_total{run="runs/digits"}'),
        "bad": total('ray_cnnray_train_bad_images_total{run="runs/digits"}'),
        "ok": total('ray_cnnray_predict_images_total{run="runs/predicted", status="ok"}'),
        "errors": total('ray_cnnray_predict_images_total{run="runs/predicted", status="error"}'),
        "many": total('ray_cnnray_predict_images_total{run="runs/many"}'),
        **{status: total(f'ray_cnnray_requests_total{{route="/predict", status="{status}"}}') for status in sent},
    }
    print(f"counted {counted}, {time.monotonic() - ended:.0f} s after the end of the training")
    rates = trained["images_per_second"], predicted_many["images_per_second"]
    print(f"by the jobs: trained {rates[0]}, predicted {rates[1]} images/s")
    for (title, expression), value in seen.items():
        print(f"{title:40s} {value:12.4g}  {expression}")
    assert counted == {
        "train": history["images"].sum(), "bad": history["bad_images"].sum(),
        "ok": IMAGES, "errors": BAD, "many": COPIES * (IMAGES + BAD), **sent,
    }  # fmt: skip
    assert counted["bad"] > 0
    query = 'ray_cnnray_predict_images_total{run="runs/predicted", status="error"}'
    assert {labels["reason"]: value for labels, value in prometheus.ask(query)} == {
        "empty": 2,
        "not an image": BAD - 2,
    }
    assert total("ray_cnnray_predictions_total") == sent[200]

    missing = [
        (panel["title"], target["expr"])
        for panel in PANELS
        for target in panel["targets"]
        if (panel["title"], target["expr"]) not in seen and panel["title"] not in EMPTY
    ]
    assert not missing
    values = {re.sub(r"\W+", " ", f"{title} {expression}"): value for (title, expression), value in seen.items()}

    def panel_values(title, part=""):
        return [value for name, value in values.items() if name.startswith(title) and part in name]

    # Prometheus' rate over a minute includes the time between steps, which the jobs' own rate does not.
    for part, job in (("cnnray_train_images_total", trained), ("cnnray_predict_images_total", predicted_many)):
        (speed,) = panel_values("Images s", part)
        assert 0.1 * job["images_per_second"] < speed < 1.5 * job["images_per_second"], (part, speed)
    assert 0 < panel_values("Busy workers")[0] <= 4
    assert 0 < panel_values("Share of errors", "4")[0] < 1
    assert panel_values("Images for each call")[0] > 0
    assert 0.9 < panel_values("Accuracy")[0] <= 1
    assert panel_values("Epochs done") == [EPOCHS]
    assert panel_values("Nodes") == [1]
    assert 0 < panel_values("Time to answer", "0 5")[0] < 5
    assert panel_values("Replicas", "healthy")[0] >= 1
