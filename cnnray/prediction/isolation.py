"""Classifies images one by one in a process of their own, to find those that end their process."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pyarrow as pa

from cnnray.errors import CnnrayError
from cnnray.images import containers
from cnnray.models.bundle import BundleError
from cnnray.prediction.plan import Plan
from cnnray.prediction.worker import Worker

CRASHED = "crashed: the worker process crashed each time it was given this image"

MAX_CRASHES = 2
"""How often a range may end its worker, and an image its process."""


def classify_one_by_one(plan: Plan, rows: pa.Table, worker: Worker) -> Iterator[pa.Table]:
    """Classify rows of a manifest in a child process, and start another one without the images that end it.

    Args:
        plan: of the run.
        rows: with `id` and `uri`.
        worker: gives the rows of images that end their process.

    Raises:
        BundleError: the child process cannot load the network.
        CnnrayError: raised in the child process.

    Yields:
        rows with their predictions.
    """
    done, crashes = 0, 0
    while done < len(rows):
        mine, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("spawn").Process(
            target=_classify, args=[theirs, plan, type(worker), rows.slice(done)], daemon=True
        )
        child.start()
        theirs.close()
        loaded = False
        try:
            while done < len(rows):
                answer = mine.recv()
                if isinstance(answer, Exception):
                    raise answer
                loaded = True
                if answer is not None:
                    done, crashes = done + 1, 0
                    yield answer
        except EOFError:
            if not loaded:
                raise BundleError(
                    f"A process crashed while it loaded {plan.bundle.uri} for {plan.engine}: it may have too little "
                    "memory."
                ) from None
            crashes += 1
            if crashes == MAX_CRASHES:
                yield worker.without_image(rows.slice(done, 1), CRASHED)
                done, crashes = done + 1, 0
        finally:
            child.kill()
            child.join()
            mine.close()


def _classify(answers: Connection, plan: Plan, worker_class: type[Worker], rows: pa.Table) -> None:
    """Send None once the network is loaded, then the classified rows one by one, or an error."""
    try:
        worker = worker_class(plan)
        answers.send(None)
        sources = containers.encoded(rows["uri"].to_pylist())
        for place in range(len(rows)):
            (row,) = worker(rows.slice(place, 1), sources)
            answers.send(row)
    except CnnrayError as error:
        answers.send(error)
