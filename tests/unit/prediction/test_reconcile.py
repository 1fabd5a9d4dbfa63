"""The end of a run: every range has one part, and every image one row."""

import dataclasses
import shutil

import pyarrow.parquet
import pytest

from cnnray.prediction import parts
from cnnray.prediction.parts import PartError
from cnnray.prediction.ranges import Task
from cnnray.prediction.reconcile import Received, reconcile
from tests.unit.prediction.helpers import range_worker


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
    results = [
        reconcile(config, ranges, _received(config, some), multi_label=False) for some in (receipts, receipts[1:], [])
    ]
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
    worker, classifier = range_worker(tmp_path)
    classifier.trouble = {4}
    late = worker.run(Task(range=ranges[0], attempt=1))
    assert late.part.incomplete
    classifier.trouble = set()
    late = worker.run(Task(range=ranges[0], attempt=2, earlier=late.part))
    totals, counting = reconcile(config, ranges, _received(config, receipts), multi_label=False)
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
        reconcile(config, ranges, _received(config, []), multi_label=False)
    path.unlink()
    with pytest.raises(PartError, match=r"10 images have no row, for example those from id 10 to 19. Run the same"):
        reconcile(config, ranges, _received(config, receipts), multi_label=False)
