"""The Ray cluster that a job runs on: connection or start, resources, and the errors of its workers."""

import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnnray.cpus import usable_cpus
from cnnray.errors import CnnrayError, PermanentError
from cnnray.images import storage

log = logging.getLogger(__name__)


_PORTS = range(20_000, 30_000)
"""Of processes that are started later."""
_GPU_TYPE = "accelerator_type:"
"""Beginning of the name of a node's resource."""


class ClusterError(PermanentError, RuntimeError):
    """A cluster that cannot run the job; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """The resources of one node, used and free."""

    cpus: float
    gpus: float = 0.0
    gpu_type: str | None = None
    """Such as A100 or T4, as Ray calls it; None where Ray does not know it."""
    object_store_bytes: int = 0


@dataclass(frozen=True)
class Resources:
    """The resources of a cluster, used and free, node by node."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPUs of the whole cluster."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of the whole cluster."""
        return sum(node.gpus for node in self.nodes)

    @property
    def object_store_bytes(self) -> int:
        """Bytes of all object stores together."""
        return sum(node.object_store_bytes for node in self.nodes)

    @property
    def smallest_object_store_bytes(self) -> int:
        """Bytes of the smallest object store."""
        return min(node.object_store_bytes for node in self.nodes)

    @property
    def gpu_types(self) -> set[str | None]:
        """The types of all GPUs."""
        return {node.gpu_type for node in self.nodes if node.gpus}

    def without_gpus(self) -> "Resources":
        """The same nodes, without their GPUs."""
        return Resources(tuple(replace(node, gpus=0.0, gpu_type=None) for node in self.nodes))

    def cpus_beside(self, gpus: float) -> float:
        """CPUs of a process by default: 1, or with GPUs an even share of the CPUs of the nodes that have GPUs."""
        gpu_nodes = [node for node in self.nodes if gpus and node.gpus >= gpus]
        if not gpu_nodes:
            return min(1.0, max(node.cpus for node in self.nodes))
        return max(1.0, float(min(node.cpus * gpus // node.gpus for node in gpu_nodes)))

    def room_for(self, cpus: float, gpus: float) -> int:
        """How many processes with this many CPUs (more than 0) and GPUs fit, each on one node."""
        slack = 1e-6
        return sum(
            min(int(node.cpus / cpus + slack), int(node.gpus / gpus + slack) if gpus else 2**31)
            for node in self.nodes
        )


def user_error(error: BaseException | None) -> CnnrayError | None:
    """The package's own error that made a Ray task, actor, dataset or Ray Train worker fail; None for other errors.

    Ray wraps an error in several others. For an error in a dataset or in the start of an actor it keeps only the text
    of the traceback, whose last lines hold the class and the message.
    """
    import ray

    if error is None or (isinstance(error, CnnrayError) and not isinstance(error, ray.exceptions.RayTaskError)):
        return error
    for inner in _wrapped(error):
        if reason := user_error(inner):
            return reason
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(CnnrayError)}
    raised = re.findall(r"^(cnnray\.[\w.]+): (.+)$", str(error), re.MULTILINE)
    return next((kinds[name](sentence) for name, sentence in reversed(raised) if name in kinds), None)


def _wrapped(error: BaseException) -> list[BaseException]:
    """The errors that an error of Ray holds."""
    names = ("cause", "controller_failure", "_base_exc", "__cause__")
    held = [getattr(error, name, None) for name in names] + [*getattr(error, "worker_failures", {}).values()]
    return [inner for inner in held if isinstance(inner, BaseException) and inner is not error]


def full_trace(error: BaseException) -> str:
    """The traceback of an error, and behind it those of the workers that made it, which Ray keeps as text."""
    text, left, seen = "".join(traceback.format_exception(error)), [error], {id(error)}
    while left:
        inner = left.pop()
        # An error that was taken out of Ray's is raised from it, and so each holds the other.
        new = [held for held in _wrapped(inner) if id(held) not in seen]
        seen |= {id(held) for held in new}
        left += new
        for worker in (str(inner), *getattr(inner, "__notes__", ())):
            if worker not in text:
                text += f"\n{type(inner).__name__}: {worker}\n"
    return text


def _subclasses(kind: type[CnnrayError]) -> Iterator[type[CnnrayError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def last_line(error: BaseException) -> str:
    """What went wrong on a worker: the last line of the traceback that Ray gives."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def is_connected() -> bool:
    """Whether this process is connected to Ray."""
    ray = sys.modules.get("ray")  # importing it takes a second
    return bool(ray and ray.is_initialized())


def starts_own() -> bool:
    """Whether `connected` will start Ray on this machine: no RAY_ADDRESS, and no connection of this process."""
    return not os.environ.get("RAY_ADDRESS") and not is_connected()


def may_have_gpus() -> bool:
    """Whether Ray or TensorFlow may find GPUs on this machine: Nvidia's driver is there (/dev/dxg: that of WSL)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def is_own() -> bool:
    """Whether this process has started the Ray that it is connected to, which then ends with it."""
    from ray._private import worker

    return bool(worker._global_node and worker._global_node.all_processes)


def submitted_environment() -> dict[str, Any]:
    """The runtime environment of a job that `ray job submit` started; empty for any other job."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return dict(submitted.get("runtime_env", {}))


@contextlib.contextmanager
def connected(*, dashboard: bool = False, worker_logs: bool = True) -> Iterator[Resources]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine for as long as the context lasts.

    RAY_ADDRESS is set for jobs of `ray job submit`. An existing connection is used, and left open.

    Args:
        dashboard: whether to start the dashboard, too, where a cluster is started.
        worker_logs: whether to log what workers write, where a cluster is started.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    import ray

    if ray.is_initialized():
        yield resources()
        return
    # The end of a training is seen so soon; by default after two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        context = _start(dashboard, worker_logs) if starts_own() else _connect()
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        address = os.environ.get("RAY_ADDRESS")
        what = f"No Ray cluster at {address}" if address else "Ray cannot be started on this machine"
        raise ClusterError(f"{what}: {reason}") from (None if address else error)
    if threading.current_thread() is threading.main_thread():
        # Ray's handler prints a stack trace before it calls Python's: install Python's again.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        available = resources()
        nodes = len(available.nodes)
        log.info("Ray %s: %d node(s), %g CPUs, %g GPUs", ray.__version__, nodes, available.cpus, available.gpus)
        if dashboard and context.dashboard_url:
            log.info("Ray's dashboard: http://%s", context.dashboard_url)
        yield available
    except Exception as error:
        if dead := _dead_processes():
            raise ClusterError(
                f"Ray has died on this machine ({', '.join(dead)}), perhaps for want of memory; the same command "
                "goes on from what was done."
            ) from error
        raise
    finally:
        shut_down()
        os.environ.pop("RAY_GCS_SERVER_PORT", None)


# Jobs show progress of their own, also for datasets that are read in an actor.
_OF_WORKERS = {"TF_CPP_MIN_LOG_LEVEL": "2", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


def _connect() -> Any:
    """Connect to the cluster of RAY_ADDRESS."""
    import ray

    address = os.environ["RAY_ADDRESS"]
    submitted = submitted_environment().get("env_vars", {})  # Ray refuses to set these again
    # Without the address, Ray Train's own actors look for a cluster on their machine. If there are several, they may
    # find another one, and the CPUs of a stopped trial then stay reserved for ever.
    variables = _OF_WORKERS | storage.cluster_environment() | {"RAY_ADDRESS": address}
    return ray.init(
        address=address,
        runtime_env={"env_vars": {name: value for name, value in variables.items() if name not in submitted}},
        logging_level=logging.ERROR,
    )


def _start(dashboard: bool, worker_logs: bool) -> Any:
    """Start Ray on this machine. Its processes inherit this one's environment, and need no runtime environment."""
    import ray
    from ray._private import node

    class OwnNode(node.Node):
        """Ray's, without processes that take up to two seconds of a CPU each, and the wait for the last of them."""

        def __init__(self, ray_params: Any, **options: Any) -> None:
            # A free port: where another Ray on this machine has the usual one, no job could be submitted to this one.
            ray_params.dashboard_agent_listen_port = 0
            super().__init__(ray_params, **options)

        def start_monitor(self) -> None:
            """There are no nodes to add."""

        def start_log_monitor(self) -> None:
            """It sends what workers write to this process."""
            if worker_logs:
                super().start_log_monitor()

        def start_api_server(self, *, include_dashboard: bool, raise_on_failure: bool) -> None:
            """Without the dashboard it would do nothing but report that Ray is used."""
            if include_dashboard:
                super().start_api_server(include_dashboard=include_dashboard, raise_on_failure=raise_on_failure)

    # This machine will not be preempted, and Ray Train's watcher would log an error.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"  # as Ray Train sets it for its controller
    # Ray would end idle processes beyond one per CPU, and start them again (1 to 2 s) for every epoch's tasks.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(4 * usable_cpus()))
    # Ray waits a minute for a restart of its control service, which nobody restarts here.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    variables = _OF_WORKERS | {"RAY_ADDRESS": own_address()}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    whole, node.Node = node.Node, OwnNode
    try:
        return ray.init(
            address="local", include_dashboard=dashboard, log_to_driver=worker_logs, logging_level=logging.ERROR
        )
    finally:
        node.Node = whole
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def start_dashboard() -> str:
    """Start the dashboard of the Ray that this process has started without it, and give its address.

    Raises:
        ClusterError: it cannot be started.
    """
    from ray._private import worker

    node = worker._global_node
    try:
        node.start_api_server(include_dashboard=True, raise_on_failure=True)
    except Exception as error:  # Ray raises no narrower class
        raise ClusterError(f"Ray's dashboard cannot be started: {last_line(error)}") from error
    return f"http://{node.webui_url}"


def _dead_processes() -> list[str]:
    """Those of Ray's processes that it cannot live without, that this process has started, and that have ended."""
    from ray._private import worker

    node = worker._global_node
    return [
        name
        for name in ("gcs_server", "raylet")
        for started in (node.all_processes.get(name, []) if node else [])
        if started.process.poll() is not None
    ]


def shut_down(seconds: float = 60.0) -> None:
    """End the connection to Ray, and the Ray that this process has started, even where its control service is stuck.

    `ray.shutdown` of Ray 2.60 has waited for ever for the answer to its last request (`gcs_error_subscriber.close`,
    which has no deadline), once in several runs. It continues when the service is gone.

    Args:
        seconds: the longest wait for `ray.shutdown`, and then again for its end without the service.
    """
    import ray
    from ray._private import worker

    node = worker._global_node
    shutdown = threading.Thread(target=ray.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(seconds)
    if shutdown.is_alive():
        for service in node.all_processes.get("gcs_server", []) if node else []:
            service.process.kill()
        shutdown.join(seconds)


def own_address() -> str:
    """The address of the Ray that this process starts next, which reads its port from RAY_GCS_SERVER_PORT."""
    import ray

    port = free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    return f"{ray.util.get_node_ip_address()}:{port}"


def free_port() -> int:
    """A port of this machine that nothing listens on, for a process that starts later.

    The system does not give it to a connection meanwhile (Linux takes those from 32768 on), nor Ray to a worker
    (10002 to 19999) or a replica (from 30000 on).

    Raises:
        ClusterError: there is none.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise ClusterError(f"There is no port from {_PORTS[0]} to {_PORTS[-1]} that is free.")


def resources() -> Resources:
    """The resources of the cluster that this process is connected to.

    Raises:
        ClusterError: this process is not connected.
    """
    import ray

    if not is_connected():
        raise ClusterError("Ray is not connected: call ray.init() first.")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(
        tuple(
            Node(
                cpus=node.get("CPU", 0.0),
                gpus=node.get("GPU", 0.0),
                gpu_type=next((name[len(_GPU_TYPE) :] for name in node if name.startswith(_GPU_TYPE)), None),
                object_store_bytes=int(node.get("object_store_memory", 0)),
            )
            for node in nodes
        )
    )


def has_actor(class_name: str) -> bool:
    """Whether an actor of this class has a process that runs, or starts, in the job of this process."""
    import ray
    from ray._private import state

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return any(
        actor["ActorClassName"] == class_name and actor["Pid"]
        for name in ("PENDING_CREATION", "ALIVE")
        for actor in state.actors(job_id=job, actor_state_name=name).values()
    )


def free_resources() -> Resources:
    """What nothing uses of the cluster's resources, node by node; a second old at most."""
    from ray._private.state import available_resources_per_node

    nodes = available_resources_per_node().values()
    return Resources(tuple(Node(cpus=node.get("CPU", 0.0), gpus=node.get("GPU", 0.0)) for node in nodes))
