"""What a service is told: every field is a flag of jobs/serve.py and a key of its YAML."""

import re
from dataclasses import dataclass

from cnnray import flags
from cnnray.models import engines
from cnnray.serving.settings import ModelSettings, Settings

DEFAULT_NAME = "model"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer over HTTP which class images are of, with one bundle or several."""

    bundle: str
    """Folder or s3:// prefix of a bundle; or several, separated by commas, each NAME=URI. The same name again is a
    newer version of the model, which answers instead, or answers the share that --canary says."""
    canary: str | None = None
    """NAME=SHARE: of the requests for that model its newest version answers this share, the one before it the rest.
    Several separated by commas."""
    engine: str = "auto"
    """What runs the networks: keras, onnx, onnx-int8, litert, litert-float16, litert-int8, openvino-bfloat16 or
    openvino-int8; auto: on a GPU keras, else the fastest that export has proven."""
    batch_size: int = 32
    """Images that a network is given at once, at most."""
    host: str = "127.0.0.1"
    """Address that is listened on; 0.0.0.0: all of the machine's."""
    port: int = 8000
    """Port that is listened on."""
    min_replicas: int = 1
    """Replicas that there are at least, 0 or more."""
    max_replicas: int | None = None
    """Replicas that there are at most; null: what fits the cluster."""
    target_ongoing_requests: float = 8.0
    """Requests being answered in a replica, on average, above which another replica is started."""
    downscale_delay_seconds: float = 120.0
    """Time of less load after which a replica is ended."""
    cpus_per_replica: float = 1.0
    """CPUs, and so threads, of each replica."""
    gpus_per_replica: float = 0.0
    """GPUs of each replica."""
    wait_minutes: float = 0.0
    """Minutes that the job waits for nodes where the cluster has no room for the replicas that there are at least."""
    max_queued_requests: int = 128
    """Requests that wait in a replica, at most; further ones are answered 503."""
    max_mebibytes: float = 32.0
    """Of a request's body."""
    max_megapixels: float = 50.0
    """Of an image while it is decoded."""
    max_images: int = 32
    """Of a request."""
    timeout_seconds: float = 30.0
    """For a request's body, and for its answer; then 408 and 503."""
    access_log: bool = True
    """Whether each request is logged, as a line of JSON, in the replica's log."""
    write_config: str | None = None
    """Write the configuration for `serve deploy` into this file, and stop."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        if self.engine not in ("auto", *engines.ENGINES):
            raise ValueError(f"--engine {self.engine!r}: expected auto, {', '.join(engines.ENGINES)}.")
        flags.check_at_least_one(self, "batch_size", "max_replicas", "max_images", "max_queued_requests")
        flags.check_more_than_zero(
            self, "cpus_per_replica", "max_mebibytes", "max_megapixels", "timeout_seconds", "target_ongoing_requests"
        )
        flags.check_share(self, "gpus_per_replica")
        flags.check_not_negative(self, "wait_minutes")
        if self.min_replicas < 0 or (self.max_replicas and self.min_replicas > self.max_replicas):
            raise ValueError(f"--min-replicas {self.min_replicas} is not from 0 to --max-replicas.")
        if not 0 < self.port < 2**16:
            raise ValueError(f"--port {self.port} is no port.")
        _ = self.models
        flags.make_absolute(self, "write_config")

    @property
    def models(self) -> tuple[ModelSettings, ...]:
        """The models that `bundle` and `canary` say.

        Raises:
            ValueError: they cannot be read, in one sentence.
        """
        uris: dict[str, list[str]] = {}
        for one in filter(None, (part.strip() for part in self.bundle.split(","))):
            name, named, uri = one.partition("=")
            if not named or not _NAME.fullmatch(name):
                name, uri = DEFAULT_NAME, one
            uris.setdefault(name, []).append(flags.absolute("bundle", uri))
        if not uris:
            raise ValueError("--bundle names no bundle.")
        shares = self._canaries()
        if unknown := shares.keys() - {name for name, versions in uris.items() if len(versions) > 1}:
            raise ValueError(f"--canary {sorted(unknown)[0]}: --bundle has not two versions of it.")
        found = []
        for name, versions in uris.items():
            newest = shares.get(name, 1.0)
            before = [0.0] * (len(versions) - 2) + [1.0 - newest] if len(versions) > 1 else []
            for uri, share in zip(versions, [*before, newest], strict=True):
                found.append(ModelSettings(name=name, uri=uri, share=share))
        return tuple(found)

    def _canaries(self) -> dict[str, float]:
        found = {}
        for one in filter(None, (part.strip() for part in (self.canary or "").split(","))):
            name, _, share = one.partition("=")
            try:
                found[name] = float(share)
            except ValueError:
                found[name] = -1.0
            if not 0 <= found[name] <= 1:
                raise ValueError(f"--canary {one!r}: expected NAME=SHARE, with a share from 0 to 1.")
        return found

    @property
    def settings(self) -> Settings:
        """What replicas are told."""
        return Settings(
            models=self.models,
            engine=self.engine,
            batch_size=self.batch_size,
            max_bytes=int(self.max_mebibytes * 2**20),
            max_pixels=int(self.max_megapixels * 1e6),
            max_images=self.max_images,
            timeout_seconds=self.timeout_seconds,
            access_log=self.access_log,
        )
