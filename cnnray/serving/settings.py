"""Settings of a replica, sent as Serve's `user_config`. They can change while replicas run."""

import dataclasses
from dataclasses import dataclass
from typing import Any


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
    access_log: bool
    """Log each request, as a line of JSON."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON and YAML."""
        return dataclasses.asdict(self) | {"models": [dataclasses.asdict(model) for model in self.models]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings that `as_dict` was called on."""
        return cls(**values | {"models": tuple(ModelSettings(**model) for model in values["models"])})
