"""The wait for a service that was deployed: until its replicas have room, have loaded the models, and report them."""

import functools
import json
import logging
import shlex
import threading
import time
import urllib.request
from collections.abc import Collection
from typing import Any

from cnnray import cluster, waiting
from cnnray.errors import PermanentError
from cnnray.serving.config import ServeConfig
from cnnray.serving.controller import APPLICATION, DEPLOYMENT
from cnnray.serving.direct import ON_NODES
from cnnray.serving.keys import API_KEY, API_KEY_FILE, read_keys
from cnnray.serving.releases import is_decision

log = logging.getLogger(__name__)

_PLACING_SECONDS = 30.0
"""Seconds in which a node starts the process of a replica for which it has room."""
_ANSWER_SECONDS = 120.0
"""Seconds in which a service whose replicas have started must report its models."""

Versions = dict[str, list[tuple[str, str | None, float]]]
"""By name of a model: its versions, older ones first, the SHA-256 of each engine's file, and their shares."""


class ServingError(PermanentError, RuntimeError):
    """The service cannot be started; the message is one sentence for the user."""


def wait_until_served(
    client: Any,
    address: str,
    config: ServeConfig,
    versions: Versions,
    stop: threading.Event,
    replaced: Collection[str] = (),
) -> int:
    """Wait until the service runs and its replicas report these versions, or until `stop` is set.

    Args:
        client: the `OwnServe` or `ServeSubmissionClient` through which the service was deployed.
        address: where the service answers.
        config: says how many replicas are needed, their resources, and how long to wait for room.
        versions: what the replicas must report.
        stop: ends the wait.
        replaced: ids of the replicas whose successors are waited for.

    Returns:
        The number of replicas.

    Raises:
        ServingError: the service cannot start, cannot load the models, does not report them, or answers without
            an API key although one is set here.
        ClusterError: others hold the room for its replicas, for longer than `config.wait_minutes`.
    """
    agreed, direct, needed = 0, 0, max(1, config.min_replicas)
    # This asks often.
    key = min(read_keys(), key=lambda key: key.requests_per_second is not None, default=None)
    placed: list[dict[str, Any]] = []
    shortage = waiting.Shortage(config.wait_minutes)
    placed_at = progressed_at = time.monotonic()
    while not stop.wait(0.3):
        application = client.get_serve_details().get("applications", {}).get(APPLICATION, {})
        status, now = application.get("status"), time.monotonic()
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServingError(f"The service does not start: {_failure_reason(application)}")
        everything = application.get("deployments", {}).get(DEPLOYMENT, {}).get("replicas", [])
        replicas = [replica for replica in everything if replica.get("replica_id") not in replaced]
        placed = [replica for replica in replicas if replica.get("node_id")]
        states = {replica["state"] for replica in placed}
        # A replica that is being stopped still holds the room for its successor.
        if len(placed) == len(replicas) or any(replica["state"] == "STOPPING" for replica in everything):
            placed_at = now
        lacks_room = now - placed_at > _PLACING_SECONDS
        if lacks_room and len(placed) < needed:
            shortage.try_plan(functools.partial(_check_room, config, replicas))
        # Autoscaling may ask for more replicas than there is room for. Those are not waited for.
        started = states <= {"RUNNING"} and (len(placed) >= needed if lacks_room else status == "RUNNING")
        if not started and status in ("DEPLOYING", "RUNNING"):
            progressed_at = now
        elif now - progressed_at > _ANSWER_SECONDS:
            raise ServingError(
                f"{address} has not reported the new models for {_ANSWER_SECONDS:g} seconds, and the service is "
                f"{status or 'not there'}: Serve listens elsewhere, or has another CNNRAY_API_KEY, or somebody else "
                "changes the service."
            )
        if started or status == "RUNNING":
            reported = _fetch_metadata(address, key.key if key else None)
            served = _versions(reported, versions) if reported else None
            if reported and reported["problem"]:
                raise ServingError(f"The models cannot be served: {reported['problem']}")
            is_open = bool(key and served and _fetch_metadata(address, None))
            if is_open and len(replicas) == len(everything):  # no replica of before is left
                raise ServingError(
                    f"The service answers requests without an API key, because {API_KEY} is set for this command and "
                    f"not for the replicas: set it where `ray start` runs, on every node, or give {API_KEY_FILE}."
                )
            # Each request may reach another replica.
            agreed = agreed + 1 if served == versions and not is_open else 0
            direct += bool(reported and reported.get("direct"))
            if agreed > 2 * len(placed):
                if not direct:
                    log.warning(
                        "requests reach the replicas through Ray's wrapper, which holds whole bodies before any "
                        "limit or key is checked, and costs CPU: set %s where `ray start` runs, on every node",
                        " ".join(f"{name}={shlex.quote(value)}" for name, value in ON_NODES.items()),
                    )
                break
    return len(placed)


def _check_room(config: ServeConfig, replicas: list[dict[str, Any]], total: cluster.Resources) -> bool:
    """Check that a node has room for a replica that has no node yet.

    Raises:
        ClusterError: no node has.
    """
    free = cluster.free_resources()
    cpus, gpus = config.resources
    if not free.room_for(cpus, gpus):
        waiting = sum(not replica.get("node_id") for replica in replicas)
        raise cluster.ClusterError(
            f"{waiting} of {len(replicas)} replicas have no room: each needs {cpus:g} CPUs and "
            f"{gpus:g} GPUs on one node, and {free.cpus:g} of the cluster's {total.cpus:g} CPUs "
            f"and {free.gpus:g} of its {total.gpus:g} GPUs are free: end other jobs, or give --wait-minutes."
        )
    return True


def _fetch_metadata(address: str, key: str | None) -> dict[str, Any] | None:
    """What a replica reports, see `schema.Metadata`; None if it does not answer."""
    request = urllib.request.Request(f"{address}/metadata", headers={"X-API-Key": key} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            metadata: dict[str, Any] = json.loads(answer.read())
    except (OSError, ValueError):  # the replica is starting or stopping
        return None
    return metadata


def _versions(metadata: dict[str, Any], wanted: Versions) -> Versions:
    """The versions that a replica reports. Where a canary was decided about meanwhile, with the shares wanted."""
    served = {}
    for name, versions in metadata["models"].items():
        served[name] = [(version["version"], version.get("digest"), version["share"]) for version in versions]
        is_decided = any(is_decision(version.get("verdict")) for version in versions)
        if is_decided and _names(served[name]) == _names(wanted.get(name, [])):
            served[name] = wanted[name]
    return served


def _names(versions: list[tuple[str, str | None, float]]) -> list[str]:
    return [version for version, _, _ in versions]


def _failure_reason(application: dict[str, Any]) -> str:
    """Why Serve could not start the application, in one line."""
    messages: list[str] = [
        application.get("message", ""),
        *(deployment.get("message", "") for deployment in application.get("deployments", {}).values()),
    ]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    # If there is a traceback, its last line.
    errors = [line for line in lines if "Error" in line and not line.startswith(("File", "Traceback"))]
    return (errors or lines or ["no reason is given"])[-1]
