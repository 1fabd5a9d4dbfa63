"""The code of a prediction run that needs no cluster."""

import collections
import contextlib
import csv
import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray import cluster, commandline
from cnnray.cluster import ClusterError, Node, Resources
from cnnray.flags import flag_name
from cnnray.images import shards, storage
from cnnray.images.inputs import VERSION
from cnnray.images.lease import LeaseLostError
from cnnray.images.manifest import manifest_from_uris
from cnnray.images.shards import Range
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleError, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.prediction import dispatch, listed, parts, resume, tally, verify
from cnnray.prediction.config import PredictConfig, PredictOptions
from cnnray.prediction.dispatch import Dispatcher, PredictionError
from cnnray.prediction.listed import ListedTasks
from cnnray.prediction.parts import Part, PartError
from cnnray.prediction.plan import fits_this_process, plan_on_cluster
from cnnray.prediction.pool import Pool, plan_pool
from cnnray.prediction.ranges import Output, RangeWorker, Task
from cnnray.prediction.reconcile import Received, reconcile
from cnnray.prediction.summary import summarize
from cnnray.prediction.tally import Tally, error_rows, join_errors, write_errors
from cnnray.prediction.worker import Worker, decode_rows, select_columns
from cnnray.progress import ProgressBar
from tests.awkward import awkward_images, bad_images
from tests.e2e.conftest import until
from tests.malformed import malformed_files
from tests.networks import coloured_noise, fitted

SIZE = 32
FLAGS = ["--bundle", "/b", "--input", "/in", "--output", "/out"]


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
        ({"max_error_fraction": 1.5}, "--max-error-fraction must be 0 to 1"),
        ({"output": ""}, "--output is empty"),
        ({"output": "/in/out"}, "--output /in/out lies in --input /in"),
        ({"input": "ftp://x"}, "neither a local path nor"),
    ],
)
def test_impossible_flags_are_refused(changes, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        PredictConfig(**{"bundle": "/b", "input": "/in", "output": "/out"} | changes)


@pytest.mark.parametrize("flags", [["--shards", "2", "--shard", "1"], ["--shards", "8"]])
def test_shards_of_a_run_are_refused_with_a_sentence(flags, capsys):
    with pytest.raises(SystemExit):
        commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, *flags])
    assert "--shards and --shard are gone: one run classifies any number of images" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["update", "verify", "retry_errors", "overwrite", "dry_run"])
def test_what_a_run_does_with_an_earlier_one_is_a_flag(flag):
    for arguments in ([], ["true"]):
        config = commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, flag_name(flag), *arguments])
        assert config == PredictConfig(bundle="/b", input="/in", output="/out", **{flag: True})


def test_a_single_shard_is_the_whole_run(tmp_path):
    expected = PredictConfig(bundle="/b", input="/in", output="/out")
    assert commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, "--shards", "1"]) == expected
    assert commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, "--shards", "1", "--shard", "0"]) == expected
    (tmp_path / "config.yaml").write_text("bundle: /b\ninput: /in\noutput: /out\nshards: 1\nshard: 0\n")
    written = ["--config", str(tmp_path / "config.yaml")]
    assert commandline.parse(PredictConfig, "jobs/predict.py", written) == expected


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
    return Worker(_plan(bundle, **options))


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
    rows = manifest
    if decoded_in_tasks:
        rows = pa.concat_tables(decode_rows(manifest.slice(start, 10), SIZE, "stretch") for start in (0, 10))
        rows = pa.concat_tables([rows, decode_rows(manifest.slice(20), SIZE, "stretch")])
    rows = pa.concat_tables(worker(rows))
    assert rows.select(manifest.column_names).equals(manifest)
    assert set(rows["model"].to_pylist()) == {bundle.version}
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
        Worker(plan)


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


def _write_part(folder, ids, *, generation=0, attempt=0, incomplete=False, format_="parquet", first=None):
    part = Part(ids[0] if first is None else first, generation, attempt, incomplete, format_)
    assert parts.write(str(folder), part, _rows(list(ids)), Tally.of(_rows(list(ids)), 0.5))
    return part


@pytest.mark.parametrize(
    ("part", "name", "errors_name"),
    [
        (Part(0, 0, 0, False, "parquet"), "part-000000000000-0.0.parquet", "errors-000000000000-0.0.csv"),
        (Part(4096, 12, 3, False, "csv"), "part-000000004096-12.3.csv", "errors-000000004096-12.3.csv"),
        (
            Part(7, 1, 0, True, "csv"),
            "part-000000000007-1.0-incomplete.csv",
            "errors-000000000007-1.0-incomplete.csv",
        ),
        (Part(10**13, 0, 0, False, "jsonl"), "part-10000000000000-0.0.jsonl", "errors-10000000000000-0.0.csv"),
    ],
)
def test_the_name_of_a_part_says_which_it_is(part, name, errors_name):
    assert (part.name, part.errors_name) == (name, errors_name)
    assert parts.parse_name(name) == part
    assert parts.parse_name(errors_name) is None
    assert parts.is_part_or_errors(name)
    assert parts.is_part_or_errors(errors_name)


@pytest.mark.parametrize(
    "name",
    [
        "part-000000.parquet", "part-000000-incomplete.parquet", "part-000000000000-0.parquet",
        "part-000000000000-0.0.txt", "part-000000000000-0.0.parquet.tmp", "part-000000000000-0.0-other.parquet",
        "shard-0-of-2/part-000000000000-0.0.parquet", "errors.csv", "errors-000000000000-0.0.parquet", "summary.json",
        "rows-000000000000.parquet",
    ],
)  # fmt: skip
def test_other_files_are_no_parts(name, tmp_path):
    assert parts.parse_name(name) is None
    assert not parts.is_part_or_errors(name)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    part = _write_part(tmp_path, range(2))
    assert list(parts.list_parts(str(tmp_path))) == [part]


def test_the_parts_of_a_folder_are_listed_by_their_ids(tmp_path):
    assert list(parts.list_parts(str(tmp_path / "none"))) == []
    written = [_write_part(tmp_path, range(first, first + 2)) for first in (10, 9, 2, 1000)]
    written.append(_write_part(tmp_path, range(2, 4), attempt=1))
    assert list(parts.list_parts(str(tmp_path))) == sorted(written)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_part_is_created_once_and_read_back_unchanged(kind, tmp_path):
    rows = _rows(list(range(100, 109)))
    part, tally = Part(100, 0, 0, False, kind), Tally.of(rows, 0.5)
    assert parts.write(str(tmp_path), part, rows, tally)
    content = (tmp_path / part.name).read_bytes()
    read = parts.read(str(tmp_path), part)
    assert read.column_names == ["id", "uri", "status", "error", "prediction", "confidence"]
    assert read.equals(rows.select(read.column_names).cast(read.schema))
    assert parts.read_tally(str(tmp_path), part, 0.5) == tally
    assert parts.write(str(tmp_path), part, rows, tally)  # by another worker, of the same images
    other = _rows(list(range(100, 108)))
    assert not parts.write(str(tmp_path), part, other, Tally.of(other, 0.5))
    assert (tmp_path / part.name).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    if kind == "parquet":
        assert parts.read_all(str(tmp_path), part).equals(rows)


def test_storage_that_returns_other_bytes_than_it_was_given_is_reported(tmp_path, monkeypatch):
    part = Part(0, 0, 0, False, "parquet")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", lambda uri: b"other")
        with pytest.raises(PartError, match=r"-0.0.parquet was read back with other content than was written: check"):
            parts.write(str(tmp_path), part, _rows([0]), Tally.of(_rows([0]), 0.5))


def test_a_part_counts_as_written_where_the_answer_to_its_request_was_lost(tmp_path, monkeypatch):
    create = storage.create
    monkeypatch.setattr(storage, "create", lambda uri, data: create(uri, data) and False)
    assert _write_part(tmp_path, range(3)) in parts.list_parts(str(tmp_path))


@pytest.mark.parametrize("was_written", [True, False])
def test_the_request_that_creates_a_part_is_repeated_where_it_got_no_answer_and_did_nothing(was_written, monkeypatch):
    stored = {}

    def write_if(uri, data, expected):
        requests.append(uri)
        is_first, is_free = len(requests) == 1, uri not in stored
        if is_free and (was_written or not is_first):
            stored[uri] = data
        if is_first:
            raise storage.UnavailableError("S3 cannot be reached.")
        return {"e_tag": "1"} if is_free else None

    requests = []
    monkeypatch.setattr(storage, "write_if", write_if)
    monkeypatch.setattr(storage, "is_file", lambda uri: uri in stored)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: stored[uri])
    part = _write_part("s3://bucket/out", range(3))
    assert requests == [f"s3://bucket/out/{part.name}"] * (1 if was_written else 2)
    assert list(stored) == requests[:1]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("data", [b'{"id": 1\n', b"", b'{"id": 1}\n', b"id,uri\r\n1,/a\r\n", b"PAR1"])
def test_a_damaged_part_is_reported(data, kind, tmp_path):
    part = Part(0, 0, 0, False, kind)
    (tmp_path / part.name).write_bytes(data)
    readers = [parts.read, lambda *arguments: parts.read_tally(*arguments, 0.5)]
    if kind == "jsonl" and not data:
        assert [len(parts.read(str(tmp_path), part)), parts.read_tally(str(tmp_path), part, 0.5).rows] == [0, 0]
        return
    for read in [*readers, parts.read_all] if kind == "parquet" else readers:
        with pytest.raises(PartError, match=r"part-000000000000-0.0.\w+ is damaged .*: delete it, and run again"):
            read(str(tmp_path), part)
    (tmp_path / part.name).unlink()
    for read in readers:
        with pytest.raises(PartError, match=r"was deleted while the run was going on: run the same command again"):
            read(str(tmp_path), part)


def test_the_tally_of_a_part_is_counted_where_its_footer_has_none_for_the_threshold(tmp_path):
    part = _write_part(tmp_path, range(9))
    for threshold, below in ((0.5, 6), (0.25, 0), (0.3, 6)):
        tally = parts.read_tally(str(tmp_path), part, threshold)
        assert (tally.threshold, tally.rows, tally.below_threshold) == (threshold, 9, below)
    table = pyarrow.parquet.read_table(tmp_path / part.name).replace_schema_metadata(None)
    pyarrow.parquet.write_table(table, tmp_path / part.name)
    assert parts.read_tally(str(tmp_path), part, 0.5) == Tally.of(_rows(list(range(9))), 0.5)


# -- ranges ---------------------------------------------------------------------------------------------------


class _Classifier:
    """Stands in for a worker, and writes down which images it has read."""

    def __init__(self, plan):
        self.read, self.trouble = [], set()

    def __call__(self, rows):
        ids = rows["id"].to_pylist()
        self.read += ids
        errors = ["unavailable: S3 asks for fewer requests." if number in self.trouble else None for number in ids]
        errors = ["corrupt: x" if number % 10 == 3 else error for number, error in zip(ids, errors, strict=True)]
        good = [error is None for error in errors]
        columns = {
            "status": ["ok" if is_good else "error" for is_good in good],
            "error": pa.array(errors, pa.string()),
            "prediction": pa.array(["cat" if is_good else None for is_good in good], pa.string()),
            "confidence": pa.array([0.75 if is_good else None for is_good in good], pa.float32()),
        }
        for start in range(0, len(rows), 4):  # blocks
            block = rows.slice(start, 4)
            for name, values in columns.items():
                block = block.append_column(name, pa.array(values).slice(start, 4))
            yield block


def _manifest(folder, rows, rows_per_range=10, **columns):
    """Write the shards of a manifest, and give its ranges."""
    table = pa.table({"uri": [f"/{number:04d}.png" for number in range(rows)], **columns})
    table = table.append_column(VERSION, pa.array(["1"] * rows, pa.string()))
    return list(shards.write(str(folder), [table], rows_per_range=rows_per_range, generation=0))


def _range_worker(tmp_path, **options):
    options = {"format": "parquet", "threshold": 0.5, "skip_unreadable": False} | options
    output = Output(folder=str(tmp_path / "out"), manifest=str(tmp_path / "manifest"), **options)
    (tmp_path / "out").mkdir(exist_ok=True)
    plan = SimpleNamespace(pool=SimpleNamespace(decode_cpus=0))
    worker = RangeWorker(plan, output, _Classifier)
    return worker, worker._worker


def test_a_range_is_committed_with_the_columns_of_the_manifest(tmp_path):
    (_, range_) = _manifest(tmp_path / "manifest", 17, shot=list(range(17)), error=["none"] * 17)
    worker, classifier = _range_worker(tmp_path)
    receipt = worker.run(Task(range=range_))
    assert (receipt.range, receipt.classified, receipt.unavailable) == (range_, 7, None)
    assert receipt.part == Part(10, 0, 0, False, "parquet")
    rows = parts.read_all(str(tmp_path / "out"), receipt.part)
    assert rows.column_names == [
        "id", "uri", "shot", "original_error", "status", "error", "prediction", "confidence",
    ]  # fmt: skip
    assert rows["id"].to_pylist() == rows["shot"].to_pylist() == classifier.read == list(range(10, 17))
    assert receipt.tally == Tally.of(rows, 0.5)
    assert (tmp_path / "out" / receipt.part.errors_name).read_text() == "id,uri,error\n13,/0013.png,corrupt: x\n"


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_whose_storage_was_in_trouble_are_left_out_of_their_part_and_classified_later(kind, tmp_path):
    (range_,) = _manifest(tmp_path / "manifest", 10)
    worker, classifier = _range_worker(tmp_path, format=kind)
    classifier.trouble = {1, 8, 9}
    receipt = worker.run(Task(range=range_))
    assert receipt.part == Part(0, 0, 0, True, kind)
    assert (receipt.tally.rows, receipt.tally.errors, receipt.unavailable.rows) == (7, 1, 3)
    assert receipt.unavailable.reasons == {"unavailable": 3}
    assert parts.read(str(tmp_path / "out"), receipt.part)["id"].to_pylist() == [0, 2, 3, 4, 5, 6, 7]
    with (tmp_path / "out" / receipt.part.errors_name).open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["1", "3", "8", "9"]

    task = resume.plan_task(range_, resume.Committed(_config(tmp_path, format=kind)), frozenset())
    classifier.read, classifier.trouble = [], set()
    receipt = worker.run(task)
    assert receipt.part == Part(0, 0, 1, False, kind)
    assert classifier.read == ([1, 8, 9] if kind == "parquet" else list(range(10)))
    assert (receipt.classified, receipt.tally.rows, receipt.unavailable) == (len(classifier.read), 10, None)
    assert parts.read(str(tmp_path / "out"), receipt.part)["id"].to_pylist() == list(range(10))


def test_rows_whose_storage_was_in_trouble_have_an_error_if_asked_for(tmp_path):
    (range_,) = _manifest(tmp_path / "manifest", 10)
    worker, classifier = _range_worker(tmp_path, skip_unreadable=True)
    classifier.trouble = {1, 8}
    receipt = worker.run(Task(range=range_))
    assert receipt.part == Part(0, 0, 0, False, "parquet")
    assert (receipt.tally.reasons, receipt.unavailable) == ({"unavailable": 2, "corrupt": 1}, None)
    assert parts.read(str(tmp_path / "out"), receipt.part)["id"].to_pylist() == list(range(10))
    # Repeated by --retry-errors, but not what is wrong with the images themselves.
    classifier.read, classifier.trouble = [], set()
    receipt = worker.run(Task(range=range_, attempt=1, earlier=receipt.part, retry=True))
    assert classifier.read == [1, 8]
    assert receipt.tally.reasons == {"corrupt": 1}


def test_a_worker_that_was_overtaken_reports_the_part_that_is_there(tmp_path):
    (range_,) = _manifest(tmp_path / "manifest", 10)
    first, second = _range_worker(tmp_path, skip_unreadable=True), _range_worker(tmp_path, skip_unreadable=True)
    second[1].trouble = {1}
    receipts = [worker.run(Task(range=range_)) for worker, _ in (first, second)]
    assert receipts[0].part == receipts[1].part
    assert receipts[0].tally == receipts[1].tally
    assert receipts[1].tally.reasons == {"corrupt": 1}


def test_a_worker_whose_run_has_ended_writes_nothing(tmp_path):
    (range_,) = _manifest(tmp_path / "manifest", 10)
    worker, _ = _range_worker(tmp_path, lease_holder="an earlier run")
    with pytest.raises(LeaseLostError):
        worker.run(Task(range=range_))
    assert not list((tmp_path / "out").iterdir())


# -- resuming -------------------------------------------------------------------------------------------------


def _config(tmp_path, **changes):
    return PredictConfig(bundle="/b", input="/in", output=str(tmp_path / "out"), **changes)


def test_the_part_that_counts_is_that_of_the_last_attempt_in_the_ranges_generation(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for generation, attempt, incomplete in ((0, 0, False), (0, 1, True), (0, 2, True), (0, 2, False), (2, 9, False)):
        _write_part(out, range(10, 20), generation=generation, attempt=attempt, incomplete=incomplete)
    _write_part(out, range(10, 20), attempt=7, format_="csv")
    committed = resume.Committed(_config(tmp_path))
    range_ = Range(10, 19, 10, 0, 0, 0)
    assert committed.of(range_) == Part(10, 0, 2, False, "parquet")
    assert committed.before(range_) is None
    assert committed.of(dataclasses.replace(range_, generation=1)) is None
    assert committed.before(dataclasses.replace(range_, generation=1)) == Part(10, 0, 2, False, "parquet")
    assert committed.before(dataclasses.replace(range_, generation=3)) == Part(10, 2, 9, False, "parquet")
    # The first rows of a range may be gone since; another range begins where no part does.
    assert committed.before(Range(13, 19, 7, 0, 0, 1)) == Part(10, 0, 2, False, "parquet")
    assert committed.of(Range(13, 19, 7, 0, 0, 0)) is None
    assert committed.before(Range(3, 9, 7, 0, 0, 1)) is None


def test_what_there_is_to_do_for_a_range(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    complete = _write_part(out, range(10))
    incomplete = _write_part(out, range(10, 15), attempt=3, incomplete=True)
    ranges = [Range(first, first + 9, 10, 0, number, 0) for number, first in enumerate((0, 10, 20))]
    committed = resume.Committed(_config(tmp_path))

    def planned(range_, *retried):
        return resume.plan_task(range_, committed, frozenset(retried))

    assert planned(ranges[0]) is None
    assert planned(ranges[0], complete) == Task(range=ranges[0], attempt=1, earlier=complete, retry=True)
    assert planned(ranges[1]) == Task(range=ranges[1], attempt=4, earlier=incomplete)
    assert planned(ranges[2]) == Task(range=ranges[2])
    updated = dataclasses.replace(ranges[0], generation=1)
    assert planned(updated) == Task(range=updated, earlier=complete)


def test_rows_of_csv_files_are_not_taken_over(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    part = _write_part(out, range(10), format_="csv")
    committed = resume.Committed(_config(tmp_path, format="csv"))
    range_ = Range(0, 9, 10, 0, 0, 0)
    assert resume.plan_task(range_, committed, frozenset([part])) == Task(range=range_, attempt=1)
    updated = dataclasses.replace(range_, generation=1)
    assert resume.plan_task(updated, committed, frozenset()) == Task(range=updated)


def _ranges(count):
    return [Range(10 * number, 10 * number + 9, 10, 0, number, 0) for number in range(count)]


def test_tasks_are_taken_while_ranges_are_listed():
    ranges, listed = _ranges(4), threading.Event()

    def slow():
        yield from ranges[:3]
        assert listed.wait(60)
        yield ranges[3]

    tasks = ListedTasks(slow(), lambda range_: None if range_ == ranges[1] else Task(range=range_))
    assert tasks.take() is None
    tasks.start()
    assert [tasks.take(seconds=60).range for _ in range(2)] == [ranges[0], ranges[2]]
    assert tasks.take() is None
    assert (tasks.ended, tasks.is_complete) == (False, False)
    assert (tasks.rows, tasks.rows_done, tasks.known) == (30, 10, 0)
    listed.set()
    assert tasks.take(seconds=60) == Task(range=ranges[3])
    assert tasks.take(seconds=60) is None
    assert tasks.ended
    assert tasks.is_complete
    assert tasks.take(seconds=60) is None
    assert (tasks.ranges, tasks.rows, tasks.rows_done) == (ranges, 40, 10)
    tasks.stop()


def test_an_error_of_the_listing_is_raised_where_tasks_are_taken():
    def listing():
        yield from _ranges(1)
        raise storage.UnavailableError("S3 asks for fewer requests.")

    tasks = ListedTasks(listing(), lambda range_: Task(range=range_))
    tasks.start()
    assert tasks.take(seconds=60) is not None
    with pytest.raises(storage.UnavailableError, match="S3 asks for fewer requests"):
        tasks.take(seconds=60)
    assert (tasks.ended, tasks.is_complete) == (False, False)
    tasks.stop()


def test_a_listing_that_is_far_ahead_waits_and_can_be_stopped(monkeypatch):
    monkeypatch.setattr(listed, "_AHEAD", 5)
    tasks = ListedTasks(iter(_ranges(1000)), lambda range_: Task(range=range_))
    tasks.start()
    until(lambda: tasks.known == 5, 60, "5 tasks")
    assert len(tasks.ranges) <= 6
    tasks.stop()
    assert len(tasks.ranges) <= 7
    assert not tasks.is_complete


# -- workers of a cluster -------------------------------------------------------------------------------------


class _Actor:
    def __init__(self, actor=None):
        self.actor, self.tasks, self.loading = actor, {}, "loading"


class _Class:
    """Stands in for the class of Ray's actors."""

    @staticmethod
    def remote(*arguments):
        return None


class _Tasks:
    """So many tasks that have not been taken, of a listing that has ended or not."""

    def __init__(self, known, *, is_complete=True):
        self.known, self.is_complete, self.ended = known, is_complete, is_complete and not known


@pytest.fixture
def dispatcher(monkeypatch):
    """Makes a dispatcher without Ray for a pool of workers; `ray.kill` does nothing."""
    monkeypatch.setattr(dispatch, "_Actor", _Actor)
    monkeypatch.setattr("ray.kill", lambda actor: None)

    def make(smallest, first, largest):
        plan = SimpleNamespace(
            pool=Pool(smallest=smallest, first=first, largest=largest),
            bundle=SimpleNamespace(uri="/b"),
            engine="onnx",
        )
        return Dispatcher(plan, None)

    return make


def _give_work(dispatcher, tasks_each):
    for number, worker in enumerate(dispatcher._workers):
        worker.loading = None
        worker.tasks = {(number, task): Task(range=_ranges(1)[0]) for task in range(tasks_each)}


def test_workers_are_added_while_all_have_work_and_there_is_more(dispatcher):
    pool, listing = dispatcher(1, 2, 7), _Tasks(100, is_complete=False)
    counts = []
    for tasks_each in (0, 0, 1, 2, 2, 2):
        pool._start_workers(listing, _Class)
        counts.append(len(pool._workers))
        pool._start_workers(listing, _Class)  # the new ones are still loading
        assert len(pool._workers) == counts[-1]
        _give_work(pool, tasks_each)
    assert counts == [2, 2, 2, 2, 4, 7]
    pool._start_workers(_Tasks(0), _Class)
    assert len(pool._workers) == 7


@pytest.mark.parametrize(("known", "workers"), [(0, 1), (1, 1), (3, 3), (9, 4)])
def test_there_are_no_more_workers_than_ranges(known, workers, dispatcher):
    pool = dispatcher(1, 4, 8)
    pool._start_workers(_Tasks(known), _Class)
    assert len(pool._workers) == workers


def test_the_ranges_of_a_lost_worker_are_given_to_others_and_isolated_if_they_end_them_too(dispatcher):
    pool, (range_, other) = dispatcher(1, 1, 1), _ranges(2)
    task = Task(range=range_)
    pool._again.append(Task(range=other))
    for lost in range(1, dispatch._MAX_LOST):
        pool._start_workers(_Tasks(0), _Class)
        (worker,) = pool._workers
        worker.loading, worker.tasks = None, {"reference": task}
        pool._lose(worker, RuntimeError("The actor died."))
        assert not pool._workers
        task = pool._again.pop()
        assert task == Task(range=range_, isolated=lost >= 2)
    assert list(pool._again) == [Task(range=other)]
    pool._start_workers(_Tasks(0), _Class)
    pool._workers[0].loading, pool._workers[0].tasks = None, {"reference": task}
    with pytest.raises(PredictionError, match="10 workers were lost while they classified the images 0 to 9"):
        pool._lose(pool._workers[0], RuntimeError("The actor died."))


def test_a_run_whose_own_node_is_lost_ends(dispatcher):
    pool = dispatcher(1, 1, 1)
    pool._start_workers(_Tasks(1), _Class)
    with pytest.raises(PredictionError, match="lost the node on which this job runs; the same command goes on"):
        pool._lose(pool._workers[0], RuntimeError("The actor is dead because its owner has died. Owner Id: 01"))


def test_workers_that_crash_while_they_load_end_the_run(dispatcher):
    pool = dispatcher(1, 1, 1)
    for sentence in (None, "A worker crashed 2 times while it loaded /b for onnx: it may have too little memory"):
        pool._start_workers(_Tasks(1), _Class)
        with pytest.raises(BundleError, match=sentence) if sentence else contextlib.nullcontext():
            pool._lose(pool._workers[0], RuntimeError("The actor died."))


# -- the end of a run -----------------------------------------------------------------------------------------


def test_tallies_add_up_and_survive_their_storage():
    ids = list(range(20))
    whole, sum_ = Tally.of(_rows(ids), 0.5), Tally(0.5)
    for group in (ids[12:], ids[:5], ids[5:12]):  # ranges end in any order
        tally = Tally.of(_rows(group), 0.5)
        assert Tally.from_json(tally.as_json()) == tally
        sum_.add(tally)
    assert sum_ == whole
    assert Tally.from_json(sum_.as_json()) == whole
    assert (whole.rows, whole.ok, whole.errors, whole.below_threshold) == (20, 13, 7, 13)
    assert whole.classes == {"null": 13}
    assert whole.reasons == {"corrupt": 7}
    assert [row["id"] for row in whole.examples["corrupt"]] == [0, 3, 6]
    sum_.add(Tally(0.5))
    assert sum_ == whole
    # What was read from JSON can be added to.
    read = Tally.from_json(Tally(0.5).as_json())
    read.add(whole)
    assert read == whole


def test_the_summary_counts_every_row(bundle):
    tally = Tally(0.5)
    for ids in ([0, 1, 2], [3, 4]):
        tally.add(Tally.of(_rows(ids), 0.5))
    info = dataclasses.replace(bundle.info, class_names=["null", "other"], class_counts={"null": 3, "other": 1})
    summary = summarize(tally, info)
    assert (summary["rows"], summary["ok"], summary["errors"]) == (5, 3, 2)
    assert summary["errors_by_reason"]["corrupt"]["images"] == 2
    assert [example["id"] for example in summary["errors_by_reason"]["corrupt"]["examples"]] == [0, 3]
    assert summary["classes"]["null"] == {"images": 3, "share": 1.0, "training_share": 0.75}
    assert summary["below_threshold"] == 1.0


def test_lists_of_errors_are_joined(tmp_path, monkeypatch):
    names = ["errors-000000000000-0.0.csv", "errors-000000000010-0.0.csv"]
    for name, ids in zip(names, ([0, 1, 3], [12, 15, 18]), strict=True):
        write_errors(str(tmp_path / name), error_rows(_rows(ids)))

    def joined(*names):
        join_errors(str(tmp_path), names, str(tmp_path / "errors.csv"))
        with (tmp_path / "errors.csv").open(newline="") as file:
            return list(csv.reader(file))

    expected = [[str(number), f"/Ü, x/{number}.png", 'corrupt: a, "b"\r\nc\rd'] for number in (0, 3, 12, 15, 18)]
    assert joined(*names) == [["id", "uri", "error"], *expected]
    assert joined(names[1]) == [["id", "uri", "error"], *expected[2:]]
    assert joined() == [["id", "uri", "error"]]
    monkeypatch.setattr(tally, "MAX_LISTED", 3)
    assert joined(*names) == [["id", "uri", "error"], *expected[:3]]
    monkeypatch.setattr(tally, "MAX_LISTED", 2)
    assert joined(*names, "none.csv") == [["id", "uri", "error"], *expected[:2]]


@pytest.fixture
def committed(tmp_path):
    """A run whose three ranges are committed: its config, ranges and receipts."""
    ranges = _manifest(tmp_path / "manifest", 26)
    worker, _ = _range_worker(tmp_path)
    receipts = [worker.run(Task(range=range_)) for range_ in ranges]
    return _config(tmp_path), ranges, receipts


def _received(config, receipts):
    received = Received(config)
    for receipt in receipts:
        received.add(receipt)
    return received


def test_at_the_end_every_range_has_one_part(committed, tmp_path):
    config, ranges, receipts = committed
    out = tmp_path / "out"
    shutil.copy(out / receipts[0].part.name, out / "part-000000000000-1.0.parquet")  # of an update that was given up
    shutil.copy(out / receipts[0].part.errors_name, out / "errors-000000000000-1.0.csv")
    (out / "part-000000000010-0.0-incomplete.parquet").write_bytes(b"")
    (out / "mine.txt").write_bytes(b"")
    results = [reconcile(config, ranges, _received(config, some)) for some in (receipts, receipts[1:], [])]
    totals = [tally for tally, _ in results]
    assert all(counting == {receipt.part: receipt.range for receipt in receipts} for _, counting in results)
    assert totals[0] == totals[1] == totals[2]
    assert (totals[0].rows, totals[0].errors) == (26, 3)
    assert [row["id"] for row in totals[0].examples["corrupt"]] == [3, 13, 23]
    names = {name for receipt in receipts for name in (receipt.part.name, receipt.part.errors_name)}
    assert {path.name for path in out.iterdir()} == names | {"errors.csv", "mine.txt"}
    assert len((out / "errors.csv").read_text().splitlines()) == 4


def test_a_part_that_another_worker_has_committed_at_the_same_time_is_counted_once(committed, tmp_path):
    config, ranges, receipts = committed
    worker, classifier = _range_worker(tmp_path)
    classifier.trouble = {4}
    late = worker.run(Task(range=ranges[0], attempt=1))
    assert late.part.incomplete
    classifier.trouble = set()
    late = worker.run(Task(range=ranges[0], attempt=2, earlier=late.part))
    totals, counting = reconcile(config, ranges, _received(config, receipts))
    assert late.part in counting
    assert receipts[0].part not in counting
    assert (totals.rows, totals.errors) == (26, 3)
    assert late.part in parts.list_parts(config.output)
    assert receipts[0].part not in parts.list_parts(config.output)


def test_lost_rows_are_detected(committed, tmp_path):
    config, ranges, receipts = committed
    short = dataclasses.replace(receipts[1], tally=dataclasses.replace(receipts[1].tally, rows=9))
    with pytest.raises(PartError, match=r"part-000000000010-0.0.parquet has 9 rows, and its range .* 10: delete it"):
        Received(config).add(short)
    path = tmp_path / "out" / receipts[1].part.name
    table = pyarrow.parquet.read_table(path).replace_schema_metadata(None)
    pyarrow.parquet.write_table(table.slice(1), path)
    with pytest.raises(PartError, match=r"part-000000000010-0.0.parquet has 9 rows, and its range .* 10: delete it"):
        reconcile(config, ranges, _received(config, []))
    path.unlink()
    with pytest.raises(PartError, match=r"10 images have no row, for example those from id 10 to 19. Run the same"):
        reconcile(config, ranges, _received(config, receipts))


def test_the_full_check_finds_no_difference_in_a_good_output(committed, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config, ranges, _ = committed
    verify.verify(config, ranges, str(tmp_path / "manifest"))
    assert "the ids of all 3 output files are those of the manifest" in caplog.text


@pytest.mark.parametrize(
    ("ids", "difference"),
    [
        ([10, 11, *range(13, 20)], r"missing 12 \(1\)"),
        ([10, 11, 11, *range(13, 20)], r"missing 12 \(1\); more than once 11 \(1\)"),
        ([*range(10, 21)], r"unexpected 20 \(1\)"),
        ([*range(20, 30)], r"missing 10, .*, 19 \(10\); unexpected 20, .*, 29 \(10\)"),
        ([*range(10, 20), *range(100, 111)], r"unexpected 100, .*, 109 \.\.\. \(11\)"),
        ([11, 10, *range(12, 20)], "another order"),
    ],
)
def test_the_full_check_names_wrong_ids(ids, difference, committed, tmp_path):
    config, ranges, receipts = committed
    (tmp_path / "out" / receipts[1].part.name).unlink()
    _write_part(tmp_path / "out", ids, first=10)
    sentence = rf"1 output files have other ids .*part-000000000010-0.0.parquet \({difference}\): delete it"
    with pytest.raises(PartError, match=sentence):
        verify.verify(config, ranges, str(tmp_path / "manifest"))


def test_the_full_check_finds_missing_and_foreign_files(committed, tmp_path):
    config, ranges, receipts = committed
    foreign = _write_part(tmp_path / "out", range(40, 50))
    with pytest.raises(PartError, match=r"part-000000000040-0.0.parquet is of no range of the manifest: delete it"):
        verify.verify(config, ranges, str(tmp_path / "manifest"))
    (tmp_path / "out" / foreign.name).unlink()
    for receipt in receipts[1:]:
        (tmp_path / "out" / receipt.part.name).unlink()
    with pytest.raises(PartError, match=r"2 output files .* for example the ids from 10 to 19 have no file"):
        verify.verify(config, ranges, str(tmp_path / "manifest"))


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
worker = Worker(plan)
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
