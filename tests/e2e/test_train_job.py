"""jobs/train.py as its users run it."""

import json
import os
import re
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import checkpoints, survivors, until
from tests.runs import final_state, largest_difference

FAST = (
    "--architecture", "small_cnn", "--image-size", "16", "--batch-size", "16", "--epochs", "2",
    "--checkpoint-every-steps", "3", "--cache", "none", "--data-checks", "false", "--augment", "none",
)  # fmt: skip


@pytest.mark.timeout(900)
def test_a_killed_driver_is_resumed_by_the_same_command(start_job, digits, tmp_path):
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "killed"
    with tempfile.TemporaryDirectory() as temporary:  # not in tmp_path, which is too long for sockets
        variables = {"TMPDIR": temporary, "RAY_TMPDIR": tempfile.gettempdir()}
        job = start_job("train", "--data", digits, "--output", undisturbed, *FAST, environment=variables)
        assert job.wait(240) == 0, job.err.read_text()
        assert not [*Path(temporary).iterdir()]
    summary = json.loads(job.out.read_text().splitlines()[-1])
    assert summary["epochs"] == 2

    killed = start_job("train", "--data", digits, "--output", output, *FAST)
    # The third checkpoint is in the middle of the first epoch (10 steps, a checkpoint every 3).
    until(lambda: killed.process.poll() is not None or len(checkpoints(output)) >= 1, 120, "a checkpoint")
    until(lambda: '"step":3' in _snapshot(output) or '"step":6' in _snapshot(output), 60, "a checkpoint in an epoch")
    children = killed.named_children()
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert not (output / "bundle").exists()
    assert not survivors(children, 30)

    resumed = start_job("train", "--data", digits, "--output", output, *FAST)
    assert resumed.wait(240) == 0, resumed.err.read_text()
    assert re.search(r"going on from epoch [12], step [0369]", resumed.err.read_text())
    for arrays, expected_arrays in zip(final_state(output), final_state(undisturbed), strict=True):
        assert largest_difference(arrays, expected_arrays) <= 1e-5
    metrics = json.loads(resumed.out.read_text().splitlines()[-1])["metrics"]
    assert metrics == pytest.approx(summary["metrics"], rel=1e-5)


# Ray takes minutes to notice.
@pytest.mark.chaos
def test_a_run_whose_ray_dies_says_so_and_goes_on(start_job, digits, tmp_path):
    command = ("train", "--data", digits, "--output", tmp_path, *FAST, "--epochs", "500", "--max-workers", "1")
    job = start_job(*command)
    until(lambda: job.process.poll() is not None or checkpoints(tmp_path), 120, "a checkpoint")
    job.lose("raylet")
    job = start_job(*command)
    until(lambda: "going on from epoch" in job.err.read_text(), 120, "the run")
    job.lose("gcs_server")


def test_ctrl_c_ends_the_job_with_a_sentence_and_a_run_that_can_be_resumed(start_job, digits, tmp_path):
    job = start_job(
        "train", "--data", digits, "--output", tmp_path / "out", *FAST, "--epochs", "500", "--max-workers", "1"
    )
    until(lambda: job.process.poll() is not None or checkpoints(tmp_path / "out"), 120, "a checkpoint")
    job.process.send_signal(signal.SIGINT)
    assert job.wait(60) == 130, job.err.read_text()
    assert "Interrupted; the same command goes on" in job.err.read_text().splitlines()[-1]
    assert job.out.read_text() == ""
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_run_that_learns_nothing_says_so(start_job, tmp_path):
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(100):
            pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels // 128).save(tmp_path / "data" / label / f"{index}.png")  # all but black
    command = ["train", "--data", tmp_path / "data", "--output", tmp_path / "out", "--max-workers", "1"]
    job = start_job(*command, "--preset", "quick", "--epochs", "3", "--learning-rate", "1e-9")
    assert job.wait(240) == 0, job.err.read_text()
    assert json.loads(job.out.read_text().splitlines()[-1])["has_learned"] is False
    text = job.err.read_text()
    assert "After the warm-up, the training loss is still that of guessing" in text
    assert "The network has learned nothing: its training loss at the end" in text
    assert text.count("--find-learning-rate shows what is possible") == 2


def _snapshot(output):
    path = output / "checkpoints" / "checkpoint_manager_snapshot.json"
    return path.read_text() if path.exists() else ""


MISTAKES = {
    "mistyped flag": (["--data", "{digits}", "--output", "{out}", "--epoch", "3"], "--epoch"),
    "no data flag": (["--output", "{out}"], "data"),
    "missing folder": (["--data", "/nowhere", "--output", "{out}"], "/nowhere does not exist"),
    "no images": (["--data", "{empty}", "--output", "{out}"], "no sub-folders"),
    "size of 0": (["--data", "{digits}", "--output", "{out}", "--image-size", "0"], "--image-size: 0 is no size"),
    "size of 100000": (["--data", "{digits}", "--output", "{out}", "--image-size", "100000"], "--image-size must be"),
    "another scheme": (["--data", "ftp://b/x", "--output", "{out}"], "neither a local path nor"),
    "no bucket": (["--data", "{digits}", "--output", "s3://"], "names no bucket"),
    "not a number": (["--data", "{digits}", "--output", "{out}", "--epochs", "many"], "epochs"),
    "unknown network": (["--data", "{digits}", "--output", "{out}", "--architecture", "resnet51"], "resnet51"),
    "unknown precision": (["--data", "{digits}", "--output", "{out}", "--precision", "int8"], "precision"),
    "too many workers": (["--data", "{digits}", "--output", "{out}", "--max-workers", "500", "--batch-size", "500"],
                         "500 worker(s) do not fit"),
    "output is a file": (["--data", "{digits}", "--output", "{file}"], "is a file"),
    "missing config": (["--data", "{digits}", "--output", "{out}", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    "mistyped key": (["--config", "{yaml}"], "epoch"),
    "missing weights": (["--data", "{digits}", "--output", "{out}", "--architecture", "vgg16", "--image-size", "32",
                         "--weights", "/no/such.h5"], "/no/such.h5"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence_within_five_seconds(mistake, start_job, digits, tmp_path):
    arguments, expected = MISTAKES[mistake]
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "c.yaml").write_text(f"data: {digits}\noutput: {out}\nepoch: 3\n")
    places = {"digits": digits, "out": out, "empty": tmp_path / "empty", "file": tmp_path / "file",
              "yaml": tmp_path / "c.yaml"}  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    job = start_job("train", *(argument.format(**places) for argument in arguments))
    assert job.wait(30) != 0
    # CPU time, because other tests may run at the same time.
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    message = job.err.read_text()
    assert expected in message
    assert len(message.strip().splitlines()) == 1, message
    assert job.out.read_text() == ""
    assert not out.exists()


def test_a_printed_config_prints_itself(start_job, tmp_path):
    first = start_job("train", "--data", "/d", "--output", "/o", "--epochs", "7", "--print-config")
    assert first.wait(30) == 0, first.err.read_text()
    (tmp_path / "c.yaml").write_text(first.out.read_text())
    second = start_job("train", "--config", tmp_path / "c.yaml", "--print-config")
    assert second.wait(30) == 0
    assert second.out.read_text() == first.out.read_text()
    assert "epochs: 7" in first.out.read_text()


def test_help_explains_each_flag(start_job):
    from dataclasses import fields

    from cnnray.training.config import TrainConfig

    job = start_job("train", "--help")
    assert job.wait(30) == 0
    options = job.out.read_text().partition("options:")[2]
    for field in fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        explanation = options.partition(f"\n  {flag} ")[2].partition("(")[0].split()
        assert len(explanation) > 3, flag
