"""jobs/tune.py as its users run it."""

import csv
import json
import os
import signal

import pytest
import yaml

from tests.e2e.conftest import survivors, until

FAST = (
    "--architecture", "small_cnn", "--image-size", "16", "--batch-size", "16", "--epochs", "2",
    "--cache", "memory", "--data-checks", "false", "--trials", "3", "--search", "learning_rate=loguniform(1e-4,1e-2)",
)  # fmt: skip


@pytest.mark.long
def test_a_killed_search_is_resumed_and_its_best_config_trains(start_job, digits, tmp_path):
    output = tmp_path / "out"
    job = start_job("tune", "--data", digits, "--output", output, *FAST)

    def finish_times():
        return {path: path.stat().st_mtime_ns for path in output.glob("trials/*/summary.json")}

    first = until(lambda: job.process.poll() is not None or finish_times(), 180, "a finished trial")
    assert first is not True, job.err.read_text()
    children = job.named_children()
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    assert not survivors(children, 30)

    resumed = start_job("tune", "--data", digits, "--output", output, *FAST)
    assert resumed.wait(400) == 0, resumed.err.read_text()
    assert "going on with the search" in resumed.err.read_text()
    summary = json.loads(resumed.out.read_text().splitlines()[-1])
    rows = list(csv.DictReader((output / "trials.csv").open()))
    assert summary["trials"] == len(rows) == 3
    assert {path: finish_times()[path] for path in first} == first
    assert max(float(row["val_accuracy"]) for row in rows) == summary["val_accuracy"]

    best = yaml.safe_load((output / "best.yaml").read_text())
    assert best["learning_rate"] == summary["best"]["learning_rate"]
    train = start_job("train", "--config", output / "best.yaml", "--output", tmp_path / "best", "--epochs", "1")
    assert train.wait(180) == 0, train.err.read_text()
    assert json.loads(train.out.read_text().splitlines()[-1])["epochs"] == 1
