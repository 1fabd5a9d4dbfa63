"""The Ray cluster that a job runs on: found or started, and asked for what it has before anything waits."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from cnnray.images import storage

log = logging.getLogger(__name__)


class ClusterError(RuntimeError):
    """A cluster that cannot run the job; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a cluster has in all."""

    cpus: float
    gpus: float
    object_store_bytes: int
    """Of the whole cluster."""
    smallest_object_store_bytes: int
    """Of the node that has least."""
    nodes: int


def starts_own() -> bool:
    """Whether `connected` starts a Ray of its own on this machine: where RAY_ADDRESS names no cluster."""
    return not os.environ.get("RAY_ADDRESS")


def local_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


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
        yield _resources()
        return
    variables = {"TF_CPP_MIN_LOG_LEVEL": "2"} | storage.cluster_environment()
    if starts_own():
        # Nobody takes away a machine that the job started Ray on; the watcher would log an error of its own.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "local",
            runtime_env={"env_vars": variables},
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"No Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')}: {reason}") from None
    try:
        found = _resources()
        log.info("Ray %s: %d nodes, %g CPUs, %g GPUs", ray.__version__, found.nodes, found.cpus, found.gpus)
        yield found
    finally:
        ray.shutdown()


def _resources() -> Resources:
    import ray

    total = ray.cluster_resources()
    stores = [int(node["Resources"].get("object_store_memory", 0)) for node in ray.nodes() if node["Alive"]]
    return Resources(
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        object_store_bytes=sum(stores),
        smallest_object_store_bytes=min(stores, default=0),
        nodes=len(stores),
    )
