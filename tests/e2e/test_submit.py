"""Jobs that `ray job submit` sends from another folder to a Ray head that is already running."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import requests
from PIL import Image

from cnnray.cluster import free_port
from tests.awkward import awkward_images
from tests.conftest import REPOSITORY
from tests.e2e.conftest import AGENTS, kill, until
from tests.e2e.service import ask
from tests.networks import coloured_noise
from tests.runs import final_state, largest_difference, read_rows

RAY = str(Path(sys.executable).with_name("ray"))
CLUSTER_PROCESSES = (
    *AGENTS, "ray::IDLE", "ray::_StatsActor", "ray::_StatsSummaryActor", "ray::_UsageCollectionActor",
    "ray::_AutoscalingCoordinatorActor", "ray::AutoscalingRequester", "ray::ActorLocationTracker",
)  # fmt: skip
"""Ray's processes that belong to no job, and Ray Data's actors of which a cluster has one each."""
WATCHDOG = 300
"""The most seconds that a job may take on two cores."""


class Head:
    """A Ray head node that requires a token, with ports and a folder of its own."""

    def __init__(self, cpus):
        # Not pytest's folder: Ray puts sockets into it, whose paths may have at most 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="r"))
        self.port, dashboard = free_port(), free_port()
        # Nodes get the code from the job's working directory only.
        excluded = ("RAY_ADDRESS", "PYTHONPATH")
        self.environment = {name: value for name, value in os.environ.items() if name not in excluded} | {
            "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
        with (self._folder / "out").open("w") as out:
            self._process = subprocess.Popen(
                [RAY, "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={self.port}",
                 f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
                 f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
                 f"--temp-dir={self._folder}", "--disable-usage-stats"],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        for _ in range(30):
            listed = self.job("list")
            if listed.returncode == 0:
                break
        else:
            raise AssertionError(f"the head did not answer: {listed.stderr[-500:]}")

    def job(self, *arguments, folder="/", **changes):
        """Run `ray job ...` in a folder, and return the completed process."""
        return subprocess.run(
            [RAY, "job", *map(str, arguments)], env=self.environment | changes, cwd=folder,
            capture_output=True, text=True, timeout=WATCHDOG, check=False,
        )  # fmt: skip

    def submit(self, repository, folder, name, *arguments, wait=True):
        """Submit `jobs/NAME.py` of a repository from a folder.

        Returns:
            The job's id, its status and its log; without `wait` the id only.
        """
        job = f"{name}-{secrets.token_hex(4)}"
        submitted = self.job(
            "submit", *([] if wait else ["--no-wait"]), "--submission-id", job, "--working-dir", repository, "--",
            "python", f"jobs/{name}.py", *arguments, folder=folder,
        )  # fmt: skip
        assert (submitted.returncode == 0) == (not wait or self.status(job) == "SUCCEEDED"), (
            submitted.stdout + submitted.stderr
        )
        return (job, self.status(job), self.log(job)) if wait else job

    def status(self, job):
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        address = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{job}"
        return requests.get(address, headers=token, timeout=30).json()["status"]

    def log(self, job):
        """What the job wrote to stdout and stderr, without Ray's lines before it."""
        return self.job("logs", job).stdout.partition("Running entrypoint for job")[2].partition("\n")[2]

    def count_nodes(self):
        """The number of nodes that are alive."""
        command = [RAY, "list", "nodes", "--filter", "state=ALIVE", "--format", "json"]
        address = self.environment["RAY_API_SERVER_ADDRESS"]
        listed = subprocess.run(
            [*command, "--address", address], env=self.environment, capture_output=True, text=True, check=True
        )
        return len(json.loads(listed.stdout))

    def busy_processes(self):
        """The names of Ray's processes that work for a job: neither idle nor those of the cluster."""
        names = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                names.append(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
        return [name for name in names if name.startswith("ray::") and not name.startswith(CLUSTER_PROCESSES)]

    def end(self):
        head = psutil.Process(self._process.pid)
        family = [head, *head.children(recursive=True)]
        self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=5)
        # HAProxy, once it has read a new configuration, is no child of the head.
        orphans = [process for process in psutil.process_iter(["cmdline"]) if self._works_in_folder(process)]
        kill([*alive, *orphans])
        shutil.rmtree(self._folder, ignore_errors=True)

    def _works_in_folder(self, process):
        return any(str(self._folder) in argument for argument in process.info["cmdline"] or ())


@pytest.fixture(scope="module")
def head():
    head = Head(cpus=3)
    yield head
    head.end()


SMALL = ("--architecture", "small_cnn", "--image-size", "16", "--max-workers", "1")


def _read_summary(log):
    """Check that a log is free of progress bars, colours, tracebacks and repeated lines; parse its last line."""
    assert not re.search(r"[\r\x1b]|it/s|Traceback", log), log
    lines = [re.sub(r"\d+", "0", line) for line in log.splitlines()]
    assert not [line for line in set(lines) if lines.count(line) > 30], log
    return json.loads(log.splitlines()[-1])


def test_submitted_jobs_succeed_or_fail_with_one_sentence(head, digits, tmp_path):
    output = tmp_path / "out"
    _, status, log = head.submit(
        REPOSITORY, tmp_path, "train", "--data", digits, "--output", output, *SMALL, "--epochs", "1"
    )
    assert status == "SUCCEEDED", log
    assert _read_summary(log)["bundle"] == str(output / "bundle")
    assert (output / "bundle" / "model.keras").exists()
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208 - names are what is meant

    for mistake, sentence in (
        (["--data", "/nowhere", "--output", output / "2"], "/nowhere does not exist"),
        (["--data", digits, "--output", "runs/1"], "--output runs/1 is a relative path, and a submitted job"),
    ):
        _, status, log = head.submit(REPOSITORY, tmp_path, "train", *mistake)
        assert status == "FAILED"
        assert sentence in log
        assert len(log.splitlines()) == 1, log


def test_without_the_token_jobs_are_refused(head, tmp_path):
    for variables in ({"RAY_AUTH_TOKEN": secrets.token_hex(16)}, {"RAY_AUTH_MODE": "disabled"}):
        refused = head.job("submit", "--", "true", folder=tmp_path, **variables)
        assert refused.returncode != 0
        assert "auth" in (refused.stdout + refused.stderr).lower(), refused.stderr[-500:]


# -- from a fresh clone ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone of the repository."""
    folder = tmp_path_factory.mktemp("clone") / "cnnray"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, folder], check=True)
    return folder


def _stop(head, job):
    """Stop a running job, check that none of its processes is left, and return the time that it took, in words."""
    started = time.monotonic()
    stopped = head.job("stop", job)
    assert head.status(job) == "STOPPED", stopped.stdout + stopped.stderr + head.log(job)
    assert head.log(job).splitlines()[-1] == "Stopped; the same command goes on from what was done."
    try:
        until(lambda: not head.busy_processes(), 30, "the end of the job's workers")
    except AssertionError as error:
        error.add_note(f"still running: {head.busy_processes()}")
        raise
    return f"stopped and gone in {time.monotonic() - started:.1f} s"


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_stopped_training_is_resumed(head, clone, digits, tmp_path, capsys):
    flags = ("--data", digits, *SMALL, "--epochs", "4", "--checkpoint-every-steps", "3", "--batch-size", "16")
    _, status, log = head.submit(clone, tmp_path, "train", *flags, "--output", tmp_path / "undisturbed")
    assert status == "SUCCEEDED", log
    expected = json.loads(log.splitlines()[-1])

    output = tmp_path / "stopped"
    job = head.submit(clone, tmp_path, "train", *flags, "--output", output, wait=False)
    snapshot = output / "checkpoints" / "checkpoint_manager_snapshot.json"
    until(lambda: snapshot.exists() and '"step":' in snapshot.read_text(), WATCHDOG, "a checkpoint")
    stopped = _stop(head, job)
    assert not (output / "bundle").exists()
    started = time.monotonic()
    _, status, log = head.submit(clone, tmp_path, "train", *flags, "--output", output)
    assert status == "SUCCEEDED", log
    assert re.search(r"going on from epoch [1-4], step \d", log), log
    assert _read_summary(log)["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    for arrays, expected_arrays in zip(final_state(output), final_state(tmp_path / "undisturbed"), strict=True):
        assert largest_difference(arrays, expected_arrays) <= 1e-5
    with capsys.disabled():
        print(f"\ntrain: {stopped}; submitted again: SUCCEEDED in {time.monotonic() - started:.0f} s")


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_stopped_prediction_is_resumed(head, clone, onnx_bundle, tmp_path, capsys):
    photos, output, images = tmp_path / "photos", tmp_path / "out", 3000
    photos.mkdir()
    for number, image in enumerate(coloured_noise(8, 1000, seed=7)[0]):
        Image.fromarray(image).save(photos / f"{number:05d}.jpg", quality=90)
    for number in range(8, images):
        (photos / f"{number:05d}.jpg").hardlink_to(photos / f"{number % 8:05d}.jpg")
    flags = ("--bundle", onnx_bundle, "--input", photos, "--output", output, "--rows-per-part", "64")
    job = head.submit(clone, tmp_path, "predict", *flags, wait=False)
    until(lambda: len(list(output.glob("part-*"))) >= 2, WATCHDOG, "two parts")
    stopped = _stop(head, job)
    started = time.monotonic()
    _, status, log = head.submit(clone, tmp_path, "predict", *flags)
    assert status == "SUCCEEDED", log
    summary = _read_summary(log)
    assert images > summary["resumed"] >= 128
    assert [row["id"] for row in read_rows(output)] == list(range(images))
    with capsys.disabled():
        print(
            f"\npredict: {stopped} after {summary['resumed']} of {images} images; submitted again: SUCCEEDED in "
            f"{time.monotonic() - started:.0f} s"
        )


@pytest.fixture
def unshared_folder(head, tmp_path):
    """A folder on the first node that is empty on a second node, which is started for it."""
    folder = tmp_path / "unshared"
    folder.mkdir()
    command = [
        RAY, "start", "--block", f"--address=127.0.0.1:{head.port}", "--num-cpus=2", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with (tmp_path / "node").open("w") as out:
        node = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', folder, *command],
            env=head.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    until(lambda: head.count_nodes() == 2, 60, "the second node")
    yield folder
    family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    node.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    kill(alive)
    until(lambda: head.count_nodes() == 1, 60, "the end of the second node")


@pytest.mark.cluster
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a node mounts of its own")
def test_a_path_that_another_node_lacks_is_refused(head, clone, unshared_folder, onnx_bundle, digits, tmp_path):
    images = shutil.copytree(digits, unshared_folder / "digits")
    flags = ("--bundle", onnx_bundle, "--output", tmp_path / "out")
    _, status, log = head.submit(clone, tmp_path, "predict", *flags, "--input", images)
    assert status == "FAILED"
    assert re.search(r"digits/\d/\d+\.png is not on the node [\d.]+: on several nodes", log.splitlines()[-1]), log
    _, status, log = head.submit(clone, tmp_path, "predict", *flags, "--input", digits)
    assert status == "SUCCEEDED", log
    assert "2 node(s)" in log
    assert _read_summary(log)["ok"] == 200


JOBS = {
    "train": (
        "--data {digits} --output {out}/train {small} --epochs 2",
        ["train/bundle/model.keras", "train/history.csv"],
    ),
    "tune": (
        "--data {digits} --output {out}/tune {small} --epochs 1 --trials 2 "
        "--search learning_rate=loguniform(1e-4,1e-2)",
        ["tune/best.yaml", "tune/trials.csv"],
    ),
    "export": ("--bundle {out}/train/bundle --calibration {digits} --formats onnx", ["train/bundle/model.onnx"]),
    "evaluate": (
        "--bundle {out}/train/bundle --data {out}/train/manifest.parquet --output {out}/report",
        ["report/report.html", "report/metrics.json"],
    ),
    "predict": (
        "--bundle {out}/train/bundle --input {digits} --output {out}/predictions",
        ["predictions/part-000000000000-0.0.parquet", "predictions/summary.json"],
    ),
    "demo": ("--folder {out}/demo", ["demo/run/bundle/model.keras"]),
    "benchmark": ("ingest --images 400 --folder {out}/benchmark", ["benchmark/photos/class0/000000.jpg"]),
    "serve": ("--bundle {out}/train/bundle --port {port}", []),
}
"""The flags of each job, and files that it writes."""


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_every_job_from_a_fresh_clone(head, clone, digits, tmp_path, capsys):
    places = {"digits": digits, "out": tmp_path / "out", "port": free_port(), "small": " ".join(SMALL)}
    for name, (flags, files) in JOBS.items():
        started = time.monotonic()
        _, status, log = head.submit(clone, tmp_path, name, *flags.format(**places).split())
        with capsys.disabled():
            print(f"\n{name}: {status} in {time.monotonic() - started:.0f} s", end="")
        assert status == "SUCCEEDED", log
        assert _read_summary(log)
        for file in files:
            assert (tmp_path / "out" / file).stat().st_size, file
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208 - names are what is meant
    # The service outlives its job, and another job replaces its bundle.
    address = f"http://127.0.0.1:{places['port']}"
    assert ask(f"{address}/predict", awkward_images()["rgb.png"])[0] == 200
    demo = f"--bundle digits={tmp_path}/out/demo/run/bundle --port {places['port']}"
    _, status, log = head.submit(clone, tmp_path, "serve", *demo.split())
    assert status == "SUCCEEDED", log
    assert list(ask(f"{address}/metadata")[1]["models"]) == ["digits"]
