"""The full check of an output by the ids of the manifest."""

import logging

import pytest

from cnnray.prediction import verify
from cnnray.prediction.parts import PartError
from tests.unit.prediction.helpers import write_part


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
    write_part(tmp_path / "out", ids, first=10)
    sentence = rf"1 output files have other ids .*part-000000000010-0.0.parquet \({difference}\): delete it"
    with pytest.raises(PartError, match=sentence):
        verify.verify(config, ranges, str(tmp_path / "manifest"))


def test_the_full_check_finds_missing_and_foreign_files(committed, tmp_path):
    config, ranges, receipts = committed
    foreign = write_part(tmp_path / "out", range(40, 50))
    with pytest.raises(PartError, match=r"part-000000000040-0.0.parquet is of no range of the manifest: delete it"):
        verify.verify(config, ranges, str(tmp_path / "manifest"))
    (tmp_path / "out" / foreign.name).unlink()
    for receipt in receipts[1:]:
        (tmp_path / "out" / receipt.part.name).unlink()
    with pytest.raises(PartError, match=r"2 output files .* for example the ids from 10 to 19 have no file"):
        verify.verify(config, ranges, str(tmp_path / "manifest"))
