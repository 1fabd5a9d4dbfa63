"""Power failures of nodes during training, prediction and serving, and the time that they cost."""

import csv
import functools
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.load import read_steady
from benchmarks.photos import write as write_photos
from cnnray.images import manifest as manifests
from tests.conftest import REPOSITORY
from tests.e2e.conftest import until
from tests.runs import final_state, largest_difference, read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

TRAINER, PREDICTOR, REPLICA = "ray::RayTrainWorker", "ray::RangeWorker", "ray::ServeReplica"


def _train(start, data, output, *arguments):
    return start(
        "train", "--data", data, "--output", output, "--architecture", "small_cnn", "--image-size", "16",
        "--batch-size", "64", "--data-checks", "false", "--checkpoint-every-steps", "10", *arguments,
    )  # fmt: skip


def _wait_for_summary(job, seconds=300):
    assert job.wait(seconds) == 0, job.err.read_text()[-5000:]
    return json.loads(job.out.read_text().splitlines()[-1])


def _wait_for_log(job, pattern, seconds=150, times=1):
    """Wait until a job's log has so many matches of a pattern."""

    def is_logged():
        running = job.process.poll() is None
        text = job.err.read_text()
        logged = len(re.findall(pattern, text)) >= times
        assert running or logged, text[-5000:]
        return logged

    until(is_logged, seconds, pattern)


def _history(output):
    with Path(output, "history.csv").open() as file:
        return list(csv.DictReader(file))


def _training_images(output):
    """The number of training images, written as in the history."""
    rows = manifests.select_split(manifests.read(str(output / "manifest.parquet")), "train")
    return f"{len(rows)}.0"


def _report(text):
    print(f"\n{text}")


def _choose_node(nodes, command):
    """The last node other than the head that has a process whose command line starts with `command`."""
    return until(lambda: [number for number in nodes.running(command) if number], 60, command)[-1]


def test_training_on_two_nodes_survives_the_loss_of_one(nodes, start, all_digits, tmp_path):
    epochs = 12
    fixed = ("--max-workers", "2", "--cpus-per-worker", "1.5", "--epochs", str(epochs))
    expected = _wait_for_summary(_train(start, all_digits, tmp_path / "expected", "--cache", "none", *fixed))

    job = _train(start, all_digits, tmp_path / "out", "--cache", "memory", *fixed)
    _wait_for_log(job, f"epoch 1/{epochs}  loss")
    time.sleep(1)
    assert len(nodes.running(TRAINER)) == 2
    nodes.cut_power(_choose_node(nodes, TRAINER))
    cut = time.monotonic()
    _wait_for_log(job, r"going on from epoch \d+, step")
    resumed = time.monotonic() - cut
    summary = _wait_for_summary(job)
    states = final_state(tmp_path / "out"), final_state(tmp_path / "expected")
    for arrays, expected_arrays in zip(*states, strict=True):
        assert largest_difference(arrays, expected_arrays) <= 1e-5
    assert [row["images"] for row in _history(tmp_path / "out")] == [_training_images(tmp_path / "out")] * epochs
    _report(
        f"training, a node lost: {summary['seconds']:.0f} s, undisturbed {expected['seconds']:.0f} s; resumed after "
        f"{resumed:.0f} s; images lost: 0"
    )


def test_a_job_waits_for_a_node_that_starts_later(nodes, start, all_digits, tmp_path):
    nodes.cut_power(2)
    noticed = nodes.wait_until_lost(2)
    arguments = ("--max-workers", "3", "--cpus-per-worker", "1.5", "--epochs", "1")
    started = time.monotonic()
    job = _train(start, all_digits, tmp_path / "out", "--wait-minutes", "4", *arguments)
    _wait_for_log(job, r"waiting for room, at most 4m00s: 3 worker\(s\) of 1\.5 CPUs do not fit 4 CPUs")
    assert not (tmp_path / "out" / "config.yaml").exists()
    nodes.start(2)
    _wait_for_log(job, "there is room, after")
    waited = time.monotonic() - started
    assert _wait_for_summary(job)["epochs"] == 1
    _report(f"Ray knew of a lost node after {noticed:.0f} s; a job that waited for it went on after {waited:.0f} s")


def test_a_waiting_job_makes_the_autoscaler_add_nodes(growing_nodes, start_on, all_digits, tmp_path):
    arguments = ("--max-workers", "2", "--cpus-per-worker", "1.5", "--epochs", "1")
    train = functools.partial(start_on, growing_nodes)
    refused = _train(train, all_digits, tmp_path / "out", *arguments)
    assert refused.wait(60) == 1
    assert "do not fit 1 CPUs: lower --max-workers" in refused.err.read_text()
    started = time.monotonic()
    job = _train(train, all_digits, tmp_path / "out", "--wait-minutes", "4", *arguments)
    _wait_for_log(job, "waiting for room")
    _wait_for_log(job, "there is room, after")
    waited = time.monotonic() - started
    assert _wait_for_summary(job)["epochs"] == 1
    _report(f"a job on a head of 1 CPU let Ray's autoscaler add two nodes, and began after {waited:.0f} s")


def test_elastic_training_shrinks_and_grows(nodes, start, all_digits, tmp_path):
    epochs = 16
    job = _train(
        start,
        all_digits,
        tmp_path / "out",
        "--min-workers",
        "1",
        "--max-workers",
        "3",
        "--epochs",
        str(epochs),
        "--cache",
        "none",
        "--images-per-worker",
        "16",
    )
    _wait_for_log(job, r"22 of each worker, or more with fewer than 3 workers; at most 16 at once")
    _wait_for_log(job, rf"epoch 1/{epochs}  loss")
    assert len(nodes.running(TRAINER)) == 3
    lost = 2
    nodes.cut_power(lost)
    cut = time.monotonic()
    _wait_for_log(job, r"training on 2 worker\(s\)")
    shrunk = time.monotonic() - cut
    nodes.start(lost)
    restarted = time.monotonic()
    _wait_for_log(job, r"training on 3 worker\(s\)", times=2)
    grown = time.monotonic() - restarted
    summary = _wait_for_summary(job)
    history = _history(tmp_path / "out")
    assert [int(row["epoch"]) for row in history] == list(range(1, epochs + 1))
    assert {row["images"] for row in history} == {_training_images(tmp_path / "out")}
    workers = [int(row["workers"]) for row in history]
    assert set(workers) == {2, 3}
    assert summary["metrics"]["val_accuracy"] > 0.9
    _report(
        f"elastic training: on 2 workers {shrunk:.0f} s after a node of 3 was lost, on 3 workers {grown:.0f} s after "
        f"it came back; workers by epoch {workers}; accuracy {summary['metrics']['val_accuracy']:.3f}; images lost: 0"
    )


def test_cached_images_of_a_lost_node_are_decoded_again(nodes, all_digits):
    """Ray restores blocks whose only copy was on the lost node."""
    program = f"""
import json, sys, time
import ray
ray.init(logging_level="ERROR")
from cnnray.images import manifest as manifests
from cnnray.images.geometry import Geometry
from cnnray.training.data import CachedSource, decode_into_memory
rows = manifests.with_targets(manifests.build_manifest({str(all_digits)!r}, labelled=True))
blocks = decode_into_memory(rows, Geometry.of(64), 0.25)
nodes = {{node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}}
places = ray.experimental.get_object_locations(blocks)
print("result", json.dumps([[nodes[node] for node in places[block]["node_ids"]] for block in blocks]), flush=True)
sys.stdin.readline()
start = time.monotonic()
source = CachedSource(blocks)
(batch,) = source.batches(lambda number: range(len(rows)), 1)
result = len(set(batch["id"].tolist())), int(batch["image"].sum()), time.monotonic() - start
print("result", json.dumps(result), flush=True)
"""
    command = nodes.on_head(sys.executable, "-c", program)
    results = []
    for lose in (False, True):
        process = subprocess.Popen(
            command, env=nodes.variables, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        places = _read_result(process.stdout)
        if lose:
            holders = [number for number in nodes.others if [nodes.address(number)] in places]
            assert holders, places
            held = places.count([nodes.address(holders[0])])
            nodes.cut_power(holders[0])
        out, _ = process.communicate("\n", timeout=200)
        assert process.returncode == 0
        count, total, seconds = _read_result(out.splitlines())
        results.append((count, total))
    assert results[0] == results[1]
    assert results[0][0] == 1797
    _report(f"decoded images in memory: {held} of {len(places)} blocks were decoded again, after {seconds:.0f} s")


def _read_result(lines):
    """The next result that the program prints, between lines of Ray's own."""
    return next(json.loads(line.removeprefix("result ")) for line in lines if line.startswith("result "))


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory, all_digits):
    """A bundle of `vgg_bn` at 64x64 with ONNX, which runs a few hundred images/s on 2 cores."""
    from tests.networks import write_onnx_bundle

    return write_onnx_bundle(tmp_path_factory.mktemp("bundle"), "vgg_bn", 64, f"{all_digits}/*/00*.png")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 2500)


def test_prediction_survives_the_loss_of_a_node(nodes, start, photos, slow_bundle, tmp_path):
    def predict(output):
        return start("predict", "--bundle", slow_bundle, "--input", photos, "--output", output, "--engine", "onnx")

    expected = _wait_for_summary(predict(tmp_path / "expected"))
    job = predict(tmp_path / "out")
    lost = _choose_node(nodes, PREDICTOR)
    _wait_for_log(job, r"[1-9]\d*/2500 images")
    nodes.cut_power(lost)
    summary = _wait_for_summary(job)
    rows, expected_rows = ({row["id"]: row for row in read_rows(tmp_path / name)} for name in ("out", "expected"))
    assert len(read_rows(tmp_path / "out")) == len(rows) == len(expected_rows) == 2500
    assert summary["errors"] == 0
    for key, row in expected_rows.items():
        assert (row["uri"], row["prediction"]) == (rows[key]["uri"], rows[key]["prediction"])
        assert math.isclose(row["confidence"], rows[key]["confidence"], rel_tol=1e-5)
    _report(
        f"prediction, a node lost: {summary['seconds']:.0f} s, undisturbed {expected['seconds']:.0f} s; "
        "images lost: 0"
    )


def test_a_worker_that_is_cut_off_for_a_minute_adds_no_row(nodes, start, photos, slow_bundle, tmp_path):
    images, count = tmp_path / "images", 10_000
    for number, photo in enumerate(count // 2500 * sorted(photos.rglob("*.jpg"))):
        link = images / f"{number // 1000:02d}" / f"{number:05d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(photo)
    job = start(
        "predict", "--bundle", slow_bundle, "--input", images, "--output", tmp_path / "out", "--engine", "onnx",
        "--rows-per-part", "256", "--verify",
    )  # fmt: skip
    node = _choose_node(nodes, PREDICTOR)
    _wait_for_log(job, r"[1-9]\d*/\d+ images")
    with nodes.cut_off(node, PREDICTOR):
        seconds = nodes.wait_until_lost(node)
        _wait_for_log(job, "a worker was lost")
        time.sleep(60)
        was = "was going on" if job.process.poll() is None else "had ended"
    summary = _wait_for_summary(job)
    assert (summary["rows"], summary["errors"]) == (count, 0)
    assert [row["id"] for row in read_rows(tmp_path / "out")] == list(range(count))
    _report(
        f"prediction, a worker cut off for {60 + seconds:.0f} s, the run {was} when it came back; every image once"
    )


def test_other_nodes_decode_for_a_worker_that_waits_for_images(nodes, start, photos, tmp_path):
    for photo in sorted(photos.rglob("*.jpg"))[::3]:
        path = tmp_path / "images" / photo.parent.name / f"{photo.stem}.png"  # takes ten times as long to decode
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo).save(path, compress_level=1)

    def train(name):
        return start(
            "train", "--data", tmp_path / "images", "--output", tmp_path / name, "--architecture", "small_cnn",
            "--image-size", "32", "--epochs", "8", "--data-checks", "false", "--cache", "none", "--max-workers", "1",
            "--augment", "none",
        )  # fmt: skip

    disturbed = train("disturbed")
    _wait_for_log(disturbed, "CPUs of other nodes are asked to decode")
    node = _choose_node(nodes, "ray::join")
    assert TRAINER not in "".join(" ".join(process.cmdline()) for process in nodes.processes(node))
    nodes.cut_power(node)
    _wait_for_summary(disturbed)
    nodes.restore()
    _wait_for_summary(train("undisturbed"))
    weights = [final_state(tmp_path / name)[0] for name in ("disturbed", "undisturbed")]
    assert largest_difference(*weights) < 1e-5
    _report(f"{nodes.name(node)} decoded for a worker on another node, and was lost: the same weights")


def test_the_service_survives_the_loss_of_a_node(nodes, start, photos, onnx_bundle):
    rate, seconds = 20, 60
    job = start(
        "serve", "--bundle", onnx_bundle, "--host", "0.0.0.0", "--min-replicas", "3", "--max-replicas", "3",
        "--cpus-per-replica", "1", "--engine", "onnx",
    )  # fmt: skip
    assert _wait_for_summary(job)["replicas"] == 3
    before = nodes.running(REPLICA)
    assert len(before) > 1, before
    photo = sorted(photos.rglob("*.jpg"))[0]
    load = subprocess.Popen(
        nodes.on_head(
            sys.executable, "-m", "benchmarks.load", "http://127.0.0.1:8000/predict", photo, rate, seconds
        ),
        env=nodes.variables, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = time.monotonic()
    time.sleep(10)
    nodes.cut_power(_choose_node(nodes, REPLICA))
    cut = time.monotonic() - started
    left = sum(len(nodes.processes(number, REPLICA)) for number in nodes.running(REPLICA))
    assert left < 3
    until(
        lambda: sum(len(nodes.processes(number, REPLICA)) for number in nodes.running(REPLICA)) >= 3,
        120,
        "3 replicas",
    )
    replaced = time.monotonic() - started - cut
    answers = read_steady(load)
    answered = answers.statuses.get("200", 0)
    last = max([cut, *answers.failed_at]) - cut
    _report(
        f"service at {rate} requests/s, a node lost: {answered} of {rate * seconds} answered 200 "
        f"({answers.statuses}), the last failed one asked {last:.0f} s after it, 3 replicas again after "
        f"{replaced:.0f} s; slowest answer {max(answers.milliseconds):.0f} ms"
    )
    # Requests fail that the lost replica was processing, or that are sent to it before Ray notices the loss.
    assert answered >= 0.98 * rate * seconds
    assert not [due for due in answers.failed_at if due > cut + 20]
    subprocess.run(
        nodes.on_head("serve", "shutdown", "--yes", "--address", f"http://{nodes.address(0)}:8265"),
        env=nodes.variables, check=True, capture_output=True,
    )  # fmt: skip
    until(lambda: not nodes.running(REPLICA), 60, "the end of the service")


def test_object_stores_too_small_for_the_images(nodes, start, all_digits, tmp_path):
    def train(name, size, cache):
        return start(
            "train", "--data", all_digits, "--output", tmp_path / name, "--architecture", "small_cnn", "--image-size",
            size, "--epochs", "1", "--cpus-per-worker", "1.5", "--data-checks", "false", "--cache", cache,
            "--validation-fraction", "0.8",  # the same images are read, with less training
        )  # fmt: skip

    refused = train("refused", 224, "memory")
    assert refused.wait(60) == 1
    assert "--cache memory has to keep 0.3 GiB of decoded images, and the smallest object store" in (
        refused.err.read_text()
    )
    # 258 MiB of decoded images, of which the stores of 80 MiB hold only a part at a time.
    streamed = train("streamed", 224, "auto")
    _wait_for_summary(streamed)
    # 64 MiB of decoded images, which every training node has to hold beside the blocks that it decoded.
    kept = train("kept", 112, "memory")
    _wait_for_summary(kept)
    for name in ("streamed", "kept"):
        (row,) = _history(tmp_path / name)
        assert (row["images"], row["bad_images"]) == (_training_images(tmp_path / name), "0.0")
    stats = subprocess.run(
        nodes.on_head("ray", "memory", "--stats-only"),
        env=nodes.variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    spilled = re.findall(r"Spilled (\d+) MiB", stats)
    _report(
        f"object stores of 3 x 80 MiB: 258 MiB of images streamed in {_seconds(tmp_path, 'streamed'):.0f} s, 64 MiB "
        f"kept on each node in {_seconds(tmp_path, 'kept'):.0f} s; spilled since the cluster's start: "
        f"{spilled[0] if spilled else 0} MiB; images lost: 0"
    )


def _seconds(folder, name):
    return json.loads((folder / name / "summary.json").read_text())["seconds"]
