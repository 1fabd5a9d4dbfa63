"""The Ray cluster that a job runs on: found or started, and asked for what it has before anything waits."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from cnnray.errors import CnnrayError, PermanentError
from cnnray.images import storage
from cnnray.progress import duration

log = logging.getLogger(__name__)

Planned = TypeVar("Planned")

LOOK_SECONDS = 5.0
"""Time between two looks at a cluster that lacks nodes, or may lose some."""
_SAY_SECONDS = 60.0
LOST_MINUTES = 10.0
"""How long a running job waits for nodes that were lost, where it is not told."""


class ClusterError(PermanentError, RuntimeError):
    """A cluster that cannot run the job; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node has in all."""

    cpus: float
    gpus: float = 0.0
    object_store_bytes: int = 0


@dataclass(frozen=True)
class Resources:
    """What a cluster has in all, node by node."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """Of the whole cluster."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """Of the whole cluster."""
        return sum(node.gpus for node in self.nodes)

    @property
    def object_store_bytes(self) -> int:
        """Of the whole cluster."""
        return sum(node.object_store_bytes for node in self.nodes)

    @property
    def smallest_object_store_bytes(self) -> int:
        """Of the node that has least."""
        return min(node.object_store_bytes for node in self.nodes)

    def room_for(self, cpus: float, gpus: float) -> int:
        """How many processes of so many CPUs (more than 0) and GPUs fit, each on one node."""
        slack = 1e-6
        return sum(
            min(int(node.cpus / cpus + slack), int(node.gpus / gpus + slack) if gpus else 2**31)
            for node in self.nodes
        )


def user_error(error: BaseException | None) -> CnnrayError | None:
    """The package's own error that made a Ray task, actor, dataset or Ray Train worker fail; None where another did.

    Ray wraps errors several deep. Of an error in a dataset or in the start of an actor it keeps the traceback's text
    alone, whose last lines name the class and the sentence.
    """
    import ray

    if error is None or (isinstance(error, CnnrayError) and not isinstance(error, ray.exceptions.RayTaskError)):
        return error
    wrapped = [getattr(error, name, None) for name in ("cause", "controller_failure", "_base_exc", "__cause__")]
    wrapped += getattr(error, "worker_failures", {}).values()
    for inner in wrapped:
        if inner is not error and (found := user_error(inner)):
            return found
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(CnnrayError)}
    raised = re.findall(r"^(cnnray\.[\w.]+): (.+)$", str(error), re.MULTILINE)
    return next((kinds[name](sentence) for name, sentence in reversed(raised) if name in kinds), None)


def _subclasses(kind: type[CnnrayError]) -> Iterator[type[CnnrayError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def last_line(error: BaseException) -> str:
    """What went wrong on a worker: the last line of the traceback that Ray gives."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def starts_own() -> bool:
    """Whether `connected` starts a Ray of its own on this machine: where RAY_ADDRESS names no cluster, and this
    process has joined none."""
    ray = sys.modules.get("ray")  # not imported for this: it takes a second
    return not os.environ.get("RAY_ADDRESS") and not (ray and ray.is_initialized())


def local_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def submitted_environment() -> dict[str, Any]:
    """Ray's runtime environment that this job was submitted with; empty for a job that was not submitted."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return dict(submitted.get("runtime_env", {}))


@contextlib.contextmanager
def connected() -> Iterator[Resources]:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine for as long as it is needed.

    A job that was given by `ray job submit` finds RAY_ADDRESS set. Where Ray is connected already, that
    connection is used and left as it is.

    Raises:
        ClusterError: RAY_ADDRESS names no cluster that can be reached.
    """
    import ray

    if ray.is_initialized():
        yield resources()
        return
    given = submitted_environment().get("env_vars", {})  # which Ray refuses to set once more
    # Jobs show progress of their own, also where a dataset is read in an actor.
    variables = {"TF_CPP_MIN_LOG_LEVEL": "2", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"} | storage.cluster_environment()
    # Ray Train's own actors ask the machine for the cluster's address, and there may be several clusters on it: they
    # would then leave the CPUs of a trial that was stopped reserved for ever.
    variables["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS") or f"{ray.util.get_node_ip_address()}:{_own_port()}"
    variables = {name: value for name, value in variables.items() if name not in given}
    if starts_own():
        # Nobody takes away a machine that the job started Ray on; the watcher would log an error of its own.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # Ray ends idle processes beyond one a CPU, which then start anew (1 to 2 s) with every epoch's tasks.
        os.environ.setdefault("RAY_num_workers_soft_limit", str(4 * local_cpus()))
        # Nor does anybody start its control service again, for which Ray waits a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "local",
            runtime_env={"env_vars": variables},
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"No Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')}: {reason}") from None
    if threading.current_thread() is threading.main_thread():
        # Set once more, Python's handler takes the place of Ray's, which prints a stack trace before it calls that.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        found = resources()
        log.info("Ray %s: %d node(s), %g CPUs, %g GPUs", ray.__version__, len(found.nodes), found.cpus, found.gpus)
        yield found
    finally:
        ray.shutdown()
        os.environ.pop("RAY_GCS_SERVER_PORT", None)


def _own_port() -> int:
    """A free port, at which the Ray that this process starts will be asked: it reads it from its environment."""
    with socket.socket() as one:
        one.bind(("", 0))
        port: int = one.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    return port


def resources() -> Resources:
    """What the cluster has that this process is connected to.

    Raises:
        ClusterError: it is connected to none.
    """
    import ray

    if not ray.is_initialized():
        raise ClusterError("Ray is not connected: call ray.init() first.")
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(
        tuple(
            Node(
                cpus=has.get("CPU", 0.0),
                gpus=has.get("GPU", 0.0),
                object_store_bytes=int(has.get("object_store_memory", 0)),
            )
            for has in found
        )
    )


class Shortage:
    """What a job lacks nodes for: said when it begins and every minute, and not waited for longer than is allowed."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            minutes: that it may last.
            clock: gives seconds.
        """
        self._minutes, self._clock = minutes, clock
        self._since: float | None = None
        self._said = -_SAY_SECONDS

    def look(self, plan: Callable[[Resources], Planned]) -> Planned | None:
        """What a plan of the cluster as it is gives; None where it lacks nodes.

        Args:
            plan: raises `ClusterError` where the cluster has too little.

        Raises:
            ClusterError: it has had too little for too long.
        """
        try:
            planned = plan(resources())
        except ClusterError as error:
            self.lasts(error)
            return None
        if self._since is not None:
            log.info("the nodes are there, after %s", duration(self._clock() - self._since))
        self._since, self._said = None, -_SAY_SECONDS
        return planned

    def lasts(self, error: ClusterError) -> None:
        """Say what is lacking.

        Raises:
            ClusterError: it has lasted too long.
        """
        if not self._minutes:
            raise error
        now = self._clock()
        self._since = now if self._since is None else self._since
        left = self._since + 60 * self._minutes - now
        if left <= 0:
            raise ClusterError(f"{error} (Waited {self._minutes:g} minutes for nodes.)")
        if now - self._said >= _SAY_SECONDS:
            self._said = now
            log.info("waiting for nodes, at most %s: %s", duration(left), error)


def wait_for_resources(
    plan: Callable[[Resources], Planned], bundles: list[dict[str, float]], minutes: float | None
) -> Planned:
    """Plan a job on what the cluster has; where that is too little, wait for more, and ask the autoscaler for it.

    Args:
        plan: gives something, or raises `ClusterError` where it is too little.
        bundles: what the job would like to have: the resources of each of its processes.
        minutes: to wait at most; None or 0: not at all.

    Raises:
        ClusterError: it is still too little.
    """
    shortage = Shortage(minutes or 0.0)
    if (planned := shortage.look(plan)) is not None:
        return planned
    from ray.autoscaler import sdk

    try:
        while planned is None:
            # Again and again: each request replaces all others of the cluster, such as those of other jobs.
            sdk.request_resources(bundles=[{name: has for name, has in one.items() if has} for one in bundles])
            time.sleep(LOOK_SECONDS)
            planned = shortage.look(plan)
        return planned
    finally:
        # Else it would hold the nodes for ever; jobs that run ask for themselves.
        sdk.request_resources(bundles=[])


@contextlib.contextmanager
def watch(check: Callable[[Resources], object], minutes: float | None) -> Iterator[None]:
    """Watch the cluster while something runs in the main thread, which Ray may let wait for ever for lost nodes.

    Args:
        check: raises `ClusterError` where the cluster has too little to go on.
        minutes: that this may last; None: `LOST_MINUTES`.

    Raises:
        ClusterError: it lasted longer; what ran was interrupted.
    """
    shortage, ended = Shortage(LOST_MINUTES if minutes is None else minutes), threading.Event()
    errors: list[ClusterError] = []

    def interrupt(*_: object) -> None:
        if not ended.is_set():
            raise errors[0]

    def watch() -> None:
        while not errors and not ended.wait(LOOK_SECONDS):
            try:
                shortage.look(check)
            except ClusterError as error:
                errors.append(error)
                # Not SIGINT, which jobs that a shell runs in its background ignore.
                signal.pthread_kill(main, signal.SIGUSR1)

    main, before = threading.get_ident(), signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(LOOK_SECONDS)
        signal.signal(signal.SIGUSR1, before)
