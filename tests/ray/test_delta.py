"""Runs with --format delta: a table with a commit for each run."""

import dataclasses
import datetime
import importlib.util
import json
import shutil
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest
from deltalake import DeltaTable, write_deltalake

from cnnray.images import storage
from cnnray.prediction import delta, job
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.delta import ColumnError
from cnnray.prediction.dispatch import PredictionError
from cnnray.prediction.parts import PartError
from tests.runs import GOOD, change, fill, read_rows, without_ids


@pytest.fixture(scope="module")
def bundle(onnx_bundle):
    return onnx_bundle


def _config(bundle, images, output, **changes):
    options = {"engine": "onnx", "rows_per_part": 10, "max_error_fraction": 1, "verify": True, "format": "delta"}
    return PredictConfig(bundle=bundle, input=str(images), output=str(output), **options | changes)


def _rows(output, version=None, options=None):
    table = DeltaTable(storage.join(str(output), "table"), version=version, storage_options=options)
    return table.to_pyarrow_table().sort_by("id").to_pylist()


def test_a_run_is_one_commit_with_the_rows_that_parquet_has(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 25)
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    line = job.run(config)
    job.run(dataclasses.replace(config, format="parquet", output=str(tmp_path / "parquet")))
    rows = _rows(tmp_path / "out")
    assert rows == read_rows(tmp_path / "parquet")
    assert len(rows) == line["rows"] == 25
    table = DeltaTable(str(tmp_path / "out" / "table"))
    assert table.version() == 0
    assert table.history()[0]["userMetadata"].startswith("cnnray predict, model ")
    assert pa.table(table.get_add_actions(flatten=True))["num_records"].to_pylist() == [10, 10, 5]
    assert len(table.to_pyarrow_dataset().to_table(filter=pa.compute.field("id") > 19)) == 5
    assert not list((tmp_path / "out").glob("part-*"))
    assert job.run(config)["classified"] == 0


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
def test_an_update_is_one_commit_and_the_version_before_can_be_read(place, bundle, in_process, tmp_path, request):
    root = str(tmp_path) if place == "disk" else request.getfixturevalue("bucket")
    images, out = storage.join(root, "images"), storage.join(root, "out")
    options = storage.deltalake_options(out)
    fill(images)
    config = _config(bundle, images, out)
    job.run(config)
    before = _rows(out, options=options)
    again = change(images)
    in_process.clear()
    update = dataclasses.replace(config, update=True)
    assert job.run(update)["classified"] == 4
    assert set(in_process) == again
    job.run(_config(bundle, images, storage.join(root, "anew")))
    anew = _rows(storage.join(root, "anew"), options=options)
    assert without_ids(_rows(out, options=options)) == without_ids(anew)
    assert _rows(out, 0, options) == before
    assert job.run(update)["classified"] == 0
    table = DeltaTable(storage.join(out, "table"), storage_options=options)
    assert table.version() == 1
    assert len(table.file_uris()) < len(DeltaTable(storage.join(out, "table"), 0, options).file_uris()) + 2


def test_an_overwrite_replaces_rows_and_columns_in_one_commit(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 25)
    config = _config(bundle, tmp_path / "images", tmp_path / "out", probabilities=True)
    job.run(config)
    job.run(dataclasses.replace(config, top_k=1, probabilities=False, overwrite=True))
    rows = _rows(tmp_path / "out")
    assert "probabilities" in _rows(tmp_path / "out", 0)[0]
    assert "probabilities" not in rows[0]
    assert {len(row["top_k_labels"]) for row in rows if row["top_k_labels"]} == {1}
    assert len(rows) == 25
    job.run(dataclasses.replace(config, format="parquet", overwrite=True))
    assert not (tmp_path / "out" / "table").exists()
    assert len(read_rows(tmp_path / "out")) == 25
    job.run(dataclasses.replace(config, overwrite=True))
    assert not list((tmp_path / "out").glob("part-*"))
    assert len(_rows(tmp_path / "out")) == 25


def test_a_run_that_is_killed_before_its_commit_shows_no_row_and_commits_later(
    bundle, in_process, tmp_path, monkeypatch
):
    fill(str(tmp_path / "images"), 25)
    config = _config(bundle, tmp_path / "images", tmp_path / "out")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(delta, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            job.run(config)
    assert not DeltaTable.is_deltatable(str(tmp_path / "out" / "table"))
    assert job.run(config)["classified"] == 0
    assert len(_rows(tmp_path / "out")) == 25
    (tmp_path / "out" / "summary.json").unlink()  # killed after its commit
    assert job.run(config)["rows"] == 25
    assert DeltaTable(str(tmp_path / "out" / "table")).version() == 0


def test_files_that_a_user_has_compacted_and_vacuumed_are_replaced_by_the_next_update(bundle, tmp_path):
    fill(str(tmp_path / "images"))
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    job.run(config)
    table = DeltaTable(str(tmp_path / "out" / "table"))
    table.optimize.compact()
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=True)
    assert len(_rows(tmp_path / "out")) == 45
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.yaml", "manifest", "summary.json"}
    again = change(str(tmp_path / "images"))
    assert job.run(dataclasses.replace(config, update=True))["rows"] == 36
    rows = _rows(tmp_path / "out")
    assert len({row["id"] for row in rows}) == len(rows) == 36
    assert again <= {row["uri"] for row in rows}


def test_columns_of_a_table_get_types_that_delta_has(bundle, in_process, tmp_path):
    (tmp_path / "good.png").write_bytes(GOOD)
    time = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
    columns = {
        "small": pa.array([200], pa.uint8()),
        "large": pa.array([2**64 - 1], pa.uint64()),
        "time": pa.array([time], pa.timestamp("ns")),
        "zoned": pa.array([time.replace(microsecond=0)], pa.timestamp("ms", "Europe/Berlin")),
        "nothing": pa.nulls(1),
        "camera": pa.array(["left"]).dictionary_encode(),
        "box": pa.array([[1, 2]], pa.list_(pa.uint16(), 2)),
        "half": pa.array([0.5], pa.float32()).cast(pa.float16()),
        "day": pa.array([time.date()], pa.date64()),
        "place": pa.array([{"x": 1, "y": None}], pa.struct([("x", pa.uint32()), ("y", pa.large_string())])),
        "many words": pa.array([b"x"], pa.binary(1)),
        "tags": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.uint8())),
    }
    pyarrow.parquet.write_table(pa.table({"uri": [str(tmp_path / "good.png")], **columns}), tmp_path / "t.parquet")
    job.run(_config(bundle, tmp_path / "t.parquet", tmp_path / "out"))
    (row,) = _rows(tmp_path / "out")
    assert {name: row[name] for name in columns if name != "zoned"} == {
        "small": 200, "large": Decimal(2**64 - 1), "time": time, "nothing": None, "camera": "left", "box": [1, 2],
        "half": 0.5, "day": time.date(), "place": {"x": 1, "y": None}, "many words": b"x",
        "tags": [("a", 1)],
    }  # fmt: skip
    assert row["zoned"] == time.replace(microsecond=0, tzinfo=datetime.UTC)


def test_a_column_that_delta_cannot_have_is_named_before_anything_is_written(bundle, in_process, tmp_path):
    (tmp_path / "good.png").write_bytes(GOOD)
    table = pa.table({"uri": [str(tmp_path / "good.png")], "exposure": pa.array([1], pa.duration("ms"))})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(
        ColumnError, match=r"^Column 'exposure' has the type duration\[ms\], which a Delta table cannot"
    ):
        job.run(_config(bundle, tmp_path / "t.parquet", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_table_that_is_damaged_is_named(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 12)
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    job.run(config)
    (log,) = (tmp_path / "out" / "table" / "_delta_log").glob("*.json")
    log.write_text(json.dumps({"protocol": {"minReaderVersion": 99, "minWriterVersion": 99}}))
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(PartError, match=r"^The Delta table .*/out/table cannot be written: .*[^.]\.$"):
        job.run(config)
    shutil.rmtree(log.parent)
    job.run(config)
    assert len(_rows(tmp_path / "out")) == 12


def test_the_library_is_asked_for(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--format delta needs the extra delta: pip install 'cnnray\[delta\]'\.$"):
        _config(bundle, tmp_path / "images", tmp_path / "out")


def test_a_folder_of_this_name_that_is_not_ours_stays(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 12)
    (tmp_path / "out" / "table").mkdir(parents=True)
    (tmp_path / "out" / "table" / "mine.db").write_bytes(b"mine")
    job.run(_config(bundle, tmp_path / "images", tmp_path / "out", format="parquet"))
    assert (tmp_path / "out" / "table" / "mine.db").read_bytes() == b"mine"


@pytest.mark.parametrize("format_", ["parquet", "delta"])
def test_a_table_of_another_writer_is_not_taken_over(format_, bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 12)
    write_deltalake(str(tmp_path / "out" / "table"), pa.table({"x": [1]}))
    with pytest.raises(PredictionError, match=r"/out holds table, but no config\.yaml of a run; give another"):
        job.run(_config(bundle, tmp_path / "images", tmp_path / "out", format=format_))
    assert DeltaTable(str(tmp_path / "out" / "table")).version() == 0


def test_times_without_a_zone_can_come_later(bundle, in_process, tmp_path):
    (tmp_path / "good.png").write_bytes(GOOD)
    table = pa.table({"uri": [str(tmp_path / "good.png")]})
    config = _config(bundle, tmp_path / "t.parquet", tmp_path / "out")
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    job.run(config)
    for year in (2025, 2026):
        time = datetime.datetime(year, 1, 2)
        with_time = table.append_column("time", pa.array([time], pa.timestamp("ns")))
        pyarrow.parquet.write_table(with_time, tmp_path / "t.parquet")
        job.run(dataclasses.replace(config, update=True))
        assert [row["time"] for row in _rows(tmp_path / "out")] == [time]


def test_columns_that_cannot_be_together_are_named_before_anything_is_written(bundle, in_process, tmp_path):
    (tmp_path / "good.png").write_bytes(GOOD)
    for name, other in (("Prediction", "prediction"), ("ID", "id")):
        table = pa.table({"uri": [str(tmp_path / "good.png")], name: [1]})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        with pytest.raises(ColumnError, match=f"cannot have both columns '{name}' and '{other}': rename one"):
            job.run(_config(bundle, tmp_path / "t.parquet", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_an_update_with_another_type_is_refused_before_it_begins(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 12)
    uris = sorted(map(str, (tmp_path / "images").rglob("*.png")))
    config = _config(bundle, tmp_path / "t.parquet", tmp_path / "out")
    pyarrow.parquet.write_table(pa.table({"uri": uris, "shot": list(range(12))}), tmp_path / "t.parquet")
    job.run(config)
    pyarrow.parquet.write_table(
        pa.table({"uri": uris, "shot": [*map(float, range(11)), 0.5]}), tmp_path / "t.parquet"
    )
    with pytest.raises(ColumnError, match=r"Column 'shot' had the type int64 .* has double now; .* --overwrite\."):
        job.run(dataclasses.replace(config, update=True))
    job.run(dataclasses.replace(config, overwrite=True))
    assert _rows(tmp_path / "out")[-1]["shot"] == 0.5


def test_trouble_of_the_object_store_is_of_its_kind():
    text = (
        "Generic S3 error: Error performing PUT http://x in 1s - \x1b[31mServer returned non-2xx status code: 503"
        "\x1b[0m Service Unavailable: <Error><Code>SlowDown</Code></Error>"
    )
    with (
        pytest.raises(storage.ThrottledError, match=r"^S3 asks for fewer requests, at s3://bucket/out/table"),
        delta._translated_errors("s3://bucket/out/table"),
    ):
        raise OSError(text)
