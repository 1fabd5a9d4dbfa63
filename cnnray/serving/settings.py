"""Settings of a replica, sent as Serve's `user_config`, which can change while replicas run; and the API key."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from cnnray.errors import BadInputError
from cnnray.images import storage

API_KEY, API_KEY_FILE = "CNNRAY_API_KEY", "CNNRAY_API_KEY_FILE"
"""Environment variables with the API key, and with the name of a file that holds it: see `api_key`."""


class ApiKeyError(BadInputError, ValueError):
    """An API key that is stated twice, or a file of it that is empty; the message is one sentence for the user."""


def api_key() -> str | None:
    """The key that requests must send; None: requests need no key.

    It is the value of the environment variable `CNNRAY_API_KEY`, or the content of the file that
    `CNNRAY_API_KEY_FILE` names, a path or s3:// (without the white space around it). The variables of a submitted job
    are no place for a secret: Ray shows them to everybody who may list jobs.

    Raises:
        ApiKeyError: both variables are set, or the file is empty.
        OSError: the file cannot be read.
    """
    key, file = os.environ.get(API_KEY), os.environ.get(API_KEY_FILE)
    if not file:
        return key or None
    if key:
        raise ApiKeyError(f"{API_KEY} and {API_KEY_FILE} are both set: set one of them.")
    key = storage.read_bytes(storage.absolute(file)).decode(errors="replace").strip()
    if not key:
        raise ApiKeyError(f"{file}, which {API_KEY_FILE} names, is empty.")
    return key


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

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON and YAML."""
        return dataclasses.asdict(self) | {"models": [dataclasses.asdict(model) for model in self.models]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings that `as_dict` was called on."""
        models = tuple(ModelSettings(**model) for model in values["models"])
        access_log = values["access_log"]
        if isinstance(access_log, bool):  # of an earlier version
            access_log = "all" if access_log else "none"
        return cls(**values | {"models": models, "access_log": access_log})
