"""Gives the ranges of a run to workers on a Ray cluster, and takes their receipts."""

import collections
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, Protocol

from cnnray import cluster
from cnnray.errors import PermanentError
from cnnray.models.bundle import BundleError
from cnnray.prediction.isolation import MAX_CRASHES
from cnnray.prediction.plan import Plan
from cnnray.prediction.ranges import Output, RangeWorker, Receipt, Task
from cnnray.prediction.worker import Worker as Worker

log = logging.getLogger(__name__)

_TASKS_OF_A_WORKER = 2
"""Ranges that a worker has, so that it need not wait for the next one."""
_MAX_LOST = 10
"""Workers that may be lost with the same range, on nodes that end or by crashes."""
_OWNER_DIED = "its owner has died"
"""Ray says so of a worker where this process's own node is lost: the cluster gives this process no other worker."""
_SECONDS = 1.0
"""Longest wait for a receipt, before other things are looked at."""


class PredictionError(PermanentError, RuntimeError):
    """A run that cannot start, or that failed; the message is one sentence for the user."""


class _Actor:
    """A worker's actor, and the ranges that it has."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.tasks: dict[Any, Task] = {}
        """By the reference to the receipt."""
        self.loading: Any = actor.ready.remote()
        """Reference that is ready once the worker is; None from then on."""

    @property
    def references(self) -> list[Any]:
        return [self.loading] if self.loading is not None else list(self.tasks)

    def start(self, task: Task) -> None:
        self.tasks[self.actor.run.remote(task)] = task


class Dispatcher:
    """The workers of a run."""

    def __init__(self, plan: Plan, output: Output, at_once: int = 1) -> None:
        """
        Args:
            plan: the engine, and the number of workers and what each has.
            output: what workers know of the run.
            at_once: ranges that a worker classifies at once, at most `_TASKS_OF_A_WORKER`. More than one pays where
                images come over a network: with local files threads only wait for one another.
        """
        self._plan, self._output, self._at_once = plan, output, at_once
        self._workers: list[_Actor] = []
        self._again: collections.deque[Task] = collections.deque()
        """Ranges of workers that were lost."""
        self._lost: collections.Counter[int] = collections.Counter()
        """How many workers were lost with a range, by its first row."""
        self._crashed_loading = 0

    def run(self, tasks: "Tasks") -> Generator[Receipt | None]:
        """Carry out tasks.

        Yields:
            receipts, in any order; None about once a second where there are none.

        Raises:
            CnnrayError: raised by a worker, or a range was lost too often.
        """
        import ray

        class_ = ray.remote(
            num_cpus=self._plan.pool.cpus, num_gpus=self._plan.pool.gpus, max_concurrency=self._at_once
        )(RangeWorker)
        try:
            while True:
                self._hand_out(tasks)
                self._start_workers(tasks, class_)
                references = [reference for worker in self._workers for reference in worker.references]
                if tasks.ended and not self._again and not any(worker.tasks for worker in self._workers):
                    return
                ready = self._wait(references)
                for worker in [worker for worker in self._workers if not ready.isdisjoint(worker.references)]:
                    yield from self._receipts(worker, ready)
                yield None
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)

    def _wait(self, references: list[Any]) -> set[Any]:
        import ray

        if not references:
            time.sleep(_SECONDS / 10)  # ranges are still being listed
            return set()
        ray.wait(references, timeout=_SECONDS)
        return set(ray.wait(references, num_returns=len(references), timeout=0)[0])

    def _hand_out(self, tasks: "Tasks") -> None:
        """Give ranges to workers that have room: each gets one before one gets two."""
        for number in range(_TASKS_OF_A_WORKER):
            for worker in self._workers:
                if worker.loading is None and len(worker.tasks) == number:
                    task = self._again.popleft() if self._again else tasks.take()
                    if task is None:
                        return
                    worker.start(task)

    def _start_workers(self, tasks: "Tasks", class_: Any) -> None:
        """Start the first workers; later more where all have work and there is more, and instead of lost ones."""
        pool, count = self._plan.pool, len(self._workers)
        loading = sum(worker.loading is not None for worker in self._workers)
        is_busy = (self._again or not tasks.ended) and not any(
            worker.loading is None and len(worker.tasks) < _TASKS_OF_A_WORKER for worker in self._workers
        )
        wanted = (
            pool.first if count < pool.first else min(pool.largest, 2 * count) if is_busy and not loading else count
        )
        wanted = min(wanted, max(pool.smallest, self._most_useful(tasks)))
        self._workers += [_Actor(class_.remote(self._plan, self._output, Worker)) for _ in range(wanted - count)]

    def _most_useful(self, tasks: "Tasks") -> int:
        """The number of workers beyond which some would never have a range."""
        waiting = sum(len(worker.tasks) for worker in self._workers) + len(self._again) + tasks.known
        return waiting if tasks.is_complete else self._plan.pool.largest

    def _receipts(self, worker: _Actor, ready: set[Any]) -> Iterator[Receipt]:
        import ray

        try:
            if worker.loading in ready:
                ray.get(worker.loading)
                worker.loading, self._crashed_loading = None, 0
            for reference in ready & worker.tasks.keys():
                receipt = ray.get(reference)
                del worker.tasks[reference]
                yield receipt
        except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError) as error:
            if (reason := cluster.user_error(error)) is not None:
                raise reason from error
            self._lose(worker, error)
        except ray.exceptions.RayError as error:
            sentence = f"Prediction failed: {cluster.last_line(error)} (The same command resumes the run.)"
            raise cluster.user_error(error) or PredictionError(sentence) from error

    def _lose(self, worker: _Actor, error: Exception) -> None:
        """Take back the ranges of a worker that crashed, or whose node is lost.

        Raises:
            CnnrayError: there is no use in another worker.
        """
        import ray

        if _OWNER_DIED in str(error):
            raise PredictionError(
                "The cluster has lost the node on which this job runs; the same command goes on from what was done."
            ) from error
        log.warning("a worker was lost: %s", cluster.last_line(error))
        self._workers.remove(worker)
        ray.kill(worker.actor)  # one that is only cut off
        if worker.loading is not None:
            self._crashed_loading += 1
            if self._crashed_loading >= MAX_CRASHES:
                raise BundleError(
                    f"A worker crashed {MAX_CRASHES} times while it loaded {self._plan.bundle.uri} for "
                    f"{self._plan.engine}: it may have too little memory."
                )
        for task in worker.tasks.values():
            self._lost[task.range.first] += 1
            lost = self._lost[task.range.first]
            if lost >= _MAX_LOST:
                raise PredictionError(
                    f"{lost} workers were lost while they classified the images {task.range.first} to "
                    f"{task.range.first + task.range.rows - 1}: look at the nodes' logs, then run the same command."
                )
            self._again.append(replace(task, isolated=lost >= MAX_CRASHES))


class Tasks(Protocol):
    """Where tasks come from."""

    is_complete: bool
    """Whether no tasks come in addition to those that are known."""

    @property
    def ended(self) -> bool:
        """Whether all tasks have been taken."""

    @property
    def known(self) -> int:
        """Tasks that have not been taken, as far as they are known."""

    def take(self) -> Task | None:
        """The next task; None where there is none at the moment."""
