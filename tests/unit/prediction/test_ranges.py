"""How a worker classifies a range of the manifest and commits its part."""

import csv

import pytest

from cnnray.images.lease import LeaseLostError
from cnnray.prediction import parts, resume
from cnnray.prediction.parts import Part
from cnnray.prediction.ranges import Task
from cnnray.prediction.tally import Tally
from tests.unit.prediction.helpers import make_config, range_worker, write_manifest


def test_a_range_is_committed_with_the_columns_of_the_manifest(tmp_path):
    (_, range_) = write_manifest(tmp_path / "manifest", 17, shot=list(range(17)), error=["none"] * 17)
    worker, classifier = range_worker(tmp_path)
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
    (range_,) = write_manifest(tmp_path / "manifest", 10)
    worker, classifier = range_worker(tmp_path, format=kind)
    classifier.trouble = {1, 8, 9}
    receipt = worker.run(Task(range=range_))
    assert receipt.part == Part(0, 0, 0, True, kind)
    assert (receipt.tally.rows, receipt.tally.errors, receipt.unavailable.rows) == (7, 1, 3)
    assert receipt.unavailable.reasons == {"unavailable": 3}
    assert parts.read(str(tmp_path / "out"), receipt.part)["id"].to_pylist() == [0, 2, 3, 4, 5, 6, 7]
    with (tmp_path / "out" / receipt.part.errors_name).open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["1", "3", "8", "9"]

    task = resume.plan_task(range_, resume.Committed(make_config(tmp_path, format=kind)), frozenset())
    classifier.read, classifier.trouble = [], set()
    receipt = worker.run(task)
    assert receipt.part == Part(0, 0, 1, False, kind)
    assert classifier.read == ([1, 8, 9] if kind == "parquet" else list(range(10)))
    assert (receipt.classified, receipt.tally.rows, receipt.unavailable) == (len(classifier.read), 10, None)
    assert parts.read(str(tmp_path / "out"), receipt.part)["id"].to_pylist() == list(range(10))


def test_rows_whose_storage_was_in_trouble_have_an_error_if_asked_for(tmp_path):
    (range_,) = write_manifest(tmp_path / "manifest", 10)
    worker, classifier = range_worker(tmp_path, skip_unreadable=True)
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
    (range_,) = write_manifest(tmp_path / "manifest", 10)
    first, second = range_worker(tmp_path, skip_unreadable=True), range_worker(tmp_path, skip_unreadable=True)
    second[1].trouble = {1}
    receipts = [worker.run(Task(range=range_)) for worker, _ in (first, second)]
    assert receipts[0].part == receipts[1].part
    assert receipts[0].tally == receipts[1].tally
    assert receipts[1].tally.reasons == {"corrupt": 1}


def test_a_worker_whose_run_has_ended_writes_nothing(tmp_path):
    (range_,) = write_manifest(tmp_path / "manifest", 10)
    worker, _ = range_worker(tmp_path, lease_holder="an earlier run")
    with pytest.raises(LeaseLostError):
        worker.run(Task(range=range_))
    assert not list((tmp_path / "out").iterdir())
