"""Tasks that are taken while the manifest is still being listed."""

import threading

import pytest

from cnnray.images import storage
from cnnray.prediction import listed
from cnnray.prediction.listed import ListedTasks
from cnnray.prediction.ranges import Task
from tests.e2e.conftest import until
from tests.unit.prediction.helpers import make_ranges


def test_tasks_are_taken_while_ranges_are_listed():
    ranges, listed = make_ranges(4), threading.Event()

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
        yield from make_ranges(1)
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
    tasks = ListedTasks(iter(make_ranges(1000)), lambda range_: Task(range=range_))
    tasks.start()
    until(lambda: tasks.known == 5, 60, "5 tasks")
    assert len(tasks.ranges) <= 6
    tasks.stop()
    assert len(tasks.ranges) <= 7
    assert not tasks.is_complete
