"""The counts of a run, its summary and its list of errors."""

import csv
import dataclasses

from cnnray.prediction import tally
from cnnray.prediction.summary import summarize
from cnnray.prediction.tally import Tally, error_rows, join_errors, write_errors
from tests.unit.prediction.helpers import make_rows


def test_tallies_add_up_and_survive_their_storage():
    ids = list(range(20))
    whole, sum_ = Tally.of(make_rows(ids), 0.5), Tally(0.5)
    for group in (ids[12:], ids[:5], ids[5:12]):  # ranges end in any order
        tally = Tally.of(make_rows(group), 0.5)
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
        tally.add(Tally.of(make_rows(ids), 0.5))
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
        write_errors(str(tmp_path / name), error_rows(make_rows(ids)))

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
