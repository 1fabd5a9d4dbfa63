"""The config of a service: every field is a flag of jobs/serve.py and a key of its YAML."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cnnray import flags
from cnnray.models import engines
from cnnray.serving.releases import DEFAULT_LIMITS
from cnnray.serving.settings import NAME, NAME_CHARACTERS, JobSettings, LogSettings, ModelSettings, Settings

DEFAULT_NAME = "model"
"""Name of the model that --bundle serves."""

_MOST_DAYS = 36_500
_ORIGIN = re.compile(r"https?://[^/?#\s]+")


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """An entry of --models: one version of a model."""

    name: str
    """Name of the model in requests and URLs: letters, digits, _, . and -."""
    uri: str
    """Folder or s3:// prefix of the bundle."""
    share: float | None = None
    """Share, 0 to 1, of the model's requests that its newest version answers; null: all of them."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Classify images over HTTP with one bundle or several."""

    bundle: str | None = None
    """Folder or s3:// prefix of the bundle of a single model, which is served under the name "model". For several
    models, or several versions of one, see --models."""
    models: list[ModelVersion] | None = None
    """Models, such as '[{name: cats, uri: OLD}, {name: cats, uri: NEW, share: 0.1}, {name: dogs, uri: URI}]'. Entries
    of the same name are versions of a model, older ones first. The newest version answers its share of the requests
    (by default all of them), the version before it the rest. Requests without a name go to the first model."""
    canary: str | None = None
    """NAME=SHARE,NAME=SHARE: earlier form of the shares in --models, for the earlier form of --bundle,
    NAME=URI,NAME=URI."""
    shadow_share: float | None = None
    """Share, 0 to 1, of the requests of a model with a canary of which both versions answer one image, so that their
    classes can be compared; null: 0.1 with --promote-after or --rollback-on, otherwise 0."""
    promote_after: int | None = None
    """Images after which a canary that keeps its limits gets all requests by itself; null: never. As many must have
    been compared, where agreement has a limit and --shadow-share is not 0."""
    rollback_on: dict[str, float] | None = None
    """Limits of a canary, which gets no requests any more once it exceeds one with certainty: '{errors: 0.01,
    latency: 2, agreement: 0.9}', any of them. errors: share of requests without an answer, beyond that of the version
    before; latency: 5 % of the requests may take longer than this many times the 95th percentile of the version
    before; agreement: share of compared images with the class of the version before. null: it is never rolled back
    by itself."""
    engine: str = "auto"
    """Engine that runs the networks: keras, keras-bfloat16, onnx, onnx-int8, litert, litert-float16, litert-int8,
    openvino-bfloat16 or openvino-int8; auto: keras or keras-bfloat16 on a GPU, otherwise the fastest that export has
    verified."""
    batch_size: int = 32
    """Largest number of images in a micro-batch."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all addresses of the machine."""
    port: int = 8000
    """Port to listen on."""
    grpc_port: int | None = None
    """Port for the Open Inference Protocol over gRPC, on --host; null: no gRPC. A Serve that runs already must have
    been started with it."""
    cors_origins: list[str] | None = None
    """Origins of web pages whose scripts may send requests and read the answers, such as '[https://example.com]';
    '["*"]': all. null: only the service's own page."""
    min_replicas: int = 1
    """Smallest number of replicas; may be 0."""
    max_replicas: int | None = None
    """Largest number of replicas; null: as many as the load needs and the cluster has room for, also when it
    grows."""
    target_ongoing_requests: float = 8.0
    """Average number of images in a replica, those of requests that are being read included, above which another
    replica is started."""
    downscale_delay_seconds: float = 120.0
    """Seconds of lower load after which a replica is stopped."""
    cpus_per_replica: float | None = None
    """CPUs of each replica, and therefore its threads; null: 1, or with GPUs an even share of the CPUs of the nodes
    that have GPUs, because images are decoded beside them (with --write-config: 4)."""
    gpus_per_replica: float = 0.0
    """GPUs of each replica, 0 to 1; with 0.5, two replicas share one."""
    wait_minutes: float = 0.0
    """Minutes that the job waits if the cluster, or what others leave free of it, has no room for the smallest number
    of replicas."""
    max_queued_images: int = 512
    """Largest number of images that wait or are computed in a replica; further requests are answered with 503 before
    their body is read. Of several models or versions, each may hold three quarters of them."""
    max_mebibytes_in_flight: float = 128.0
    """Largest size, in MiB, of all request bodies that a replica holds, if it holds several; further requests are
    answered with 503. Bodies above 1 MiB leave an eighth of it to smaller ones."""
    cache_mebibytes: float = 0.0
    """Size, in MiB, of the answers that a replica keeps, by the bytes of the image, to give them again without
    computing; 0: none. A thousand classes take 4 KB for each image."""
    explain: bool = True
    """Show on request, by Grad-CAM, which regions of an image support its answer. The first such request starts a
    process with TensorFlow, of up to 1 GiB, beside the replica; it ends after 10 minutes without another."""
    max_mebibytes: float = 32.0
    """Largest request body in MiB."""
    max_megapixels: float = 50.0
    """Largest image in megapixels."""
    max_images: int = 32
    """Largest number of images in a request."""
    timeout_seconds: float = 30.0
    """Seconds within which a request's body must arrive (otherwise 408) and its answer be ready (otherwise 503)."""
    access_log: str = "all"
    """Requests that are logged, each as a line of JSON, in the replica's log: all, errors (a status from 400 on) or
    none."""
    jobs_output: str | None = None
    """Let requests to /jobs run predictions on the cluster, whose rows go into this folder or s3:// prefix; null: no
    jobs. They use the CPUs that replicas leave free, and wait for them; one whose bundle has changed meanwhile
    fails."""
    jobs_from: list[str] | None = None
    """With --jobs-output: folders and s3:// prefixes below which the images of jobs must lie, such as
    '[s3://bucket/photos]'."""
    log_requests: str | None = None
    """Write what was answered into this folder or s3:// prefix, as Parquet files that `jobs/evaluate.py --drift`
    reads: the time, the request's id, the answer, and a hash of each image. null: nothing is written."""
    log_share: float = 1.0
    """With --log-requests: share, 0 to 1, of the requests."""
    log_images: bool = False
    """With --log-requests: keep the images, too."""
    log_days: float = 30.0
    """With --log-requests: days after which files are deleted."""
    write_config: str | None = None
    """Write the configuration for `serve deploy` to this file and exit. It holds no environment variables, such as
    `CNNRAY_API_KEY_FILE`: set them where `ray start` runs, on every node."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        self._normalize_models()
        if self.engine not in ("auto", *engines.ENGINES):
            raise ValueError(f"--engine {self.engine!r}: expected auto, {', '.join(engines.ENGINES)}.")
        flags.check_at_least_one(self, "batch_size", "max_replicas", "max_images", "max_queued_images")
        flags.check_more_than_zero(
            self,
            "cpus_per_replica",
            "max_mebibytes",
            "max_mebibytes_in_flight",
            "max_megapixels",
            "timeout_seconds",
            "target_ongoing_requests",
        )
        # As in earlier versions.
        spelled = {"true": "all", "false": "none"}.get(str(self.access_log).lower(), self.access_log)
        object.__setattr__(self, "access_log", spelled)
        if self.access_log not in ("all", "errors", "none"):
            raise ValueError(f"--access-log {self.access_log!r}: expected all, errors or none.")
        flags.check_share(self, "gpus_per_replica", "log_share")
        if not 0 < self.log_days <= _MOST_DAYS:
            raise ValueError(f"--log-days {self.log_days:g} is not more than 0 and at most {_MOST_DAYS:,}.")
        if self.log_requests is None and (self.log_images or self.log_share != 1 or self.log_days != 30):
            raise ValueError("--log-images, --log-share and --log-days need --log-requests.")
        self._check_releases()
        for origin in self.cors_origins or []:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"--cors-origins: {origin!r} is no origin, such as https://example.com.")
        flags.check_not_negative(self, "wait_minutes", "cache_mebibytes")
        if self.min_replicas < 0 or (self.max_replicas and self.min_replicas > self.max_replicas):
            raise ValueError(f"--min-replicas {self.min_replicas} is not from 0 to --max-replicas.")
        if not 0 < self.port < 2**16:
            raise ValueError(f"--port {self.port} is no port.")
        if self.grpc_port is not None and (not 0 < self.grpc_port < 2**16 or self.grpc_port == self.port):
            raise ValueError(f"--grpc-port {self.grpc_port} is no port, or that of --port.")
        if bool(self.jobs_output) != bool(self.jobs_from):
            raise ValueError("--jobs-output and --jobs-from need each other.")
        if self.jobs_from:
            object.__setattr__(self, "jobs_from", [_absolute_prefix(prefix) for prefix in self.jobs_from])
        flags.make_absolute(self, "write_config", "log_requests", "jobs_output")

    def _check_releases(self) -> None:
        """
        Raises:
            ValueError: a limit of canaries that cannot work, in one sentence.
        """
        if self.shadow_share is not None and not 0 <= self.shadow_share <= 1:
            raise ValueError(f"--shadow-share {self.shadow_share:g} is not from 0 to 1.")
        if self.promote_after is not None and self.promote_after < 1:
            raise ValueError(f"--promote-after {self.promote_after} is not at least 1.")
        if self.rollback_on is None:
            return
        if not self.rollback_on or not self.rollback_on.keys() <= DEFAULT_LIMITS.keys():
            raise ValueError(f"--rollback-on: expected limits of {', '.join(DEFAULT_LIMITS)}.")
        for name, limit in self.rollback_on.items():
            fits = limit >= 1 if name == "latency" else 0 <= limit <= 1
            if not fits:
                raise ValueError(
                    f"--rollback-on: {name} is {limit:g}, and must be "
                    + ("at least 1." if name == "latency" else "from 0 to 1.")
                )
        if "agreement" in self.rollback_on and self.shadow_share == 0:
            raise ValueError("--rollback-on: agreement needs images to compare: --shadow-share is 0.")

    def _normalize_models(self) -> None:
        """Bring `bundle`, `models` and `canary` into their present form with absolute URIs, and check them.

        Raises:
            ValueError: they cannot be served, in one sentence.
        """
        if self.bundle is not None and self.models is not None:
            raise ValueError("--bundle and --models exclude each other: give one of them.")
        if self.models is not None and self.canary is not None:
            raise ValueError(
                "--canary is for --bundle NAME=URI,NAME=URI: in --models, give the newest version a share."
            )
        if self.bundle is not None:
            models = _read_earlier_form(self.bundle, self.canary)
            single = [model.name for model in models] == [DEFAULT_NAME]
            object.__setattr__(self, "bundle", models[0].uri if single else None)
            object.__setattr__(self, "models", None if single else models)
            object.__setattr__(self, "canary", None)
        elif self.models:
            # YAML and JSON give dicts.
            models = [ModelVersion(**model) if isinstance(model, dict) else model for model in self.models]
            if without_uri := [model.name for model in models if not model.uri]:
                raise ValueError(f"--models: {without_uri[0]} has an empty uri.")
            models = [replace(model, uri=flags.absolute("models", model.uri)) for model in models]
            object.__setattr__(self, "models", models)
        else:
            raise ValueError("--bundle or --models is needed." if self.models is None else "--models is empty.")
        _resolve_shares(self._versions)

    @property
    def resources(self) -> tuple[float, float]:
        """CPUs and GPUs of each replica."""
        return self.cpus_per_replica or (4.0 if self.gpus_per_replica else 1.0), self.gpus_per_replica

    @property
    def _versions(self) -> list[ModelVersion]:
        if self.bundle is not None:
            return [ModelVersion(name=DEFAULT_NAME, uri=self.bundle)]
        return self.models or []

    @property
    def _shadow_share(self) -> float:
        if self.shadow_share is not None:
            return self.shadow_share
        return 0.1 if self.promote_after is not None or self.rollback_on is not None else 0.0

    @property
    def _jobs(self) -> JobSettings | None:
        if self.jobs_output is None:
            return None
        return JobSettings(place=self.jobs_output, prefixes=tuple(self.jobs_from or ()))

    @property
    def _log(self) -> LogSettings | None:
        if self.log_requests is None:
            return None
        return LogSettings(place=self.log_requests, share=self.log_share, images=self.log_images, days=self.log_days)

    @property
    def settings(self) -> Settings:
        """The settings of the replicas."""
        return Settings(
            models=_resolve_shares(self._versions),
            engine=self.engine,
            batch_size=self.batch_size,
            max_bytes=int(self.max_mebibytes * 2**20),
            max_pixels=int(self.max_megapixels * 1e6),
            max_images=self.max_images,
            timeout_seconds=self.timeout_seconds,
            access_log=self.access_log,
            max_queued_images=self.max_queued_images,
            max_bytes_in_flight=int(self.max_mebibytes_in_flight * 2**20),
            cors_origins=tuple(self.cors_origins or ()),
            explain=self.explain,
            max_cache_bytes=int(self.cache_mebibytes * 2**20),
            shadow_share=self._shadow_share,
            promote_after=self.promote_after,
            rollback_on=self.rollback_on,
            jobs=self._jobs,
            log=self._log,
        )


def _resolve_shares(models: Iterable[ModelVersion]) -> tuple[ModelSettings, ...]:
    """The versions, grouped by model, each with its share of the requests. The shares of a model sum to 1.

    Raises:
        ValueError: a name or share that cannot work, or a bundle that is listed twice for a model, in one sentence.
    """
    by_name: dict[str, list[ModelVersion]] = {}
    for model in models:
        if not NAME.fullmatch(model.name):
            raise ValueError(f"--models: {model.name!r} cannot be a name: expected {NAME_CHARACTERS}.")
        if model.share is not None and not 0 <= model.share <= 1:
            raise ValueError(f"--models: share of {model.name} must be 0 to 1, not {model.share}.")
        by_name.setdefault(model.name, []).append(model)
    settings = []
    for name, versions in by_name.items():
        uris = [version.uri for version in versions]
        if twice := [uri for uri in uris if uris.count(uri) > 1]:
            raise ValueError(f"--models lists {twice[0]} twice for {name}.")
        *older, newest = versions
        if newest.share is not None and not older:
            raise ValueError(f"--models: {name} has one version, which answers all requests: leave its share out.")
        if misplaced := [version.uri for version in older if version.share is not None]:
            raise ValueError(
                f"--models: {misplaced[0]} is not the newest version of {name}: give the share to its last entry."
            )
        share = 1.0 if newest.share is None else newest.share
        shares = [*[0.0] * (len(older) - 1), 1.0 - share, share] if older else [share]
        settings += [ModelSettings(name=name, uri=uri, share=share) for uri, share in zip(uris, shares, strict=True)]
    return tuple(settings)


def _read_earlier_form(bundle: str, canary: str | None) -> list[ModelVersion]:
    """The entries of --models for the values that --bundle and --canary had in earlier versions.

    Args:
        bundle: a URI, or several, separated by commas. Each is preceded by NAME= or is a version of `DEFAULT_NAME`.
            A local path that exists is one bundle, even with commas or = in it.
        canary: NAME=SHARE for models with several versions, separated by commas.

    Raises:
        ValueError: they cannot be read, in one sentence.
    """
    models: list[ModelVersion] = []
    for text in [bundle] if _is_path(bundle) else _split(bundle):
        name, equals, uri = text.partition("=")
        if not equals or not NAME.fullmatch(name) or _is_path(text):
            name, uri = DEFAULT_NAME, text
        models.append(ModelVersion(name=name, uri=flags.absolute("bundle", uri)))
    if not models:
        raise ValueError("--bundle names no bundle.")
    for text in _split(canary or ""):
        name, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise ValueError(f"--canary {text!r}: expected NAME=SHARE, with a share from 0 to 1.")
        versions = [index for index, model in enumerate(models) if model.name == name]
        if len(versions) < 2:
            raise ValueError(f"--canary {name}: --bundle has not two versions of it.")
        newest = versions[-1]
        models[newest] = replace(models[newest], share=share)
    return models


def _absolute_prefix(prefix: str) -> str:
    """
    Raises:
        ValueError, OSError: it is empty, of an unknown scheme, or names a folder above another one.
    """
    absolute = flags.absolute("jobs_from", prefix)
    if ".." in absolute.split("/"):
        raise ValueError(f"--jobs-from: {prefix!r} has .. in it.")
    return absolute


def _is_path(text: str) -> bool:
    """Whether a local file or folder has this path."""
    return bool(text) and Path(text).expanduser().exists()


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
