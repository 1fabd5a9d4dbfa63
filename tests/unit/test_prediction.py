"""The code of a prediction run that needs no cluster."""

import collections
import csv
import dataclasses
import json
import logging
import subprocess
import sys

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray import cluster
from cnnray.cluster import ClusterError, Node, Resources
from cnnray.images.manifest import manifest_from_uris
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleError, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.prediction.config import PredictConfig, PredictOptions
from cnnray.prediction.parts import Collector, PartError, Parts, list_part_files
from cnnray.prediction.plan import fits_this_process, plan_on_cluster
from cnnray.prediction.pool import Pool, plan_pool
from cnnray.prediction.summary import ErrorList, Tally, summarize
from cnnray.prediction.worker import Worker, decode_rows, select_columns
from cnnray.progress import ProgressBar
from tests.awkward import awkward_images, bad_images
from tests.malformed import malformed_files
from tests.networks import coloured_noise, fitted

SIZE = 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle of three classes."""
    folder = tmp_path_factory.mktemp("bundle")
    model = fitted("small_cnn", SIZE, *coloured_noise(48, SIZE))
    bundles.save(model, BundleInfo(class_names=["red", "green", "blue"], image_size=SIZE), folder)
    return Bundle.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": "tensorrt"}, "--engine 'tensorrt': expected auto, keras, onnx"),
        ({"engine": "onnx", "embeddings": True}, "--embeddings needs --engine keras, not onnx"),
        ({"top_k": 0}, "--top-k must be at least 1, not 0"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker must be more than 0"),
        ({"gpus_per_worker": 2}, "--gpus-per-worker must be 0 to 1"),
        ({"min_workers": 3, "max_workers": 2}, "--min-workers 3 is more than --max-workers 2"),
        ({"shards": 2, "shard": 2}, "--shard must be 0 to 1"),
        ({"max_error_fraction": 1.5}, "--max-error-fraction must be 0 to 1"),
        ({"output": ""}, "--output is empty"),
        ({"output": "/in/out"}, "--output /in/out lies in --input /in"),
        ({"input": "ftp://x"}, "neither a local path nor"),
    ],
)
def test_impossible_flags_are_refused(changes, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        PredictConfig(**{"bundle": "/b", "input": "/in", "output": "/out"} | changes)


def _cluster(*nodes):
    return Resources(tuple(Node(cpus=cpus, gpus=gpus) for cpus, gpus in nodes))


@pytest.mark.parametrize(
    ("nodes", "engine", "options", "expected"),
    [
        ([(2, 0)], "onnx", {}, Pool(smallest=1, first=2, largest=2)),
        ([(0.5, 0)], "onnx", {}, Pool(smallest=1, first=1, largest=1, cpus=0.5)),
        ([(8, 0), (8, 0)], "onnx", {"cpus_per_worker": 4}, Pool(smallest=1, first=4, largest=4, cpus=4)),
        ([(2, 0)], "onnx", {"max_workers": 9}, Pool(smallest=1, first=2, largest=9)),
        ([(4, 0)], "onnx", {"decoding": "tasks"}, Pool(smallest=1, first=2, largest=2, decode_cpus=1)),
        ([(8, 2)], "keras", {}, Pool(smallest=1, first=2, largest=2, cpus=4, gpus=1)),
        ([(8, 2)], "keras", {"gpus_per_worker": 0}, Pool(smallest=1, first=8, largest=8)),
        ([(8, 2)], "onnx-int8", {}, Pool(smallest=1, first=8, largest=8)),
        ([(4, 1), (16, 0)], "keras", {}, Pool(smallest=1, first=1, largest=1, gpus=1, decode_cpus=1)),
        ([(4, 1), (16, 0)], "keras", {"decoding": "workers"}, Pool(smallest=1, first=1, largest=1, cpus=4, gpus=1)),
    ],
)
def test_the_pool_fits_the_cluster(nodes, engine, options, expected):
    assert plan_pool(PredictOptions(**options), engine, _cluster(*nodes)) == expected


@pytest.mark.parametrize(
    ("nodes", "options", "sentence"),
    [
        ([(2, 0), (2, 0)], {"cpus_per_worker": 4}, "No worker of 4 CPUs and 0 GPUs fits the cluster's 2 node"),
        ([(2, 0)], {"gpus_per_worker": 1}, "No worker of 1 CPUs and 1 GPUs fits"),
        ([(2, 0)], {"decoding": "tasks", "max_workers": 2}, "2 workers of 1 CPUs leave none of the cluster's 2"),
        ([(2, 0), (2, 0)], {"decoding": "tasks", "cpus_per_worker": 1, "max_workers": 4}, "leave none"),
        ([(0, 0)], {}, "The cluster has no CPUs"),
        ([(2, 0)], {"min_workers": 3}, "--min-workers 3 do not fit the cluster, which has room for 2"),
    ],
)
def test_pools_that_would_wait_for_ever_are_refused(nodes, options, sentence):
    with pytest.raises(ClusterError, match=sentence):
        plan_pool(PredictOptions(**options), "onnx", _cluster(*nodes))


@pytest.mark.parametrize(
    ("images", "options", "environment", "gpus", "fits"),
    [
        (4096, {}, {}, False, True),
        (4097, {}, {}, False, False),
        (1, {"dashboard": True}, {}, False, False),
        (1, {"max_workers": 1}, {}, False, False),
        (1, {"cpus_per_worker": 1.0}, {}, False, False),
        (1, {"min_workers": 1}, {}, False, False),
        (1, {"decoding": "tasks"}, {}, False, False),
        (1, {}, {"RAY_ADDRESS": "auto"}, False, False),
        (1, {}, {}, True, False),
    ],
)
def test_few_images_are_classified_without_ray(images, options, environment, gpus, fits, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "is_connected", lambda: False)
    monkeypatch.setattr(cluster, "may_have_gpus", lambda: gpus)
    assert fits_this_process(PredictOptions(**options), images) is fits


# -- workers --------------------------------------------------------------------------------------------------


def _plan(bundle, **options):
    return plan_on_cluster(bundle, PredictOptions(engine="keras", **options), _cluster((1, 0)))


def _worker(bundle, **options):
    return Worker(_plan(bundle, **options), "model-1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The awkward images, the bad ones and a missing file: bytes by path, and their manifest."""
    folder = tmp_path_factory.mktemp("images")
    contents = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    files = {str(folder / name): data for name, data in contents.items()} | {str(folder / "zz.png"): None}
    return files, manifest_from_uris(list(files))


@pytest.mark.parametrize("decoded_in_tasks", [False, True])
def test_a_worker_predicts_as_predictor_does(decoded_in_tasks, bundle, files):
    contents, manifest = files
    manifest = manifest.append_column("weight", pa.array([None, *range(1, len(manifest))], pa.int16()))
    worker, predictor = _worker(bundle, top_k=2), Predictor(bundle, top_k=2)
    tables = [manifest]
    if decoded_in_tasks:
        tables = decode_rows(manifest, SIZE, "stretch", 10)
    rows = pa.concat_tables(block for table in tables for block in worker(table))
    assert rows.select(manifest.column_names).equals(manifest)
    assert set(rows["model"].to_pylist()) == {"model-1"}
    for row in rows.to_pylist():
        data = contents[row["uri"]]
        if data is None:
            assert (row["status"], row["error"].partition(":")[0]) == ("error", "missing")
            continue
        (prediction,) = predictor([data])
        if row["status"] == "error":
            assert row["error"] == str(prediction)
            assert row["prediction"] is row["confidence"] is row["top_k_labels"] is row["top_k_scores"] is None
        else:
            assert row["error"] is None
            assert row["prediction"] == prediction.label
            assert row["top_k_labels"] == [name for name, _ in prediction.top_k]
            np.testing.assert_allclose(row["top_k_scores"], [score for _, score in prediction.top_k], atol=1e-5)
            assert row["confidence"] == row["top_k_scores"][0]


def test_probabilities_and_embeddings_are_lists_of_fixed_size(bundle, files):
    contents, manifest = files
    rows = pa.concat_tables(_worker(bundle, probabilities=True, embeddings=True, batch_size=5)(manifest))
    assert rows.schema.field("probabilities").type == pa.list_(pa.float32(), 3)
    features = bundle.model.get_layer("logits").input
    assert rows.schema.field("embedding").type == pa.list_(pa.float32(), features.shape[1])
    good = rows.filter(pa.compute.equal(rows["status"], "ok"))
    assert rows["probabilities"].null_count == rows["embedding"].null_count == len(rows) - len(good)
    from cnnray.images.decode import decode

    images = np.stack([decode(contents[uri], SIZE) for uri in good["uri"].to_pylist()])
    expected = np.asarray(keras.Model(bundle.model.inputs, features)(images, training=False))
    np.testing.assert_allclose(np.stack(good["embedding"].to_pylist()), expected, atol=1e-4)
    np.testing.assert_allclose(
        np.stack(good["probabilities"].to_pylist()), Predictor(bundle).probabilities(images), atol=1e-5
    )


def test_rows_have_the_same_columns_when_all_images_are_bad(bundle, files):
    _, manifest = files
    worker = _worker(bundle, probabilities=True, embeddings=True)
    bad = manifest.filter(pa.compute.match_substring(manifest["uri"], "zz.png"))
    assert pa.concat_tables(worker(bad)).schema == pa.concat_tables(worker(manifest)).schema


@pytest.mark.parametrize("embeddings", [False, True])
def test_an_image_without_probabilities_is_an_error(embeddings, bundle, files, monkeypatch):
    """A network with damaged weights gives values that are not finite, int8 rounding only zeros."""
    _, manifest = files
    worker = _worker(bundle, probabilities=True, embeddings=embeddings)
    before = pa.concat_tables(worker(manifest)).to_pylist()
    name = "all_outputs" if embeddings else "probabilities"
    original, calls = getattr(worker._predictor, name), []

    def damaged(images):
        outputs = original(images)
        if not calls and len(images) > 3:
            calls.append(len(images))
            values = np.array(outputs[0] if embeddings else outputs)
            values[[0, 2]] = [[np.nan, 0.5, 0.5], [0, 0, 0]]
            outputs = outputs._replace(probabilities=values) if embeddings else values
        return outputs

    monkeypatch.setattr(worker._predictor, name, damaged)
    after = pa.concat_tables(worker(manifest)).to_pylist()
    assert calls
    first, _, third = [row["id"] for row in before if row["status"] == "ok"][:3]
    changed = {row["id"]: row["error"] for row, other in zip(after, before, strict=True) if row != other}
    assert changed == {
        first: "no probabilities: the network's output is not finite",
        third: "no probabilities: the network's output is zero for each class",
    }
    for row in after:
        assert (row["status"] == "error") == bool(row["error"]) == (row["prediction"] is None)
        assert (row["probabilities"] is None) == bool(row["error"])


def test_a_worker_refuses_a_bundle_that_changed_since_the_plan(bundle):
    plan = dataclasses.replace(_plan(bundle), digest="other")
    with pytest.raises(BundleError, match="was changed while the run was going on: run it again"):
        Worker(plan, "model-1")


def test_manifest_columns_with_names_of_output_columns_are_renamed():
    manifest = manifest_from_uris(["/a.png"]).append_column("prediction", [["cat"]]).append_column("mine", [[1]])
    assert select_columns(manifest).column_names == ["id", "uri", "original_prediction", "mine"]
    twice = manifest.append_column("original_prediction", [["dog"]])
    assert select_columns(twice).column_names[-1] == "original_prediction"
    assert "original_original_prediction" in select_columns(twice).column_names
    labelled = manifest.set_column(2, "label", [["dog"]])
    assert "label" in select_columns(labelled).column_names


# -- parts ----------------------------------------------------------------------------------------------------


def _rows(ids):
    errors = ['corrupt: a, "b"\r\nc\rd' if number % 3 == 0 else None for number in ids]
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "uri": [f"/Ü, x/{number}.png" for number in ids],
            "status": ["error" if error else "ok" for error in errors],
            "error": pa.array(errors, pa.string()),
            "prediction": pa.array([None if error else "null" for error in errors], pa.string()),
            "confidence": pa.array([None if error else 0.25 for error in errors], pa.float32()),
            "top_k_scores": pa.array([None if error else [0.25, 0.125] for error in errors], pa.list_(pa.float32())),
        }
    )


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_parts_are_written_when_complete_and_read_back_unchanged(kind, tmp_path):
    parts = Parts(str(tmp_path), kind, [(0, 4), (4, 8), (8, 9)])
    collector = Collector(parts, np.arange(100, 109))
    steps = {(108,): {2}, (103, 105): {2}, (100, 102, 104): {2}, (107,): {2}, (101, 106): {0, 1, 2}}
    for ids, written in steps.items():
        collector.add(_rows(list(ids)))
        assert parts.written() == written
    assert parts.written() == {0, 1, 2}
    columns = ["id", "uri", "status", "error", "prediction", "confidence"]
    for part, (start, stop) in enumerate(parts.ranges):
        rows = parts.read(part)
        assert rows.equals(_rows(list(range(100 + start, 100 + stop))).select(columns).cast(rows.schema))
        assert not parts.problem(part, rows, np.arange(100, 109))
    assert len(list_part_files(str(tmp_path))) == 3
    (tmp_path / "shard-0-of-2").mkdir()
    (tmp_path / "shard-0-of-2" / "part-000000.parquet").write_bytes(b"")
    assert len(list_part_files(str(tmp_path))) == 3


def _with_trouble(rows, ids):
    errors = [
        "unavailable: S3 asks for fewer requests." if number in ids else None for number in rows["id"].to_pylist()
    ]
    return rows.set_column(rows.column_names.index("error"), "error", pa.array(errors, pa.string()))


@pytest.mark.parametrize("leave_out", [True, False])
def test_rows_whose_storage_was_in_trouble_are_left_out_of_their_part(leave_out, tmp_path):
    parts = Parts(str(tmp_path), "parquet", [(0, 4), (4, 8), (8, 10)])
    collector = Collector(parts, np.arange(10), leave_out=leave_out)
    for ids in ([5, 0, 9], [1, 2, 8, 7], [3, 4, 6]):
        collector.add(_with_trouble(_rows(ids), {1, 8, 9}))
    names = ["part-000000-incomplete.parquet", "part-000001.parquet"]
    if not leave_out:
        names = ["part-000000.parquet", "part-000001.parquet", "part-000002.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert parts.written() == ({1} if leave_out else {0, 1, 2})
    assert parts.incomplete_files() == ([str(tmp_path / names[0])] if leave_out else [])
    ids = pyarrow.parquet.read_table(tmp_path / names[0])["id"].to_pylist()
    assert ids == ([0, 2, 3] if leave_out else [0, 1, 2, 3])
    left_out = collector.left_out
    assert (sorted(left_out["id"].to_pylist()) if left_out else []) == ([1, 8, 9] if leave_out else [])


def test_lost_and_repeated_rows_are_detected(tmp_path):
    parts = Parts(str(tmp_path), "parquet", [(0, 3)])
    collector = Collector(parts, np.arange(3))
    collector.add(_rows([0]))
    collector.add(_rows([2]))
    with pytest.raises(PartError, match=r"missing 1 \(1\); more than once 2 \(1\)"):
        collector.add(_rows([2]))
    assert parts.written() == set()


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_damaged_part_is_reported(kind, tmp_path):
    parts = Parts(str(tmp_path), kind, [(0, 3)])
    (tmp_path / f"part-000000.{kind}").write_bytes(b'{"id": 1\n')
    with pytest.raises(PartError, match=r"is damaged .*: delete it, and run again"):
        parts.read(0)


# -- the summary ----------------------------------------------------------------------------------------------


def test_the_summary_counts_every_row(tmp_path, bundle):
    tally, errors = Tally(0.5), ErrorList()
    for ids in ([0, 1, 2], [3, 4]):
        tally.add(_rows(ids))
        errors.add(_rows(ids))
    info = dataclasses.replace(bundle.info, class_names=["null", "other"], class_counts={"null": 3, "other": 1})
    summary = summarize(tally, info)
    assert (summary["rows"], summary["ok"], summary["errors"]) == (5, 3, 2)
    assert summary["errors_by_reason"]["corrupt"]["images"] == 2
    assert [example["id"] for example in summary["errors_by_reason"]["corrupt"]["examples"]] == [0, 3]
    assert summary["classes"]["null"] == {"images": 3, "share": 1.0, "training_share": 0.75}
    assert summary["below_threshold"] == 1.0
    errors.write(str(tmp_path / "errors.csv"))
    with (tmp_path / "errors.csv").open(newline="") as file:
        assert list(csv.reader(file))[:2] == [["id", "uri", "error"], ["0", "/Ü, x/0.png", 'corrupt: a, "b"\r\nc\rd']]


def test_malformed_files_neither_crash_a_worker_nor_fill_its_memory(bundle, tmp_path):
    """Runs in its own process, which a crash would end."""
    files = malformed_files()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    panorama = Image.new("RGB", (20_000, 10_000), "teal")
    for name, options in (("panorama.jpg", {}), ("panorama_progressive.jpg", {"progressive": True})):
        panorama.save(tmp_path / name, "JPEG", quality=50, **options)
        (tmp_path / f"again_{name}").hardlink_to(tmp_path / name)
    program = f"""
import json, resource
from cnnray.images.manifest import manifest_from_uris
from cnnray.models.bundle import Bundle
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.plan import Plan
from cnnray.prediction.pool import Pool
from cnnray.prediction.worker import Worker
from pathlib import Path
pool = Pool(smallest=1, first=1, largest=1)
bundle = Bundle.load({bundle.uri!r})
digest = bundle.digest("model.keras")
plan = Plan(bundle=bundle, engine="keras", options=PredictOptions(), pool=pool, digest=digest)
worker = Worker(plan, "model")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = manifest_from_uris([str(path) for path in Path({str(tmp_path)!r}).iterdir()])
rows = [row for table in worker(manifest) for row in table.select(["uri", "status", "error"]).to_pylist()]
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([rows, growth / 1024]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows, growth = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == len(files) + 4
    reasons = collections.Counter((row["error"] or "ok").partition(":")[0] for row in rows)
    assert set(reasons) <= {"ok", "empty", "not an image", "corrupt", "too many pixels", "unsupported"}
    assert reasons["corrupt"] > 100
    assert reasons["ok"] < len(rows) / 3
    assert growth < 1024, f"{growth:.0f} MiB"


def test_the_time_left_is_not_known_before_the_first_image(caplog):
    caplog.set_level(logging.INFO)
    ProgressBar(100).close()
    assert caplog.messages == ["0/100 images  0 images/s  ? left  "]
