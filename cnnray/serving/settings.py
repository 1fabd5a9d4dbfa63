"""Settings of a replica, sent as Serve's `user_config`, which can change while replicas run."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Names of models."""
NAME_CHARACTERS = "letters, digits, _, . and -, the first a letter or digit"
"""What `NAME` matches, in words."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """One version of a model."""

    name: str
    """Name of the model in requests."""
    uri: str
    """Folder or s3:// prefix of the bundle."""
    share: float = 1.0
    """Share of the model's requests that this version answers; requests that name a version do not count. The shares
    of a model's versions sum to 1."""
    version: str | None = None
    """`Bundle.version` that the bundle had when the service was deployed; None: any."""
    engine: str | None = None
    """Name of the engine that ran it when the service was deployed; None: see `Settings.engine`."""
    digest: str | None = None
    """SHA-256 that the engine's file had when the service was deployed, in hexadecimal; None: any."""
    revision: int = 0
    """When this version was last deployed or loaded, in milliseconds since 1970; 0: not known."""
    verdict: str | None = None
    """What was decided about this canary, and why; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is logged of requests, and where; see `request_log`."""

    place: str
    """Folder or s3:// prefix."""
    share: float = 1.0
    """Share of the requests."""
    images: bool = False
    """Keep the images, too."""
    days: float = 30.0
    """Older files are deleted."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Predictions that requests may ask for; see `jobs`."""

    place: str
    """Folder or s3:// prefix for their rows."""
    prefixes: tuple[str, ...]
    """Folders and prefixes below which their images must lie."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a replica serves, and the limits of a request."""

    models: tuple[ModelSettings, ...]
    """Older versions of a name before newer ones. The first name answers requests that name no model."""
    engine: str
    """Name of an engine, or auto; see `engines.choose`."""
    batch_size: int
    """Largest number of images in a micro-batch."""
    max_bytes: int
    """Largest request body."""
    max_pixels: int
    """Largest image."""
    max_images: int
    """Largest number of images in a request."""
    timeout_seconds: float
    """For receiving a request's body, and for answering it."""
    access_log: str
    """Requests that are logged, each as a line of JSON: `all`, `errors` (a status from 400 on) or `none`."""
    max_queued_images: int = 512
    """Largest number of images that wait or are computed."""
    max_bytes_in_flight: int = 2**27
    """Largest number of bytes of bodies that are held."""
    cors_origins: tuple[str, ...] = ()
    """Origins of the pages whose scripts may read answers, such as https://example.com; `*`: all."""
    explain: bool = True
    """Whether answers are explained where a request asks for it."""
    max_cache_bytes: int = 0
    """Largest size of the answers that are kept for images that are sent again; 0: none."""
    shadow_share: float = 0.0
    """Share of a model's requests that its canary and the version before it both answer, to be compared."""
    promote_after: int | None = None
    """Images after which a canary that keeps the limits gets all requests; None: it never does by itself."""
    jobs: JobSettings | None = None
    """The predictions that requests may ask for; None: none."""
    log: LogSettings | None = None
    """What is logged of requests; None: nothing."""
    rollback_on: dict[str, float] | None = None
    """Limits of a canary, see `releases.judge`: if it exceeds one, it gets no requests any more; None: it goes on."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON and YAML."""
        return dataclasses.asdict(self) | {
            "models": [dataclasses.asdict(model) for model in self.models], "cors_origins": [*self.cors_origins],
            "jobs": dataclasses.asdict(self.jobs) | {"prefixes": [*self.jobs.prefixes]} if self.jobs else None,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings that `as_dict` was called on."""
        models = tuple(ModelSettings(**model) for model in values["models"])
        access_log = values["access_log"]
        if isinstance(access_log, bool):  # of an earlier version
            access_log = "all" if access_log else "none"
        origins = tuple(values.get("cors_origins", ()))
        changed: dict[str, Any] = {"models": models, "access_log": access_log, "cors_origins": origins}
        if values.get("log"):
            changed["log"] = LogSettings(**values["log"])
        if jobs := values.get("jobs"):
            changed["jobs"] = JobSettings(place=jobs["place"], prefixes=tuple(jobs["prefixes"]))
        return cls(**values | changed)
