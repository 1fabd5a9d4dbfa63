"""A service on a Ray cluster: its configuration, as `serve deploy` takes it, and a Serve that is started here."""

import errno
import functools
import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

import cnnray
from cnnray import cluster, paths
from cnnray.errors import PermanentError
from cnnray.images import storage
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.serving.config import ServeConfig

log = logging.getLogger(__name__)

APPLICATION, DEPLOYMENT = "cnnray", "Classifier"
ON_NODES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cnnray.serving.headers:middlewares",
}
"""What Ray's nodes are started with: HAProxy sends requests straight to the replicas, these run them in one event
loop, and no header makes Ray answer 500."""


_KEPT_SECONDS = 10 * 365 * 24 * 3600
"""That a submitted job's code is kept for replicas."""

Versions = dict[str, list[tuple[str, float]]]


class ServingError(PermanentError, RuntimeError):
    """A service that cannot be started; the message is one sentence for the user."""


def check(config: ServeConfig) -> Versions:
    """What the service will serve: by name, versions and their shares.

    Raises:
        BundleError, OSError: a bundle that replicas could not load.
    """
    found: Versions = {}
    for model in config.models:
        bundle, engine = Bundle.load(model.uri), config.engine
        log.info("%s: %s, %d classes", model.name, bundle.version, len(bundle.info.class_names))
        if engine == "auto":
            engine = engines.choose(bundle, gpus=config.gpus_per_replica > 0, batch_size=config.batch_size)
        engines.digest(bundle, engine)  # its file is there
        found.setdefault(model.name, []).append((bundle.version, model.share))
    return found


def configuration(config: ServeConfig, max_replicas: int) -> dict[str, Any]:
    """What `serve deploy` takes.

    Args:
        config: of the service.
        max_replicas: where the config does not say.
    """
    drain = config.timeout_seconds + 5
    deployment = {
        "name": DEPLOYMENT,
        "user_config": config.settings.as_dict(),
        # A batch in the engine and the next being decoded: more would only wait in the replica's memory, where
        # another replica cannot take them.
        "max_ongoing_requests": 2 * config.batch_size,
        "max_queued_requests": config.max_queued_requests,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": max(config.max_replicas or max_replicas, config.min_replicas, 1),
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": config.downscale_delay_seconds,
            "look_back_period_s": 20.0,
        },
        # Requests that have begun may use all of their time.
        "graceful_shutdown_timeout_s": drain,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        # Requests are in the access log of the application.
        "logging_config": {"enable_access_log": False, "encoding": "JSON"},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "cnnray.serving.deployment:app",
                "deployments": [deployment],
            }
        ],
    }


def write_configuration(config: ServeConfig) -> dict[str, Any]:
    """Write `config.write_config`.

    Returns:
        `config` and `models`.

    Raises:
        BundleError, OSError: with a sentence.
    """
    check(config)
    assert config.write_config is not None
    text = yaml.safe_dump(configuration(config, max_replicas=config.min_replicas or 1), sort_keys=False)
    storage.write_bytes(config.write_config, text.encode())
    return {"config": config.write_config, "models": _names(config)}


def serve(config: ServeConfig) -> dict[str, Any]:
    """Serve until Ctrl-C on a Ray of this machine's own; or, on the cluster that RAY_ADDRESS names, start the service
    or change the one that is there, and return.

    Returns:
        `address`, `models`, `replicas` and `seconds` (until it answered).

    Raises:
        BundleError, OSError, ClusterError, ServingError: with a sentence.
    """
    import ray

    versions = check(config)
    started = time.monotonic()
    stop = threading.Event()
    own = cluster.starts_own()
    if own:
        _check_port(config)
    with tempfile.TemporaryDirectory(prefix="cnnray-serve-") as folder:
        if own:
            _prepare_environment(Path(folder))
        with cluster.connected() as found:
            paths.check_shared(found, [model.uri for model in config.models])
            if own:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: stop.set())
            replica = {"CPU": config.cpus_per_replica, "GPU": config.gpus_per_replica}
            room = cluster.when_it_fits(
                functools.partial(_room, config), [replica] * max(1, config.min_replicas), config.wait_minutes
            )
            line = _deploy(config, versions, room, stop) | {"seconds": round(time.monotonic() - started, 2)}
            if own and not stop.is_set():
                _tell(line["address"], ray.get_runtime_context().gcs_address, _dashboard())
                stop.wait()
            return line


def _room(config: ServeConfig, found: cluster.Resources) -> int:
    """How many replicas fit.

    Raises:
        ClusterError: fewer than there are at least.
    """
    room = found.room_for(config.cpus_per_replica, config.gpus_per_replica)
    if room < max(1, config.min_replicas):
        raise cluster.ClusterError(
            f"{max(1, config.min_replicas)} replicas of {config.cpus_per_replica:g} CPUs and "
            f"{config.gpus_per_replica:g} GPUs do not fit the cluster, which has room for {room}."
        )
    return room


def _names(config: ServeConfig) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for model in config.models:
        found.setdefault(model.name, []).append(model.uri)
    return found


def _prepare_environment(folder: Path) -> None:
    """What Ray's processes on this machine are started with: the fast path, and files and ports that a second service
    does not share."""
    for name, value in ON_NODES.items():
        os.environ.setdefault(name, value)
    # On one machine HAProxy hears of a replica's end at once.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "3")
    prefix = "RAY_SERVE_HAPROXY_"
    os.environ |= {
        f"{prefix}CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        f"{prefix}SOCKET_PATH": str(folder / "admin.sock"),
        f"{prefix}SERVER_STATE_BASE": str(folder),
        f"{prefix}SERVER_STATE_FILE": str(folder / "server-state"),
        f"{prefix}METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        f"{prefix}METRICS_PORT": str(_free_port()),
        f"{prefix}STATS_PORT": str(_free_port()),
    }
    # Serve imports the application in a process of its own.
    home = str(Path(cnnray.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))


def _check_port(config: ServeConfig) -> None:
    """
    Raises:
        ServingError: something else listens there, or the address is not this machine's.
    """
    with closing(socket.socket()) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((config.host, config.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServingError(f"{config.host}:{config.port} is in use: give another --port.") from None
            raise ServingError(f"{config.host}:{config.port} cannot be listened on: {error.strerror}.") from None


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _dashboard() -> str:
    import ray

    return f"http://{ray.init(ignore_reinit_error=True, logging_level='ERROR').dashboard_url}"


def _deploy(config: ServeConfig, versions: Versions, room: int, stop: threading.Event) -> dict[str, Any]:
    """Deploy, and wait until the replicas answer with these versions.

    Raises:
        ServingError: they do not come to that; a service that was there before is as it was.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    client = ServeSubmissionClient(_dashboard())
    before = client.get_serve_details().get("applications", {})
    wanted = configuration(config, max_replicas=room)
    if environment := _environment():
        wanted["applications"][0]["runtime_env"] = environment
    # Serve ends those applications that a configuration does not name.
    wanted["applications"] += [
        one["deployed_app_config"]
        for name, one in before.items()
        if name != APPLICATION and one.get("deployed_app_config")
    ]
    host = "127.0.0.1" if config.host in ("0.0.0.0", "") else config.host
    address = f"http://{host}:{config.port}"
    client.deploy_applications(wanted)
    try:
        replicas = _wait(client, address, versions, stop)
    except ServingError:
        earlier = before.get(APPLICATION, {}).get("deployed_app_config")
        if earlier:
            # Replicas keep what they had, but a new one would be started with what does not work.
            client.deploy_applications(wanted | {"applications": [earlier, *wanted["applications"][1:]]})
        raise
    return {"address": address, "models": _names(config), "replicas": replicas}


def _environment() -> dict[str, Any]:
    """Ray's runtime environment of the replicas, which Serve starts outside of this job: code, packages and variables
    that the job was submitted with, and what else it takes to reach the same S3."""
    from ray._private.runtime_env.packaging import pin_runtime_env_uri

    environment = cluster.submitted_environment()
    if environment.get("working_dir", "").startswith("gcs://"):
        # Else Ray deletes the job's code with the last process that uses it, and then no replica could be started.
        pin_runtime_env_uri(environment["working_dir"], expiration_s=_KEPT_SECONDS)
    variables = storage.cluster_environment() | environment.get("env_vars", {})
    return environment | ({"env_vars": variables} if variables else {})


def _wait(client: Any, address: str, versions: Versions, stop: threading.Event) -> int:
    """Until the service runs, and says itself that it serves these versions.

    Returns:
        the number of replicas.

    Raises:
        ServingError: it does not come to that.
    """
    agreed, replicas = 0, 0
    while not stop.wait(0.3):
        found = client.get_serve_details()["applications"].get(APPLICATION, {})
        if found.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServingError(f"The service does not start: {_reason(found)}")
        if found.get("status") != "RUNNING":
            continue
        replicas = len(found["deployments"][DEPLOYMENT]["replicas"])
        served, problem = _served(address)
        if problem:
            raise ServingError(f"The models cannot be served: {problem}")
        # Each request may meet another replica.
        agreed = agreed + 1 if served == versions else 0
        if agreed > 2 * replicas:
            break
    return replicas


def _served(address: str) -> tuple[Versions | None, str | None]:
    """What a replica says that it serves, and why it does not serve what it should."""
    key = os.environ.get("CNNRAY_API_KEY")
    request = urllib.request.Request(f"{address}/metadata", headers={"X-API-Key": key} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.loads(answer.read())
    except (OSError, ValueError):  # not yet, or not any more
        return None, None
    models = found["models"].items()
    return {name: [(one["version"], one["share"]) for one in versions] for name, versions in models}, found["problem"]


def _reason(found: dict[str, Any]) -> str:
    """What is wrong, in one line."""
    said: list[str] = [
        found.get("message", ""),
        *(one.get("message", "") for one in found.get("deployments", {}).values()),
    ]
    lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
    # The last line of a traceback, where there is one.
    errors = [line for line in lines if "Error" in line and not line.startswith(("File", "Traceback"))]
    return (errors or lines or ["no reason is given"])[-1]


def _tell(address: str, gcs_address: str, dashboard: str) -> None:
    log.info("serving at %s (Ctrl-C stops it): a page to try it, and %s/docs", address, address)
    log.info("  curl -s %s/predict -H 'Content-Type: application/json' -d '{\"image\": \"%s\"}'", address, _PIXEL)
    log.info("  curl -s %s/predict -F image=@photo.jpg", address)
    # Ray asks for a token, which it keeps in the home folder, but only in this mode gives it.
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    log.info("To see its replicas: RAY_AUTH_MODE=%s serve status --address %s", mode, dashboard)
    log.info("To change what is served: RAY_AUTH_MODE=%s RAY_ADDRESS=%s python jobs/serve.py ...", mode, gcs_address)


_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
"""A PNG file of one red pixel."""
