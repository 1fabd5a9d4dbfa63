"""Prediction runs on a cluster: one row for each image, the same for all engines, formats and numbers of workers."""

import csv
import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import ray

from cnnray import cluster, commandline
from cnnray.images.decode import BadImage
from cnnray.images.manifest import ManifestError, manifest_from_uris
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.predictor import Predictor
from cnnray.prediction import decoding, dispatch, job, predict
from cnnray.prediction.config import PredictConfig, PredictOptions
from cnnray.prediction.dispatch import PredictionError
from cnnray.prediction.isolation import CRASHED
from cnnray.prediction.parts import PartError
from cnnray.prediction.plan import plan_in_process
from cnnray.prediction.ranges import RETRIED_REASONS
from cnnray.prediction.worker import Worker
from tests.awkward import awkward_images, bad_images
from tests.conftest import write_tar
from tests.ray.workers import CrashedByAnImage, CrashedByItsBundle
from tests.runs import read_rows


@pytest.fixture(scope="module")
def bundle(onnx_bundle):
    return onnx_bundle


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two copies of the awkward and bad images, and a missing file: a table of their uris, and bytes by uri."""
    folder = tmp_path_factory.mktemp("images")
    contents = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    contents_by_uri = {}
    for copy in ("a", "b"):
        (folder / copy).mkdir()
        for name, data in contents.items():
            (folder / copy / name).write_bytes(data)
            contents_by_uri[str(folder / copy / name)] = data
    contents_by_uri[str(folder / "missing.png")] = None
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "shot", "error"])
        writer.writerows([uri, number, "none"] for number, uri in enumerate(contents_by_uri))
    return folder / "images.csv", contents_by_uri


def _config(bundle, images, output, **changes):
    options = {"engine": "onnx", "max_workers": 2, "rows_per_part": 32, "max_error_fraction": 1}
    return PredictConfig(bundle=bundle, input=str(images), output=str(output), **options | changes)


@pytest.fixture(scope="module")
def finished(bundle, images, tmp_path_factory):
    """The output of a finished run, and its JSON line."""
    output = tmp_path_factory.mktemp("finished")
    return output, job.run(_config(bundle, images[0], output))


def test_every_image_has_one_row_with_the_prediction_of_predictor(finished, bundle, images):
    output, line = finished
    rows = read_rows(output)
    assert [row["id"] for row in rows] == list(range(len(images[1])))
    assert [row["uri"] for row in rows] == list(images[1])
    predictor = Predictor(Bundle.load(bundle), engine="onnx")
    for row in rows:
        assert row["shot"] == row["id"]
        assert row["original_error"] == "none"
        data = images[1][row["uri"]]
        (prediction,) = predictor([data]) if data is not None else [BadImage("missing")]
        if isinstance(prediction, BadImage):
            assert row["error"].partition(":")[0] == prediction.reason
        else:
            assert row["top_k_labels"] == [name for name, _ in prediction.top_k]
            np.testing.assert_allclose(row["top_k_scores"], [score for _, score in prediction.top_k], atol=1e-5)
    bad = 2 * len(bad_images()) + 1
    assert {name: line[name] for name in ("output", "rows", "ok", "errors", "resumed", "engine")} == {
        "output": str(output), "rows": len(rows), "ok": len(rows) - bad, "errors": bad, "resumed": 0,
        "engine": "onnx",
    }  # fmt: skip


def test_the_files_of_a_finished_run(finished, bundle):
    output, line = finished
    summary = json.loads((output / "summary.json").read_text())
    assert {name: summary[name] for name in line} == line
    assert summary["model"] == Bundle.load(bundle).version
    assert summary["errors_by_reason"]["missing"]["images"] == 1
    assert sum(reason["images"] for reason in summary["errors_by_reason"].values()) == line["errors"]
    assert sum(counts["images"] for counts in summary["classes"].values()) == line["ok"]
    assert summary["population_stability_index"] > 0
    with (output / "errors.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == line["errors"]
    parts = sorted(path.name for path in output.glob("part-*"))
    assert parts == [f"part-{first:012d}-0.0.parquet" for first in range(0, line["rows"], 32)]
    lists = {name.replace("part", "errors").replace("parquet", "csv") for name in parts}
    names = {path.name for path in output.iterdir()}
    assert names - lists == {*parts, "config.yaml", "errors.csv", "manifest", "summary.json"}
    assert sum(len((output / name).read_text().splitlines()) - 1 for name in names & lists) == line["errors"]


def test_the_config_of_a_run_gives_the_same_run(finished, bundle, images):
    output, _ = finished
    config = commandline.parse(PredictConfig, "jobs/predict.py", ["--config", str(output / "config.yaml")])
    assert config == _config(bundle, images[0], output)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_workers": 1, "batch_size": 1, "rows_per_part": 1000},
        {"max_workers": 3, "batch_size": 7, "rows_per_part": 5},
        {"decoding": "tasks", "cpus_per_worker": 0.5},
        {"format": "csv"},
        {"format": "jsonl"},
        {"format": "delta"},
        {"max_workers": None},
    ],
    ids=["one", "many", "tasks", "csv", "jsonl", "delta", "no Ray"],
)
def test_rows_do_not_depend_on_workers_batches_or_format(changes, finished, bundle, images, tmp_path, monkeypatch):
    expected = read_rows(finished[0])
    if changes == {"max_workers": None}:
        monkeypatch.setattr(cluster, "starts_own", lambda: True)
        monkeypatch.setattr(cluster, "connected", None)
    job.run(_config(bundle, images[0], tmp_path, **changes))
    kind = changes.get("format", "parquet")
    rows = read_rows(tmp_path / "table") if kind == "delta" else read_rows(tmp_path, kind)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name in wanted:
            if name in ("confidence", "top_k_scores") and wanted[name] is not None:
                np.testing.assert_allclose(row[name], wanted[name], atol=1e-5)
            else:
                assert row[name] == wanted[name], name


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_images_in_containers(kind, finished, bundle, images, tmp_path):
    contents = {uri: data for uri, data in images[1].items() if data is not None}
    if kind == "tar":
        write_tar(tmp_path / "0.tar", {f"{number:03d}.png": data for number, data in enumerate(contents.values())})
    else:
        table = pa.table({"bytes": list(contents.values()), "name": list(contents)})
        pyarrow.parquet.write_table(table, tmp_path / "0.parquet", row_group_size=30)
    job.run(_config(bundle, tmp_path / f"0.{kind}", tmp_path / "out", rows_per_part=10))
    rows = read_rows(tmp_path / "out")
    expected = {row["uri"]: row for row in read_rows(finished[0])}
    for row, uri in zip(rows, contents, strict=True):
        assert row["prediction"] == expected[uri]["prediction"]
        assert (row["error"] or "").partition(":")[0] == (expected[uri]["error"] or "").partition(":")[0]
    # Each row group is a part, however few rows a part should have; a tar can be cut anywhere.
    assert len(list((tmp_path / "out").glob("part-*"))) == math.ceil(len(rows) / {"parquet": 30, "tar": 10}[kind])


# -- resuming -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to change."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def _times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_finished_run_is_not_run_again(copy, bundle, images, monkeypatch):
    before = _times(copy)
    monkeypatch.setattr(job, "_classify", None)
    line = job.run(_config(bundle, images[0], copy))
    assert line["resumed"] == line["rows"] == len(images[1])
    assert _times(copy) == before


@pytest.mark.parametrize("was_finished", [True, False])
def test_only_missing_parts_are_repeated(was_finished, copy, bundle, images, finished):
    name = "part-000000000032-0.0.parquet"
    (copy / name).unlink()
    if not was_finished:
        (copy / "summary.json").unlink()
    before = _times(copy)
    line = job.run(_config(bundle, images[0], copy, batch_size=3))
    assert (line["resumed"], line["classified"]) == (len(images[1]) - 32, 32)
    after = _times(copy)
    written = {name, "errors-000000000032-0.0.csv", "summary.json", "errors.csv", "config.yaml"}
    assert {name for name in after if after[name] != before.get(name)} <= written
    assert [row["prediction"] for row in read_rows(copy)] == [row["prediction"] for row in read_rows(finished[0])]


def test_another_run_over_the_same_output_is_refused(copy, bundle, images, tmp_path):
    config = _config(bundle, images[0], copy)
    before = _times(copy)
    for changes, sentence in (
        ({"input": str(images[0].parent / "a")}, "holds a run with --input"),
        ({"top_k": 1}, r"holds a run with --top-k 5 \(now 1\); give another --output, or --overwrite"),
        ({"engine": "keras"}, r"--engine onnx \(now keras\)"),
    ):
        with pytest.raises(PredictionError, match=sentence):
            job.run(dataclasses.replace(config, **changes))
    other = shutil.copytree(bundle, tmp_path / "other")
    info = Bundle.load(str(other)).info
    bundles.write_info(str(other), dataclasses.replace(info, temperature=2.0))
    with pytest.raises(PredictionError, match=r"the model model-\w+ \(now model-\w+\)"):
        job.run(dataclasses.replace(config, bundle=str(other)))
    exported_again = shutil.copytree(bundle, tmp_path / "again")
    with (exported_again / "model.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(PredictionError, match="holds a run with another export to onnx"):
        job.run(dataclasses.replace(config, bundle=str(exported_again)))
    assert _times(copy) == before
    line = job.run(dataclasses.replace(config, bundle=str(other), overwrite=True, limit=40))
    assert (line["rows"], line["resumed"]) == (40, 0)
    assert len(read_rows(copy)) == 40


def test_foreign_files_are_not_touched(tmp_path, bundle, images):
    (tmp_path / "part-000007.parquet").write_bytes(b"mine")
    with pytest.raises(PredictionError, match=r"holds part-000007.parquet, but no config.yaml of a run"):
        job.run(_config(bundle, images[0], tmp_path))
    assert (tmp_path / "part-000007.parquet").read_bytes() == b"mine"


def test_a_part_that_was_changed_fails_the_run(copy, bundle, images):
    part = copy / "part-000000000032-0.0.parquet"
    table = pyarrow.parquet.read_table(part).replace_schema_metadata(None)
    (copy / "summary.json").unlink()
    pyarrow.parquet.write_table(table.slice(1), part)
    with pytest.raises(PartError, match=r"part-000000000032-0.0.parquet has 31 rows, and its range .* 32: delete it"):
        job.run(_config(bundle, images[0], copy))
    pyarrow.parquet.write_table(pa.concat_tables([table.slice(1), table.slice(1, 1)]), part)
    with pytest.raises(PartError, match=r"-0.0.parquet \(missing 32 \(1\); more than once 33 \(1\)\): delete it"):
        job.run(_config(bundle, images[0], copy, verify=True))
    assert not (copy / "summary.json").exists()
    part.unlink()
    assert job.run(_config(bundle, images[0], copy, verify=True))["classified"] == 32


def test_retry_errors_repeats_images_that_could_not_be_read(copy, bundle, images, finished):
    (images[0].parent / "missing.png").write_bytes(awkward_images()["rgb.png"])
    try:
        line = job.run(_config(bundle, images[0], copy, retry_errors=True))
    finally:
        (images[0].parent / "missing.png").unlink()
    assert line["errors"] == 2 * len(bad_images())
    retried = [reason for _, reason in bad_images().values() if reason in RETRIED_REASONS]
    assert line["classified"] == 2 * len(retried) + 1
    assert read_rows(copy)[-1]["status"] == "ok"
    assert read_rows(copy)[:-1] == read_rows(finished[0])[:-1]
    assert not list(copy.glob("part-*.0.parquet")) or list(copy.glob("part-*.1.parquet"))


# -- failures -------------------------------------------------------------------------------------------------


def test_a_run_with_too_many_errors_stops_early(tmp_path, bundle):
    uris = [f"/nowhere/{number}.png" for number in range(20_000)]
    pyarrow.parquet.write_table(pa.table({"uri": uris}), tmp_path / "images.parquet")
    config = _config(bundle, tmp_path / "images.parquet", tmp_path / "out", max_error_fraction=0.1, rows_per_part=500)
    with pytest.raises(
        PredictionError, match=r"have no prediction, more than --max-error-fraction 0.1, for example /nowhere/\d+"
    ):
        job.run(config)
    assert len(list((tmp_path / "out").glob("part-*"))) < 20
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_small_run_with_too_many_errors_fails_each_time(tmp_path, bundle):
    (tmp_path / "images.csv").write_text("uri\n" + "".join(f"/nowhere/{number}.png\n" for number in range(9)))
    config = _config(bundle, tmp_path / "images.csv", tmp_path / "out", max_error_fraction=0.5)
    for _ in range(2):
        with pytest.raises(PredictionError, match="9 of 9 images have no prediction, more than"):
            job.run(config)
    assert job.run(dataclasses.replace(config, max_error_fraction=1.0))["errors"] == 9


def test_the_output_of_another_job_is_not_replaced(tmp_path, bundle, images):
    (tmp_path / "config.yaml").write_text("data: /photos\n")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(PredictionError, match=r"holds a config.yaml of another job"):
        job.run(_config(bundle, images[0], tmp_path, overwrite=True))
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_mistakes_are_reported_before_anything_is_written(tmp_path, bundle, images):
    for changes, error, sentence in (
        ({"engine": "litert"}, BundleError, r"was not exported to litert \(it has keras, onnx"),
        ({"bundle": str(tmp_path / "none")}, BundleError, "is not a bundle"),
        ({"input": str(tmp_path / "none")}, ManifestError, "does not exist"),
        ({"input": str(tmp_path / "twice.csv")}, ManifestError, "same image is listed more than once: '/b.png'"),
    ):
        (tmp_path / "twice.csv").write_text("uri\n/b.png\n/a.png\n/b.png\n")
        config = _config(bundle, images[0], tmp_path / "out")
        with pytest.raises(error, match=sentence):
            job.run(dataclasses.replace(config, **changes))
        assert not (tmp_path / "out").exists()


def test_a_bundle_that_workers_cannot_load_is_reported(tmp_path, bundle, images):
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"model.onnx cannot be loaded"):
        job.run(_config(str(broken), images[0], tmp_path / "out"))


# -- dry runs and Python --------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(tmp_path, bundle, images):
    line = job.dry_run(_config(bundle, images[0], tmp_path / "out", limit=20))
    assert (line["rows"], line["resumed"], line["engine"], line["workers"]) == (20, 0, "onnx", 2)
    assert line["seconds"] == pytest.approx(20 / line["images_per_second"], rel=0.1, abs=0.02)
    assert not (tmp_path / "out").exists()


def test_from_python(bundle, images, finished):
    options = PredictOptions(engine="onnx", probabilities=True, max_workers=2)
    uris = [uri for uri, data in images[1].items() if data is not None]
    rows = sorted(predict(bundle, uris, options).take_all(), key=lambda row: row["id"])
    expected = {row["uri"]: row for row in read_rows(finished[0])}
    assert [row["uri"] for row in rows] == sorted(uris)
    for row in rows:
        assert row["prediction"] == expected[row["uri"]]["prediction"]
        assert row["probabilities"] is None or len(row["probabilities"]) == 3
    assert len(predict(bundle, uris[0].rpartition("/")[0], options).take_all()) == len(uris) // 2


@pytest.mark.parametrize(("decoding", "packed"), [("workers", True), ("tasks", False)])
def test_images_that_crash_a_worker_are_found_and_the_others_are_classified(
    decoding, packed, tmp_path, bundle, monkeypatch
):
    good, poisonous = awkward_images()["rgb.png"], (20, 21)
    contents = [good + b"poison" * (number in poisonous) for number in range(200)]
    if packed:
        pyarrow.parquet.write_table(pa.table({"bytes": contents}), tmp_path / "0.parquet", row_group_size=150)
    else:
        for number, data in enumerate(contents):
            (tmp_path / f"{number:03d}.png").write_bytes(data)
    monkeypatch.setattr(dispatch, "Worker", CrashedByAnImage)
    output = tmp_path.parent / f"poisoned_{decoding}_{packed}"
    line = job.run(_config(bundle, tmp_path, output, rows_per_part=64, decoding=decoding, cpus_per_worker=0.5))
    assert (line["rows"], line["ok"], line["errors"]) == (200, 198, 2)
    for row in read_rows(output):
        assert row["error"] == (CRASHED if row["id"] in poisonous else None)
        assert (row["prediction"] is None) == (row["id"] in poisonous)


def test_decoded_images_that_are_lost_with_their_node_are_decoded_again(bundle, images, tmp_path, monkeypatch):
    plan = plan_in_process(Bundle.load(bundle), _config(bundle, images[0], tmp_path, max_workers=None))
    plan = dataclasses.replace(plan, pool=dataclasses.replace(plan.pool, decode_cpus=0.5))
    rows = manifest_from_uris(list(images[1]))
    get, lost = ray.get, []

    def lose_one(reference):  # a stand-in for a node that is lost
        if not lost:
            lost.append(reference)
            raise ray.exceptions.ObjectLostError(reference.hex(), None, "")
        return get(reference)

    worker = Worker(plan)
    monkeypatch.setattr(ray, "get", lose_one)
    decoded = pa.concat_tables(decoding.in_tasks(plan, rows, worker))
    assert lost
    assert decoded.to_pylist() == pa.concat_tables(worker(rows)).to_pylist()


def test_a_worker_that_crashes_at_every_start_ends_the_run(tmp_path, bundle, images, monkeypatch):
    monkeypatch.setattr(dispatch, "Worker", CrashedByItsBundle)
    with pytest.raises(BundleError, match=r"A worker crashed 2 times while it loaded .*too little memory"):
        job.run(_config(bundle, images[0], tmp_path))


def test_paths_that_are_no_files_are_errors(tmp_path, bundle):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "images.csv").write_text("uri\n/dev/zero\nfolder.png\nfifo.png\n")
    job.run(_config(bundle, tmp_path / "images.csv", tmp_path / "out"))
    assert [row["error"].partition(":")[0] for row in read_rows(tmp_path / "out")] == ["unreadable"] * 3
