"""The waits of jobs: for nodes that a job lacks, for room that other jobs hold, and for functions in threads."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from cnnray import cluster
from cnnray.cluster import ClusterError, Resources
from cnnray.progress import duration

log = logging.getLogger(__name__)

Planned = TypeVar("Planned")
Result = TypeVar("Result")
Clock = Callable[[], float]

POLL_SECONDS = 5.0
"""Seconds between two readings of the resources of a cluster that lacks nodes or may lose some."""
_PLACING_SECONDS = 30.0
"""Seconds in which Ray starts the process of a worker for which there is room."""
_LOG_SECONDS = 60.0
"""Seconds between two log lines of a wait for room."""
LOST_MINUTES = 10.0
"""Minutes that a job waits for lost nodes, or for room that other jobs hold, unless --wait-minutes says otherwise."""


class Shortage:
    """The wait of a job for room: logged when it begins and every minute, and limited in time."""

    def __init__(self, minutes: float, clock: Clock = time.monotonic) -> None:
        """
        Args:
            minutes: the longest wait.
            clock: returns seconds.
        """
        self._minutes, self._clock = minutes, clock
        self._since: float | None = None
        self._logged = -_LOG_SECONDS

    def try_plan(self, plan: Callable[[Resources], Planned]) -> Planned | None:
        """Plan with the present resources.

        Args:
            plan: raises `ClusterError` if the resources are too small.

        Returns:
            What `plan` returns; None if the resources are too small.

        Raises:
            ClusterError: they have been too small for too long.
        """
        try:
            planned = plan(cluster.resources())
        except ClusterError as error:
            self._wait_for(error)
            return None
        if self._since is not None:
            log.info("there is room, after %s", duration(self._clock() - self._since))
        self._since, self._logged = None, -_LOG_SECONDS
        return planned

    def _wait_for(self, error: ClusterError) -> None:
        """Log what is missing, at most once a minute.

        Raises:
            ClusterError: the wait has lasted too long.
        """
        if not self._minutes:
            raise error
        now = self._clock()
        self._since = now if self._since is None else self._since
        left = self._since + 60 * self._minutes - now
        if left <= 0:
            raise ClusterError(f"{error} (Waited {self._minutes:g} minutes for room.)")
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            log.info("waiting for room, at most %s: %s", duration(left), error)


def wait_for_resources(
    plan: Callable[[Resources], Planned], requests: list[dict[str, float]], minutes: float | None
) -> Planned:
    """Plan a job with the cluster's resources; if they are too small, ask the autoscaler for more, and wait.

    Args:
        plan: returns a plan, or raises `ClusterError` if the resources are too small.
        requests: the resources of each process that the job would like to run.
        minutes: the longest wait; None or 0: do not wait.

    Raises:
        ClusterError: the resources are still too small.
    """
    shortage = Shortage(minutes or 0.0)
    if (planned := shortage.try_plan(plan)) is not None:
        return planned
    from ray.autoscaler import sdk

    try:
        while planned is None:
            # Each request replaces all others of the cluster, such as those of other jobs, so it is repeated.
            sdk.request_resources(bundles=_without_zeros(requests))
            time.sleep(POLL_SECONDS)
            planned = shortage.try_plan(plan)
        return planned
    finally:
        # Without this the request would keep the nodes for ever. Running jobs make requests of their own.
        sdk.request_resources(bundles=[])


def wait_for_room(requests: list[dict[str, float]], minutes: float | None) -> None:
    """Wait until other jobs leave room for the processes that a job begins with.

    Ray would wait for ever, without a word. The autoscaler sees what is asked for.

    Args:
        requests: the resources of each process.
        minutes: the longest wait; None: `LOST_MINUTES`.

    Raises:
        ClusterError: other jobs hold the room.
    """
    needed = _without_zeros(requests)
    if cluster.is_own() or not needed:
        return
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    shortage = Shortage(LOST_MINUTES if minutes is None else minutes)

    def fail(total: Resources) -> None:
        raise _no_room(needed, cluster.free_resources(), total)

    group = placement_group(needed)
    try:
        placed = group.ready()
        while not ray.wait([placed], timeout=POLL_SECONDS)[0]:
            shortage.try_plan(fail)
        shortage.try_plan(lambda _: None)
    finally:
        remove_placement_group(group)


class Placement:
    """Whether the workers of a job have room, which another job may have taken after `wait_for_room`."""

    def __init__(self, class_name: str, requests: list[dict[str, float]], clock: Clock = time.monotonic) -> None:
        """
        Args:
            class_name: of the workers' actors.
            requests: the resources of each of the fewest workers.
            clock: returns seconds.
        """
        self._class_name, self._requests, self._clock = class_name, requests, clock
        self._placed = clock()

    def check(self, total: Resources) -> None:
        """
        Raises:
            ClusterError: no worker has had a node for a while, and other jobs hold the room.
        """
        if cluster.has_actor(self._class_name):
            self._placed = self._clock()
        if self._clock() - self._placed < _PLACING_SECONDS:
            return
        free, worker = cluster.free_resources(), self._requests[0]
        if free.room_for(worker["CPU"], worker["GPU"]) < len(self._requests):
            raise _no_room(_without_zeros(self._requests), free, total)


def _no_room(requests: list[dict[str, float]], free: Resources, total: Resources) -> ClusterError:
    cpus, gpus = (max(request.get(kind, 0.0) for request in requests) for kind in ("CPU", "GPU"))
    return ClusterError(
        f"Other jobs leave {free.cpus:g} of the cluster's {total.cpus:g} CPUs and {free.gpus:g} of its "
        f"{total.gpus:g} GPUs, and this job begins with {len(requests)} process(es), of up to {cpus:g} CPUs and "
        f"{gpus:g} GPUs on one node: end them, or give --wait-minutes."
    )


def _without_zeros(requests: list[dict[str, float]]) -> list[dict[str, float]]:
    named = [{name: amount for name, amount in request.items() if amount} for request in requests]
    return [request for request in named if request]


@contextlib.contextmanager
def watch(check: Callable[[Resources], object], minutes: float | None) -> Iterator[None]:
    """Watch the resources while the main thread runs something that might wait for lost nodes for ever.

    Args:
        check: raises `ClusterError` if the resources are too small to continue.
        minutes: how long they may be too small; None: `LOST_MINUTES`.

    Raises:
        ClusterError: they were too small for longer; the main thread was interrupted.
    """
    shortage, ended = Shortage(LOST_MINUTES if minutes is None else minutes), threading.Event()
    errors: list[ClusterError] = []

    def interrupt(*_: object) -> None:
        if not ended.is_set():
            raise errors[0]

    def poll() -> None:
        while not errors and not ended.wait(POLL_SECONDS):
            try:
                shortage.try_plan(check)
            except ClusterError as error:
                errors.append(error)
                # Jobs that a shell runs in its background ignore SIGINT.
                signal.pthread_kill(main, signal.SIGUSR1)

    main, before = threading.get_ident(), signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(POLL_SECONDS)
        signal.signal(signal.SIGUSR1, before)


def in_background(function: Callable[[], Result]) -> Future[Result]:
    """Call a function in a thread that does not keep the process alive.

    Ray's `fit` is called so: in the main thread it has a handler for Ctrl-C that ends the process with 0.
    """
    outcome: Future[Result] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return outcome


def interruptible(outcome: Future[Result], watch: Callable[[], None] = lambda: None) -> Result:
    """Wait for a function that runs in a thread, so that Ctrl-C raises here.

    Args:
        outcome: of the function (see `in_background`).
        watch: called every few seconds meanwhile; an exception that it raises ends the wait.
    """
    while not wait([outcome], timeout=POLL_SECONDS).done:
        watch()
    return outcome.result()
