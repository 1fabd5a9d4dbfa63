"""The workers of a cluster: when they are added, and what happens when they are lost."""

import contextlib
from types import SimpleNamespace

import pytest

from cnnray.models.bundle import BundleError
from cnnray.prediction import dispatch
from cnnray.prediction.dispatch import Dispatcher, PredictionError
from cnnray.prediction.pool import Pool
from cnnray.prediction.ranges import Task
from tests.unit.prediction.helpers import make_ranges


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
        worker.tasks = {(number, task): Task(range=make_ranges(1)[0]) for task in range(tasks_each)}


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
    pool, (range_, other) = dispatcher(1, 1, 1), make_ranges(2)
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
