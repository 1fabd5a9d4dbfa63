"""Runs over an input that changes: --update, and listings and workers that are cut off."""

import csv
import dataclasses
import io
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.images import shards, storage
from cnnray.images.shards import Range
from cnnray.models.bundle import Bundle
from cnnray.prediction import job, manifest, parts, plan, resume
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.plan import plan_in_process
from cnnray.prediction.ranges import Output, RangeWorker, Task
from tests.awkward import bad_images
from tests.runs import GOOD, change, fill, read_rows, without_ids, write_all


@pytest.fixture(scope="module")
def bundle(onnx_bundle):
    return onnx_bundle


def _config(bundle, images, output, **changes):
    options = {"engine": "onnx", "rows_per_part": 10, "max_error_fraction": 1}
    return PredictConfig(bundle=bundle, input=str(images), output=str(output), **options | changes)


@pytest.mark.parametrize("format_", ["parquet", "csv"])
def test_an_update_equals_a_run_from_scratch(format_, bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"))
    config = _config(bundle, tmp_path / "images", tmp_path / "out", format=format_, verify=True)
    job.run(config)
    before = {row["uri"]: row["id"] for row in read_rows(tmp_path / "out", format_)}
    read_again = change(str(tmp_path / "images"))
    in_process.clear()
    line = job.run(dataclasses.replace(config, update=True))
    if format_ == "parquet":
        assert set(in_process) == read_again
        assert line["classified"] == len(in_process) == 4
    rows = read_rows(tmp_path / "out", format_)
    job.run(_config(bundle, tmp_path / "images", tmp_path / "anew", format=format_))
    assert without_ids(rows) == without_ids(read_rows(tmp_path / "anew", format_))
    assert len({row["id"] for row in rows}) == len(rows) == line["rows"] == 36
    assert all(row["id"] == before[row["uri"]] for row in rows if row["uri"] in before)
    assert min(row["id"] for row in rows if row["uri"] not in before) == len(before)
    summary, anew = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "anew"))
    assert {key: summary[key] for key in ("rows", "ok", "errors", "classes")} == {
        key: anew[key] for key in ("rows", "ok", "errors", "classes")
    }
    in_process.clear()
    assert job.run(dataclasses.replace(config, update=True))["classified"] == 0
    assert not in_process
    assert [path.name for path in (tmp_path / "out" / "manifest").iterdir()] == ["1"]


def _read_parts(output):
    """The rows of an output on a disk or in a bucket."""
    parts = [file.uri for file in storage.files(output) if file.uri.startswith(storage.join(output, "part-"))]
    tables = [storage.parse_parquet(storage.read_bytes(uri)) for uri in sorted(parts)]
    return pa.concat_tables(tables).to_pylist()


@pytest.mark.long
@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
def test_an_update_of_ten_thousand_images(place, bundle, in_process, tmp_path, request, monkeypatch):
    """A hundred of them change, a hundred are new, and a hundred go: the result is that of a run from scratch."""
    for module in (manifest, plan):
        monkeypatch.setattr(module, "FEW_IMAGES", 20_000)  # so that reads can be counted in this process
    root = str(tmp_path) if place == "disk" else request.getfixturevalue("bucket")
    images, count = storage.join(root, "images"), 10_000
    fill(images, count)
    config = _config(bundle, images, storage.join(root, "out"), rows_per_part=500, verify=True)
    job.run(config)
    assert len(in_process) == count
    before = {row["uri"]: row["id"] for row in _read_parts(config.output)}
    buffer = io.BytesIO()
    Image.new("RGB", (61, 43), (1, 200, 90)).save(buffer, "PNG")
    names = [f"{number % 3}/{number:05d}.png" for number in range(count)]
    changed, gone, new = names[7::100], names[50::100], [f"{number % 3}/new{number}.png" for number in range(100)]
    write_all(images, dict.fromkeys([*changed, *new], buffer.getvalue()))
    for name in gone:
        storage.delete_file(storage.join(images, name))
    in_process.clear()
    line = job.run(dataclasses.replace(config, update=True))
    assert sorted(in_process) == sorted(storage.join(images, name) for name in [*changed, *new])  # each read once
    assert (line["rows"], line["classified"]) == (count, 200)
    rows = _read_parts(config.output)
    anew = dataclasses.replace(config, output=storage.join(root, "anew"))
    job.run(anew)
    assert without_ids(rows) == without_ids(_read_parts(anew.output))
    assert all(row["id"] == before.get(row["uri"], row["id"]) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows) == count


def test_an_update_of_a_table_sees_changed_rows(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 20)
    uris = sorted(map(str, (tmp_path / "images").rglob("*.png")))

    def write(rows):
        with (tmp_path / "images.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["uri", "shot"], *rows])

    write([uri, number] for number, uri in enumerate(uris[:18]))
    config = _config(bundle, tmp_path / "images.csv", tmp_path / "out")
    job.run(config)
    in_process.clear()
    write([uri, 100 if number == 4 else number] for number, uri in reversed(list(enumerate(uris[1:], 1))))
    job.run(dataclasses.replace(config, update=True))
    assert set(in_process) == {uris[4], *uris[18:]}
    rows = {row["uri"]: row for row in read_rows(tmp_path / "out")}
    assert rows.keys() == set(uris[1:])
    assert rows[uris[4]]["shot"] == 100
    assert rows[uris[5]]["id"] == 5


def test_an_update_after_one_that_was_cut_off_takes_over_no_row_of_a_changed_image(bundle, tmp_path):
    fill(str(tmp_path / "images"), 30)
    paths = sorted((tmp_path / "images").rglob("*.png"))
    config = _config(bundle, tmp_path / "images", tmp_path / "out", verify=True)
    job.run(config)
    update = dataclasses.replace(config, update=True)
    for seconds, numbers in ((1, [0, 12]), (2, [15])):
        for number in numbers:
            paths[number].write_bytes(bad_images()["text.png"][0])
            os.utime(paths[number], ns=(0, seconds * 10**9))
        if seconds == 1:
            plan = plan_in_process(Bundle.load(bundle), config)
            listed = job.list_images(update, resume.earlier_run(update, plan.bundle))
            resume.begin_output(update, plan, listed.generation, is_new=False)
    assert job.run(update)["classified"] == 20
    bad = [row["uri"] for row in read_rows(tmp_path / "out") if row["error"]]
    assert bad == [str(paths[number]) for number in (0, 12, 15)]


def test_an_update_of_a_run_that_was_killed_before_it_listed_an_image_lists_all(bundle, tmp_path):
    fill(str(tmp_path / "images"), 12)
    config = _config(bundle, tmp_path / "images", tmp_path / "out", verify=True)
    resume.begin_output(config, plan_in_process(Bundle.load(bundle), config), 0, is_new=True)
    assert job.run(dataclasses.replace(config, update=True))["rows"] == 12


def test_a_listing_that_was_killed_goes_on(bundle, tmp_path):
    fill(str(tmp_path / "images"))
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    listed = manifest.begin(config, 0)
    ranges = iter(listed.ranges)
    assert [next(ranges).rows for _ in range(2)] == [10, 10]
    resume.begin_output(config, plan_in_process(Bundle.load(bundle), config), 0, is_new=False)
    assert shards.read_facts(listed.folder) is None
    assert [range_.first for range_ in shards.ranges(listed.folder)] == [0, 10, 20]  # the next shard has two
    line = job.run(dataclasses.replace(config, verify=True))
    assert line["rows"] == 45
    assert [row["uri"] for row in read_rows(tmp_path / "out")] == sorted(
        map(str, (tmp_path / "images").rglob("*.png"))
    )


def test_two_workers_with_the_same_range_leave_one_part(bundle, tmp_path):
    fill(str(tmp_path / "images"), 12)
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    listed = manifest.begin(config, 0)
    (range_, *_) = list(listed.ranges)
    plan = plan_in_process(Bundle.load(bundle), config)
    output = Output(
        folder=config.output, manifest=listed.folder, format="parquet", threshold=0.5, skip_unreadable=False
    )
    receipts = [RangeWorker(plan, output).run(Task(range=range_))]
    (part,) = parts.list_parts(config.output)
    before = (tmp_path / "out" / part.name).read_bytes()
    # One that was cut off comes back when the images have changed: it can neither add nor change a row.
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"nothing")
    receipts.append(RangeWorker(plan, output).run(Task(range=range_)))
    assert [part.name for part in parts.list_parts(config.output)] == [part.name]
    assert (tmp_path / "out" / part.name).read_bytes() == before
    assert receipts[0].tally == receipts[1].tally
    assert isinstance(range_, Range)


def test_an_overwritten_run_is_not_joined_by_workers_of_the_run_before(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 12)
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    job.run(config)
    late = next((tmp_path / "out").glob("part-*"))
    shutil.copy(late, tmp_path / "late")
    job.run(dataclasses.replace(config, top_k=1, overwrite=True))
    shutil.copy(tmp_path / "late", late)
    (tmp_path / "out" / "summary.json").unlink()
    job.run(dataclasses.replace(config, top_k=1, verify=True))
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 12
    assert {len(row["top_k_labels"]) for row in rows if row["top_k_labels"]} == {1}


def test_parquet_parts_of_an_output_can_be_read_as_one_data_set(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 25)
    job.run(_config(bundle, tmp_path / "images", tmp_path / "out"))
    paths = sorted((tmp_path / "out").glob("part-*"))
    assert len(pa.concat_tables(map(pyarrow.parquet.read_table, paths))) == 25


def test_an_update_of_a_table_with_other_columns_classifies_all_rows(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 12)
    uris = sorted(map(str, (tmp_path / "images").rglob("*.png")))
    (tmp_path / "images.csv").write_text("uri,shot\n" + "".join(f"{uri},1\n" for uri in uris))
    config = _config(bundle, tmp_path / "images.csv", tmp_path / "out", verify=True)
    job.run(config)
    (tmp_path / "images.csv").write_text("uri,camera,shot\n" + "".join(f"{uri},left,1\n" for uri in uris))
    assert job.run(dataclasses.replace(config, update=True))["classified"] == 12
    assert {(row["camera"], row["shot"]) for row in read_rows(tmp_path / "out")} == {("left", 1)}


def test_ids_of_images_that_are_gone_are_not_used_again(bundle, in_process, tmp_path):
    fill(str(tmp_path / "images"), 12)
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    job.run(config)
    last = sorted((tmp_path / "images").rglob("*.png"))[-1]
    last.unlink()
    job.run(dataclasses.replace(config, update=True))
    last.with_name("zzz.png").write_bytes(GOOD)
    job.run(dataclasses.replace(config, update=True))
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [*range(11), 12]


def test_an_overwrite_that_was_killed_goes_on_with_the_new_run(bundle, in_process, tmp_path, monkeypatch):
    fill(str(tmp_path / "images"), 25)
    config = _config(bundle, tmp_path / "images", tmp_path / "out")
    job.run(config)
    (tmp_path / "images" / "0" / "00000.png").write_bytes(b"nothing")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(resume, "delete_files", killed)
        with pytest.raises(KeyboardInterrupt):
            job.run(dataclasses.replace(config, overwrite=True))
    # As if it had been finished: a run that was not goes on with Ray.
    monkeypatch.setattr(job, "_images_left", lambda *_: 25)
    monkeypatch.setattr(job.resume, "read_result", lambda *_: {})
    line = job.run(dataclasses.replace(config, retry_errors=True))
    assert line["classified"] == 25
    assert read_rows(tmp_path / "out")[0]["error"].startswith("not an image")
