"""Deploys the service: on a Ray that this process starts, on a running cluster, or as a file for `serve deploy`."""

import errno
import functools
import importlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import cnnray
from cnnray import cluster, paths, waiting
from cnnray.cpus import usable_cpus
from cnnray.images import storage
from cnnray.serving.config import ServeConfig
from cnnray.serving.controller import APPLICATION, DEPLOYMENT, MODULE, OwnServe, other_applications, rest_client
from cnnray.serving.direct import ON_NODES
from cnnray.serving.keys import API_KEY, API_KEY_FILE, ApiKeyError, read_keys
from cnnray.serving.models import find_engine
from cnnray.serving.rollout import ServingError, Versions, wait_until_served
from cnnray.serving.settings import ModelSettings
from cnnray.supervisor import folder_for_sockets

log = logging.getLogger(__name__)

_PIN_SECONDS = 10 * 365 * 24 * 3600
"""How long Ray keeps a submitted job's code, so that replicas can start."""


_GRPC = "cnnray.serving.open_inference_grpc:add_to_server"
_MOST_REPLICAS = 1000
"""Where the config has no bound. Those that the cluster has no room for wait, and make an autoscaling one grow."""
_LONGEST_FOLDER = 97 - len("/cnnray-xxxxxxxx/metrics.sock") - 57
"""HAProxy takes paths of sockets of up to 97 characters, and Serve adds a folder with the name of the node."""


def pin_models(config: ServeConfig) -> tuple[ModelSettings, ...]:
    """The models, each with the version that its bundle holds, the engine that is to run it, and its file.

    Raises:
        BundleError, OSError: a bundle, or the file of its engine, cannot be read.
    """
    pinned = []
    for model in config.settings.models:
        bundle, engine, digest = find_engine(
            model.uri, config.engine, gpus=config.gpus_per_replica > 0, batch_size=config.batch_size
        )
        log.info("%s: %s, %d classes", model.name, bundle.version, len(bundle.info.class_names))
        pinned.append(replace(model, version=bundle.version, engine=engine, digest=digest))
    return tuple(pinned)


def build_configuration(
    config: ServeConfig,
    pinned: tuple[ModelSettings, ...] | None,
    max_replicas: int,
    *,
    surges: bool = True,
    revision: int = 0,
) -> dict[str, Any]:
    """The configuration for `serve deploy`.

    Args:
        config: the service's config.
        pinned: from `pin_models`: replicas serve these, or nothing, where the bundles' places hold others later.
            None: whatever they hold.
        max_replicas: used if `config.max_replicas` is None.
        surges: where replicas are replaced, because their code or resources have changed, start new ones before old
            ones are stopped. They need room of their own, and otherwise would wait for it.
        revision: `ModelSettings.revision` of all models.
    """
    drain = config.timeout_seconds + 5
    settings = config.settings
    if pinned is not None:
        settings = replace(settings, models=tuple(replace(model, revision=revision) for model in pinned))
    deployment = {
        "name": DEPLOYMENT,
        "user_config": settings.as_dict(),
        # For requests that come by Ray's proxies. The replica has its own bounds, in images and bytes.
        "max_ongoing_requests": config.max_queued_images,
        "max_queued_requests": config.max_queued_images,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": max(config.max_replicas or max_replicas, config.min_replicas, 1),
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": config.downscale_delay_seconds,
            "look_back_period_s": 20.0,
        },
        # Ongoing requests may use their full timeout.
        "graceful_shutdown_timeout_s": drain,
        "graceful_shutdown_wait_loop_s": 1.0,
        "max_surge_percent": 25 if surges else 0,  # rounded up
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": dict(zip(("num_cpus", "num_gpus"), config.resources, strict=True)),
    }
    grpc_options: dict[str, Any] = {}
    if config.grpc_port is not None:
        grpc_options = {
            "port": config.grpc_port,
            "grpc_servicer_functions": [_GRPC],
            "request_timeout_s": 2 * config.timeout_seconds,  # the service's own comes first
            "enable_reflection": False,
        }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        **({"grpc_options": grpc_options} if grpc_options else {}),
        # The application has an access log of its own.
        "logging_config": {"enable_access_log": False, "encoding": "JSON"},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": f"{MODULE}:app",
                "deployments": [deployment],
            }
        ],
    }


def write_configuration(config: ServeConfig) -> dict[str, Any]:
    """Write the configuration for `serve deploy` to `config.write_config`.

    Returns:
        `config`, the path, and `models`, the URIs by name.

    Raises:
        BundleError, OSError: a bundle cannot be read, or the file cannot be written.
    """
    pinned = pin_models(config)
    assert config.write_config is not None
    configuration = build_configuration(config, pinned, _MOST_REPLICAS, revision=_now())
    text = yaml.safe_dump(configuration, sort_keys=False)
    storage.write_bytes(config.write_config, text.encode())
    return {"config": config.write_config, "models": _uris_by_name(config)}


def serve(config: ServeConfig) -> dict[str, Any]:
    """Deploy the service.

    On the cluster that RAY_ADDRESS names, start the service or change the running one, and return. Without
    RAY_ADDRESS, start a Ray on this machine and serve until Ctrl-C.

    Returns:
        `address`, `models` (URIs by name), `replicas`, and `seconds` until the service answered.

    Raises:
        BundleError, OSError: a bundle cannot be read.
        ApiKeyError, OSError: see `_check_keys`.
        ClusterError: the cluster cannot be reached, or has no room for the replicas, or others hold it.
        ServingError: the service does not start.
    """
    import ray

    _check_keys()
    pinned = pin_models(config)
    started = time.monotonic()
    stop = threading.Event()
    own_ray = cluster.starts_own()
    if own_ray:
        _check_port(config.host, config.port, "--port")
        if config.grpc_port is not None:
            _check_port(config.host, config.grpc_port, "--grpc-port")
    with tempfile.TemporaryDirectory(prefix="cnnray-", dir=folder_for_sockets(_LONGEST_FOLDER)) as folder:
        if own_ray:
            _prepare_environment(Path(folder), int(config.max_mebibytes * 2**20))
            # This takes a second, in which `connected` waits for Ray's processes.
            threading.Thread(target=importlib.import_module, args=("ray.serve.api",)).start()
        with cluster.connected(worker_logs=False) as resources:
            paths.check_shared(resources, _opened(config))
            if own_ray:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: stop.set())
            if config.cpus_per_replica is None:
                config = replace(config, cpus_per_replica=resources.cpus_beside(config.gpus_per_replica))
            replica = dict(zip(("CPU", "GPU"), config.resources, strict=True))
            fitting = waiting.wait_for_resources(
                functools.partial(_count_replicas, config),
                [replica] * max(1, config.min_replicas),
                config.wait_minutes,
            )
            client = OwnServe(MODULE) if own_ray else rest_client()
            # This machine does not grow, but a cluster may.
            line = _deploy(client, config, pinned, fitting if own_ray else _MOST_REPLICAS, stop)
            line["seconds"] = round(time.monotonic() - started, 2)
            if own_ray and not stop.is_set():
                _log_usage(line["address"])
                # The service is ready sooner if the dashboard starts last.
                _log_changes(ray.get_runtime_context().gcs_address, cluster.start_dashboard())
                stop.wait()
            return line


def _opened(config: ServeConfig) -> list[str]:
    """What replicas and jobs open: the bundles, and the folders that they write into, which are made if local."""
    settings = config.settings
    places = [part.place for part in (settings.log, settings.jobs) if part]
    for place in places:
        if storage.is_local(place):
            with storage.translated_errors(place):
                Path(place).mkdir(parents=True, exist_ok=True)
    return [*(model.uri for model in settings.models), *places]


def _check_keys() -> None:
    """
    Raises:
        ApiKeyError, OSError: the API keys cannot be read, or everybody who may list jobs can read them.
    """
    if API_KEY in cluster.submitted_environment().get("env_vars", {}):
        raise ApiKeyError(
            f"{API_KEY} is in the job's runtime environment, which `ray job list` shows to everybody who may list "
            f"jobs: change that key, and give {API_KEY_FILE} instead."
        )
    read_keys()


def _now() -> int:
    """The present time, for `ModelSettings.revision`."""
    return time.time_ns() // 10**6


def _count_replicas(config: ServeConfig, resources: cluster.Resources) -> int:
    """How many replicas fit the cluster.

    Raises:
        ClusterError: fewer than `config.min_replicas`.
    """
    cpus, gpus = config.resources
    count = resources.room_for(cpus, gpus)
    if count < max(1, config.min_replicas):
        raise cluster.ClusterError(
            f"{max(1, config.min_replicas)} replica(s) of {cpus:g} CPUs and {gpus:g} GPUs do not fit the cluster, "
            f"which has room for {count}: lower --min-replicas or --cpus-per-replica, add nodes, or give "
            "--wait-minutes."
        )
    return count


def _uris_by_name(config: ServeConfig) -> dict[str, list[str]]:
    uris: dict[str, list[str]] = {}
    for model in config.settings.models:
        uris.setdefault(model.name, []).append(model.uri)
    return uris


def _prepare_environment(folder: Path, max_bytes: int) -> None:
    """Set environment variables for the Ray that this process starts.

    They enable HAProxy, and give it files in `folder` and free ports, which a second service on this machine does not
    share.
    """
    for name, value in ON_NODES.items():
        os.environ.setdefault(name, value)
    # Ray's workers give way to other processes, by default: each time that one of them works, requests would wait.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A message is in memory before the application sees it. Serve's own limit is 2 GiB.
    os.environ.setdefault("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", str(max_bytes))
    # HAProxy hears at once that a replica stops; under load it may read its new configuration late, but it asks each
    # replica every five seconds. A request on a connection that a replica closes is lost.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "6")
    prefix = "RAY_SERVE_HAPROXY_"
    # Ray's default is four threads, which on two CPUs take turns with the replicas, and with one another.
    os.environ.setdefault(f"{prefix}NBTHREAD", str(min(4, max(1, usable_cpus() // 2))))
    os.environ |= {
        f"{prefix}CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        f"{prefix}SOCKET_PATH": str(folder / "admin.sock"),
        f"{prefix}SERVER_STATE_BASE": str(folder),
        f"{prefix}SERVER_STATE_FILE": str(folder / "server-state"),
        f"{prefix}METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        f"{prefix}METRICS_PORT": str(cluster.free_port()),
        f"{prefix}STATS_PORT": str(cluster.free_port()),
        # Answers while there is no replica. Its port is shared with other processes without an error.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(cluster.free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(cluster.free_port()),
    }
    # Serve imports the application in another process.
    home = str(Path(cnnray.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))


def _check_port(host: str, port: int, flag: str) -> None:
    """
    Raises:
        ServingError: the port is in use, or the address does not belong to this machine.
    """
    with closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServingError(f"{host}:{port} is in use: give another {flag}.") from None
            raise ServingError(f"{host}:{port} cannot be listened on: {error.strerror}.") from None


def _deploy(
    client: Any, config: ServeConfig, pinned: tuple[ModelSettings, ...], max_replicas: int, stop: threading.Event
) -> dict[str, Any]:
    """Deploy, and wait until the replicas serve these versions.

    Args:
        client: an `OwnServe` or a `ServeSubmissionClient`.
        config: the service's config.
        pinned: what the replicas must report.
        max_replicas: used if `config.max_replicas` is None.
        stop: ends the wait.

    Raises:
        ServingError, ClusterError: they do not. The service that was running before is restored; if there was none,
            the new one is removed.
    """
    details = client.get_serve_details()
    if details.get("controller_info") and config.grpc_port is not None and not _has_grpc(details, config.grpc_port):
        raise ServingError(
            f"Serve runs on this cluster without --grpc-port {config.grpc_port}, and has to be ended first, by "
            "`serve shutdown`."
        )
    deployed = details.get("applications", {}).get(APPLICATION, {}).get("deployed_app_config")
    surges = cluster.free_resources().room_for(*config.resources) > 0
    configuration = build_configuration(config, pinned, max_replicas, surges=surges, revision=_now())
    if environment := _runtime_environment():
        configuration["applications"][0]["runtime_env"] = environment
    replaced: list[str] = []
    if deployed and _replaces_replicas(deployed, configuration["applications"][0]):
        replicas = details["applications"][APPLICATION].get("deployments", {}).get(DEPLOYMENT, {}).get("replicas", [])
        replaced = [replica["replica_id"] for replica in replicas]
    if replaced and not surges:
        log.warning(
            "the code or the resources of the replicas change, and there is no room for another one: each is stopped "
            "before its successor starts"
        )
    configuration["applications"] += other_applications(details)
    host = "127.0.0.1" if config.host in ("0.0.0.0", "") else config.host
    address = f"http://{host}:{config.port}"
    versions: Versions = {}
    for model in pinned:
        versions.setdefault(model.name, []).append((str(model.version), model.digest, model.share))
    client.deploy_applications(configuration)
    try:
        count = wait_until_served(client, address, config, versions, stop, replaced)
    except (ServingError, cluster.ClusterError):
        # Running replicas keep their models, but a new replica would start with the settings that fail.
        others = configuration["applications"][1:]
        now = client.get_serve_details().get("applications", {}).get(APPLICATION, {}).get("deployed_app_config")
        if now is None or _models(now) == _models(configuration["applications"][0]):  # else somebody has changed them
            client.deploy_applications(configuration | {"applications": [deployed, *others] if deployed else others})
        raise
    return {"address": address, "models": _uris_by_name(config), "replicas": count}


def _has_grpc(details: dict[str, Any], port: int) -> bool:
    """Whether a Serve that runs has our gRPC methods at this port. It takes its ports when it starts."""
    options = details.get("grpc_options") or {}
    return options.get("port") == port and _GRPC in options.get("grpc_servicer_functions", [])


def _models(application: dict[str, Any]) -> list[Any]:
    return [entry["user_config"]["models"] for entry in application["deployments"]]


def _replaces_replicas(deployed: dict[str, Any], application: dict[str, Any]) -> bool:
    """Whether Serve replaces the replicas of an application for this configuration, as only models do not need it."""
    return bool(
        deployed.get("runtime_env") != application.get("runtime_env")
        or [entry.get("ray_actor_options") for entry in deployed["deployments"]]
        != [entry.get("ray_actor_options") for entry in application["deployments"]]
    )


def _runtime_environment() -> dict[str, Any]:
    """Ray's runtime environment for the replicas, which Serve starts outside of this job.

    It has the code, packages and variables that the job was submitted with, and the variables that reach the same S3
    and name the file of the API key.
    """
    from ray._private.runtime_env.packaging import pin_runtime_env_uri

    environment = cluster.submitted_environment()
    if environment.get("working_dir", "").startswith("gcs://"):
        # Otherwise Ray deletes the job's code after the last process that uses it, and no replica could start.
        pin_runtime_env_uri(environment["working_dir"], expiration_s=_PIN_SECONDS)
    variables = storage.cluster_environment() | environment.get("env_vars", {})
    if file := os.environ.get(API_KEY_FILE):
        variables[API_KEY_FILE] = storage.absolute(file)
    return environment | ({"env_vars": variables} if variables else {})


def _log_usage(address: str) -> None:
    key = " -H 'X-API-Key: KEY'" if read_keys() else ""
    log.info("serving at %s (Ctrl-C stops it): a page to try it, and %s/docs", address, address)
    body = f"-H 'Content-Type: application/json' -d '{{\"image\": \"{_PIXEL}\"}}'"
    log.info("  curl -s %s/predict%s %s", address, key, body)
    log.info("  curl -s %s/predict%s -F image=@photo.jpg", address, key)


def _log_changes(gcs_address: str, dashboard_address: str) -> None:
    # Ray's commands send the token, which Ray keeps in the home folder, only if this mode is set.
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    log.info("To see its replicas: RAY_AUTH_MODE=%s serve status --address %s", mode, dashboard_address)
    log.info("To change what is served: RAY_AUTH_MODE=%s RAY_ADDRESS=%s python jobs/serve.py ...", mode, gcs_address)


_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
"""A PNG file of one red pixel."""
