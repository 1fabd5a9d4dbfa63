"""Nodes that lose their power under training, prediction and the service, and what that costs."""

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

from benchmarks.load import read_steady
from benchmarks.photos import write as write_photos
from cnnray.images import manifest as manifests
from tests.conftest import REPOSITORY
from tests.e2e.conftest import until
from tests.runs import final_state, largest_difference, rows_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

TRAINER, PREDICTOR, REPLICA = "ray::RayTrainWorker", "ray::MapWorker", "ray::ServeReplica"


def _train(start, data, output, *arguments):
    return start(
        "train", "--data", data, "--output", output, "--architecture", "small_cnn", "--image-size", "16",
        "--batch-size", "64", "--data-checks", "false", "--checkpoint-every-steps", "10", *arguments,
    )  # fmt: skip


def _ended(job, seconds=300):
    assert job.wait(seconds) == 0, job.err.read_text()[-5000:]
    return json.loads(job.out.read_text().splitlines()[-1])


def _says(job, pattern, seconds=150, times=1):
    """Wait until a job has said something so often."""

    def said():
        text = job.err.read_text()
        assert job.process.poll() is None or len(re.findall(pattern, text)) >= times, text[-5000:]
        return len(re.findall(pattern, text)) >= times

    until(said, seconds, pattern)


def _history(output):
    with Path(output, "history.csv").open() as file:
        return list(csv.DictReader(file))


def _training_images(output):
    """As the history has it."""
    rows = manifests.select_split(manifests.read(str(output / "manifest.parquet")), "train")
    return f"{len(rows)}.0"


def _figure(text):
    print(f"\n{text}")


def _victim(nodes, of):
    """A node, but not the head, that has such a process."""
    return until(lambda: [number for number in nodes.that_run(of) if number], 60, of)[-1]


def test_training_on_two_nodes_survives_the_loss_of_one(nodes, start, all_digits, tmp_path):
    fixed = ("--max-workers", "2", "--cpus-per-worker", "1.5", "--epochs", "3")
    expected = _ended(_train(start, all_digits, tmp_path / "expected", "--cache", "none", *fixed))

    job = _train(start, all_digits, tmp_path / "out", "--cache", "memory", *fixed)
    _says(job, "epoch 1/3  loss")
    time.sleep(3)
    where = nodes.that_run(TRAINER)
    assert len(where) == 2
    nodes.cut_power(_victim(nodes, TRAINER))
    cut = time.monotonic()
    _says(job, "going on from epoch [12], step")
    again = time.monotonic() - cut
    line = _ended(job)
    for mine, wanted in zip(final_state(tmp_path / "out"), final_state(tmp_path / "expected"), strict=True):
        assert largest_difference(mine, wanted) <= 1e-5
    assert [row["images"] for row in _history(tmp_path / "out")] == [_training_images(tmp_path / "out")] * 3
    _figure(
        f"training, a node lost: {line['seconds']:.0f} s, undisturbed {expected['seconds']:.0f} s; it went on after "
        f"{again:.0f} s; images lost: 0"
    )


def test_a_job_waits_for_a_node_that_is_still_to_come(nodes, start, all_digits, tmp_path):
    nodes.cut_power(2)
    noticed = nodes.until_known_to_be_lost(2)
    arguments = ("--max-workers", "3", "--cpus-per-worker", "1.5", "--epochs", "1")
    started = time.monotonic()
    job = _train(start, all_digits, tmp_path / "out", "--wait-minutes", "4", *arguments)
    _says(job, r"waiting for nodes, at most 4m00s: 3 workers of 1\.5 CPUs do not fit 4 CPUs")
    assert not (tmp_path / "out" / "config.yaml").exists()
    nodes.start(2)
    _says(job, "the nodes have come, after")
    waited = time.monotonic() - started
    assert _ended(job)["epochs"] == 1
    _figure(f"Ray knew of a lost node after {noticed:.0f} s; a job that waited for it went on after {waited:.0f} s")


def test_a_job_lets_the_cluster_grow(growing_nodes, start_on, all_digits, tmp_path):
    arguments = ("--max-workers", "2", "--cpus-per-worker", "1.5", "--epochs", "1")
    train = functools.partial(start_on, growing_nodes)
    refused = _train(train, all_digits, tmp_path / "out", *arguments)
    assert refused.wait(60) == 1
    assert "do not fit 1 CPUs: lower --max-workers" in refused.err.read_text()
    started = time.monotonic()
    job = _train(train, all_digits, tmp_path / "out", "--wait-minutes", "4", *arguments)
    _says(job, "waiting for nodes")
    _says(job, "the nodes have come, after")
    waited = time.monotonic() - started
    assert _ended(job)["epochs"] == 1
    _figure(f"a job on a head of 1 CPU let Ray's autoscaler add two nodes, and began after {waited:.0f} s")


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
    )
    _says(job, rf"epoch 1/{epochs}  loss")
    assert len(nodes.that_run(TRAINER)) == 3
    lost = 2
    nodes.cut_power(lost)
    cut = time.monotonic()
    _says(job, r"training on 2 worker\(s\)")
    shrunk = time.monotonic() - cut
    nodes.start(lost)
    back = time.monotonic()
    _says(job, r"training on 3 worker\(s\)", times=2)
    grown = time.monotonic() - back
    line = _ended(job)
    history = _history(tmp_path / "out")
    assert [int(row["epoch"]) for row in history] == list(range(1, epochs + 1))
    assert {row["images"] for row in history} == {_training_images(tmp_path / "out")}
    workers = [int(row["workers"]) for row in history]
    assert set(workers) == {2, 3}
    assert line["metrics"]["val_accuracy"] > 0.9
    _figure(
        f"elastic training: on 2 workers {shrunk:.0f} s after a node of 3 was lost, on 3 workers {grown:.0f} s after "
        f"it came back; workers by epoch {workers}; accuracy {line['metrics']['val_accuracy']:.3f}; images lost: 0"
    )


def test_decoded_images_in_memory_are_made_again_where_a_node_held_them(nodes, all_digits):
    """Blocks of which the only copy was on a lost node."""
    program = f"""
import json, sys, time
import ray
ray.init(logging_level="ERROR")
from cnnray.images import manifest as manifests
from cnnray.training.data import CachedSource, decode_into_memory
rows = manifests.with_targets(manifests.build_manifest({str(all_digits)!r}, labelled=True))
blocks = decode_into_memory(rows, 64, "stretch", 0.25)
nodes = {{node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}}
places = ray.experimental.get_object_locations(blocks)
print("found", json.dumps([[nodes[one] for one in places[block]["node_ids"]] for block in blocks]), flush=True)
sys.stdin.readline()
start = time.monotonic()
source = CachedSource(blocks)
(batch,) = source.batches(range(len(rows)), [len(rows)])
found = len(set(batch["id"].tolist())), int(batch["image"].sum()), time.monotonic() - start
print("found", json.dumps(found), flush=True)
"""
    command = nodes.on_head(sys.executable, "-c", program)
    results = []
    for lose in (False, True):
        process = subprocess.Popen(
            command, env=nodes.variables, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        places = _found(process.stdout)
        if lose:
            holders = [number for number in nodes.others if [nodes.address(number)] in places]
            assert holders, places
            held = places.count([nodes.address(holders[0])])
            nodes.cut_power(holders[0])
        out, _ = process.communicate("\n", timeout=200)
        assert process.returncode == 0
        count, total, seconds = _found(out.splitlines())
        results.append((count, total))
    assert results[0] == results[1]
    assert results[0][0] == 1797
    _figure(f"decoded images in memory: {held} of {len(places)} blocks were made again, after {seconds:.0f} s")


def _found(lines):
    """What a program says it found; Ray writes lines of its own between."""
    return next(json.loads(line.removeprefix("found ")) for line in lines if line.startswith("found "))


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory, all_digits):
    """A bundle of `vgg_bn` at 64x64 with ONNX, of which 2 cores run some hundred images/s."""
    from tests.networks import write_onnx_bundle

    return write_onnx_bundle(tmp_path_factory.mktemp("bundle"), "vgg_bn", 64, f"{all_digits}/*/00*.png")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 2500)


def test_prediction_survives_the_loss_of_a_node(nodes, start, photos, slow_bundle, tmp_path):
    def predict(output):
        return start("predict", "--bundle", slow_bundle, "--input", photos, "--output", output, "--engine", "onnx")

    expected = _ended(predict(tmp_path / "expected"))
    job = predict(tmp_path / "out")
    nodes_with = until(
        lambda: [number for number in nodes.that_run(PREDICTOR) if number], 60, "a worker on another node"
    )
    _says(job, r"[1-9]\d*/2500 images")
    nodes.cut_power(nodes_with[-1])
    line = _ended(job)
    rows, wanted = ({row["id"]: row for row in rows_of(tmp_path / name)} for name in ("out", "expected"))
    assert len(rows_of(tmp_path / "out")) == len(rows) == len(wanted) == 2500
    assert line["errors"] == 0
    for key, row in wanted.items():
        assert (row["uri"], row["prediction"]) == (rows[key]["uri"], rows[key]["prediction"])
        assert math.isclose(row["confidence"], rows[key]["confidence"], rel_tol=1e-5)
    _figure(
        f"prediction, a node lost: {line['seconds']:.0f} s, undisturbed {expected['seconds']:.0f} s; images lost: 0"
    )


def test_the_service_survives_the_loss_of_a_node(nodes, start, photos, onnx_bundle):
    rate, seconds = 20, 60
    job = start(
        "serve", "--bundle", onnx_bundle, "--host", "0.0.0.0", "--min-replicas", "3", "--max-replicas", "3",
        "--cpus-per-replica", "1", "--engine", "onnx",
    )  # fmt: skip
    assert _ended(job)["replicas"] == 3
    before = nodes.that_run(REPLICA)
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
    nodes.cut_power(_victim(nodes, REPLICA))
    cut = time.monotonic() - started
    left = sum(len(nodes.processes(number, REPLICA)) for number in nodes.that_run(REPLICA))
    assert left < 3
    until(
        lambda: sum(len(nodes.processes(number, REPLICA)) for number in nodes.that_run(REPLICA)) >= 3,
        120,
        "3 replicas",
    )
    replaced = time.monotonic() - started - cut
    answers = read_steady(load)
    answered = answers.statuses.get("200", 0)
    last = max([cut, *answers.failed_at]) - cut
    _figure(
        f"service at {rate} requests/s, a node lost: {answered} of {rate * seconds} answered 200 "
        f"({answers.statuses}), the last failed one asked {last:.0f} s after it, 3 replicas again after "
        f"{replaced:.0f} s; slowest answer {max(answers.milliseconds):.0f} ms"
    )
    # Those in the dead replica's hands, and those sent to it until that is known.
    assert answered >= 0.98 * rate * seconds
    assert not [due for due in answers.failed_at if due > cut + 20]
    subprocess.run(
        nodes.on_head("serve", "shutdown", "--yes", "--address", f"http://{nodes.address(0)}:8265"),
        env=nodes.variables, check=True, capture_output=True,
    )  # fmt: skip
    until(lambda: not nodes.that_run(REPLICA), 60, "the end of the service")


def test_object_stores_too_small_for_the_images(nodes, start, all_digits, tmp_path):
    def train(name, size, cache):
        return start(
            "train", "--data", all_digits, "--output", tmp_path / name, "--architecture", "small_cnn", "--image-size",
            size, "--epochs", "1", "--cpus-per-worker", "1.5", "--data-checks", "false", "--cache", cache,
            "--validation-fraction", "0.8",  # reading is the same, and training takes most of the time
        )  # fmt: skip

    refused = train("refused", 224, "memory")
    assert refused.wait(60) == 1
    assert "--cache memory has to keep 0.3 GiB of decoded images, and the smallest object store" in (
        refused.err.read_text()
    )
    # 258 MiB of decoded images, of which stores of 80 MiB hold a part at a time.
    streamed = train("streamed", 224, "auto")
    _ended(streamed)
    # 64 MiB, which every node that trains has to hold, beside those that it made itself.
    kept = train("kept", 112, "memory")
    _ended(kept)
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
    _figure(
        f"object stores of 3 x 80 MiB: 258 MiB of images streamed in {_seconds(tmp_path, 'streamed'):.0f} s, 64 MiB "
        f"kept on each node in {_seconds(tmp_path, 'kept'):.0f} s; spilled since the cluster's start: "
        f"{spilled[0] if spilled else 0} MiB; images lost: 0"
    )


def _seconds(folder, name):
    return json.loads((folder / name / "summary.json").read_text())["seconds"]
