"""What is left to do where an earlier run has written parts."""

import dataclasses

from cnnray.images.shards import Range
from cnnray.prediction import resume
from cnnray.prediction.parts import Part
from cnnray.prediction.ranges import Task
from tests.unit.prediction.helpers import make_config, write_part


def test_the_part_that_counts_is_that_of_the_last_attempt_in_the_ranges_generation(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for generation, attempt, incomplete in ((0, 0, False), (0, 1, True), (0, 2, True), (0, 2, False), (2, 9, False)):
        write_part(out, range(10, 20), generation=generation, attempt=attempt, incomplete=incomplete)
    write_part(out, range(10, 20), attempt=7, format_="csv")
    committed = resume.Committed(make_config(tmp_path))
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
    complete = write_part(out, range(10))
    incomplete = write_part(out, range(10, 15), attempt=3, incomplete=True)
    ranges = [Range(first, first + 9, 10, 0, number, 0) for number, first in enumerate((0, 10, 20))]
    committed = resume.Committed(make_config(tmp_path))

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
    part = write_part(out, range(10), format_="csv")
    committed = resume.Committed(make_config(tmp_path, format="csv"))
    range_ = Range(0, 9, 10, 0, 0, 0)
    assert resume.plan_task(range_, committed, frozenset([part])) == Task(range=range_, attempt=1)
    updated = dataclasses.replace(range_, generation=1)
    assert resume.plan_task(updated, committed, frozenset()) == Task(range=updated)
