"""What a replica is told, as Serve's `user_config`: it can change while replicas run."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """One version of a model."""

    name: str
    """By which clients ask for it."""
    uri: str
    """Of its bundle."""
    share: float = 1.0
    """Of the requests for this name that do not name a version; of a name's versions the shares sum to 1."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a replica serves, and how much it takes."""

    models: tuple[ModelSettings, ...]
    """Older versions of a name before newer ones. The first name answers requests that name none."""
    engine: str
    """See `engines.choose`."""
    batch_size: int
    """Images that a network is given at once, at most."""
    max_bytes: int
    """Of a request's body."""
    max_pixels: int
    """Of an image while it is decoded."""
    max_images: int
    """Of a request."""
    timeout_seconds: float
    """For a request's body, and for its answer."""
    access_log: bool
    """Whether each request is logged, as a line of JSON."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON and YAML."""
        return dataclasses.asdict(self) | {"models": [dataclasses.asdict(model) for model in self.models]}

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Settings":
        """Of what `as_dict` gave."""
        return cls(**values | {"models": tuple(ModelSettings(**model) for model in values["models"])})
