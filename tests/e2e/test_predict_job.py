"""jobs/predict.py run by users and killed at any time: in the end every image has one row, and nothing hangs."""

import json
import os
import random
import shutil
import time

import psutil
import pyarrow.parquet
import pytest
from PIL import Image

from tests.e2e.conftest import kill, until
from tests.networks import coloured_noise
from tests.runs import read_rows

ON_WORKERS = ("--max-workers", "2")
"""So few images are otherwise classified without Ray."""
IMAGES = 1500
PARTS = -(-IMAGES // 64)
WATCHDOG = 240
"""Seconds after which a run on two cores counts as hanging."""


@pytest.fixture(scope="module")
def bundle(onnx_bundle):
    return onnx_bundle


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images that are slow to decode, two of them damaged: hard links to eight files of 1000x1000 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    images, _ = coloured_noise(8, 1000, seed=7)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:05d}.jpg", quality=90)
    for number in range(8, IMAGES):
        (folder / f"{number:05d}.jpg").hardlink_to(folder / f"{number % 8:05d}.jpg")
    for number in (17, IMAGES - 3):
        path = folder / f"{number:05d}.jpg"
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:1000])
    return folder


@pytest.fixture
def command(bundle, photos, tmp_path):
    """The command line of a run, and its output."""
    output = tmp_path / "out"
    arguments = ["--bundle", bundle, "--input", photos, "--output", output, "--rows-per-part", "64"]
    return ("predict", *arguments, *ON_WORKERS), output


def _line(job):
    return json.loads(job.out.read_text().splitlines()[-1])


def _check(output, line):
    assert (line["rows"], line["ok"], line["errors"]) == (IMAGES, IMAGES - 2, 2)
    assert [row["id"] for row in read_rows(output)] == list(range(IMAGES))
    assert json.loads((output / "summary.json").read_text())["rows"] == IMAGES


def _parts(output):
    return len(list(output.glob("part-*")))


def _is_writing(output):
    """Whether a part is being written, for a few milliseconds, under a hidden name."""
    return output.exists() and any(name.startswith(".part-") for name in os.listdir(output))  # noqa: PTH208 - quick


ON_RAY = {"worker": "RangeWorker", "writers": "RangeWorker", "task": "decode_rows"}
"""What Ray puts in the names of these processes. A run continues by itself when one of them is killed."""


def _victims(job, kind):
    """The processes to kill: the job itself, one of its Ray workers or all, or its whole cluster."""
    if kind == "driver":
        return [psutil.Process(job.process.pid)]
    named = job.named_children()
    if kind in ON_RAY:
        processes = [process for process, name in named if name.startswith("ray::") and ON_RAY[kind] in name]
        return processes if kind == "writers" or not processes else [random.choice(processes)]
    return [process for process, name in named if "raylet" in name or "gcs_server" in name]


def _kill_and_finish(start_job, command, output, kind, parts, seconds):
    """Kill a run, and let it finish, or start it again if the kill ended it.

    Args:
        start_job: the fixture.
        command: of the run.
        output: of the run.
        kind: what is killed (see `_victims`).
        parts: number of written parts to wait for before the kill.
        seconds: time between that and the kill.

    Returns:
        the JSON line, and the number of parts at the kill.
    """
    job = start_job(*command)
    until(lambda: _parts(output) >= parts or job.process.poll() is not None, WATCHDOG, f"{parts} parts")
    time.sleep(seconds)
    # Ray, or this process of it, may not have started yet.
    victims = until(lambda: _victims(job, kind), 60, kind)
    while kind == "writers" and not _is_writing(output) and job.process.poll() is None:
        pass
    before = _parts(output)
    assert kill(victims), job.err.read_text()
    if kind not in ON_RAY:
        job.wait(WATCHDOG)
        job.end()
        assert _parts(output) >= before
        job = start_job(*command)
    assert job.wait(WATCHDOG) == 0, job.err.read_text()
    return _line(job), before


def test_a_run_writes_rows_and_logs_a_summary(start_job, command):
    arguments, output = command
    job = start_job(*arguments)
    assert job.wait(WATCHDOG) == 0, job.err.read_text()
    _check(output, _line(job))
    errors = job.err.read_text()
    assert "images/s" in errors
    assert f"{IMAGES} images: {IMAGES - 2} classified, 2 without a prediction" in errors
    assert "corrupt: 2, " in errors
    assert _parts(output) == PARTS
    table = pyarrow.parquet.read_table(output / "part-000000000000-0.0.parquet")
    assert table.column_names == [
        "id", "uri", "status", "error", "prediction", "confidence", "top_k_labels", "top_k_scores", "model",
    ]  # fmt: skip
    again = start_job(*arguments)
    assert again.wait(60) == 0
    assert "is finished already; nothing was run" in again.err.read_text()
    assert _line(again)["resumed"] == IMAGES


@pytest.mark.parametrize("kind", ["driver", "worker", "writers"])
def test_a_run_that_is_killed_ends_with_every_image_once(kind, start_job, command):
    arguments, output = command
    line, before = _kill_and_finish(start_job, arguments, output, kind, 2, 0)
    _check(output, line)
    if kind not in ON_RAY:
        assert line["resumed"] >= 64 * before > 0


def test_a_few_images_need_no_ray_until_a_run_is_killed(start_job, command):
    arguments, output = command
    arguments = arguments[: -len(ON_WORKERS)]
    job = start_job(*arguments)
    until(lambda: _parts(output) >= 2 or job.process.poll() is not None, WATCHDOG, "2 parts")
    assert not _victims(job, "cluster")
    before = _parts(output)
    assert kill(_victims(job, "driver"))
    job.wait(WATCHDOG)
    job.end()
    again = start_job(*arguments)
    assert again.wait(WATCHDOG) == 0, again.err.read_text()
    _check(output, _line(again))
    assert _line(again)["resumed"] >= 64 * before
    # An image may have ended the first one: Ray's workers find out which.
    assert "in this process" in job.err.read_text()
    assert "1 to 2 workers of 1 CPUs" in again.err.read_text()


# Ray takes minutes to notice.
@pytest.mark.chaos
def test_a_run_whose_ray_dies_says_so_and_goes_on(start_job, bundle, photos, tmp_path):
    images, output = 30_000, tmp_path / "out"  # workers go on for a while before they are lost
    (tmp_path / "photos").mkdir()
    for number in range(images):
        (tmp_path / "photos" / f"{number:05d}.jpg").hardlink_to(photos / f"{number % 8:05d}.jpg")
    flags = ["--bundle", bundle, "--input", tmp_path / "photos", "--output", output, "--rows-per-part", "64"]
    arguments = ("predict", *flags, *ON_WORKERS)
    for name in ("raylet", "gcs_server"):
        job, before = start_job(*arguments), _parts(output)
        until(lambda job=job, n=before: _parts(output) >= n + 2 or job.process.poll() is not None, WATCHDOG, "parts")
        job.lose(name)
    job = start_job(*arguments)
    assert job.wait(WATCHDOG) == 0, job.err.read_text()
    line = _line(job)
    assert (line["rows"], line["ok"]) == (images, images)
    assert [row["id"] for row in read_rows(output)] == list(range(images))
    assert line["resumed"] >= 64 * 4
    assert "53727" not in job.err.read_text()  # a line of Ray about an actor that it starts


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["driver", "worker", "writers", "cluster", "task"])
def test_ten_kills_of_each_kind(kind, start_job, command, capsys):
    arguments, output = command
    if kind == "task":
        arguments = (*arguments, "--decoding", "tasks", "--cpus-per-worker", "0.5")
    for trial in range(10):
        # Some kills hit the start of Ray and the workers, the others are spread over the run.
        parts = max(0, random.randint(-PARTS // 3, PARTS - 12))
        seconds = random.uniform(0.5, 5) if parts == 0 else random.uniform(0, 0.3)
        started = time.monotonic()
        line, before = _kill_and_finish(start_job, arguments, output, kind, parts, seconds)
        _check(output, line)
        with capsys.disabled():
            print(
                f"{kind} {trial + 1}: killed {seconds:.1f} s after {parts} parts ({before} of {PARTS} existed); "
                f"{line['resumed']} images resumed; done after {time.monotonic() - started:.0f} s in total"
            )
        shutil.rmtree(output)


MISTAKES = {
    "mistyped flag": (["--bundle", "{bundle}", "--input", "{photos}", "--outptu", "x"], "--outptu"),
    "no bundle": (["--bundle", "{empty}", "--input", "{photos}", "--output", "{out}"], "is not a bundle"),
    "another version": (
        ["--bundle", "{bundle}", "--bundle-version", "a1", "--input", "{photos}", "--output", "{out}"],
        ", and --bundle-version is a1.",
    ),
    "no input": (["--bundle", "{bundle}", "--input", "/nowhere", "--output", "{out}"], "/nowhere does not exist"),
    "empty input": (["--bundle", "{bundle}", "--input", "{empty}", "--output", "{out}"], "holds no images"),
    "engine": (
        ["--bundle", "{bundle}", "--input", "{photos}", "--output", "{out}", "--engine", "litert"],
        "was not exported to litert",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported_at_once(mistake, start_job, bundle, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments, sentence = MISTAKES[mistake]
    values = {"bundle": bundle, "photos": photos, "empty": tmp_path / "empty", "out": tmp_path / "out"}
    started = time.monotonic()
    job = start_job("predict", *(argument.format(**values) for argument in arguments))
    assert job.wait(60) != 0
    assert time.monotonic() - started < 15  # about 1 on a quiet machine
    assert sentence in job.err.read_text().splitlines()[-1]
    assert "Traceback" not in job.err.read_text()
    assert not (tmp_path / "out").exists()
