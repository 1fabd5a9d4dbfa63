"""The API keys: whose they are, what they allow, and where they come from."""

import asyncio
import hashlib
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from cnnray.errors import BadInputError
from cnnray.images import storage
from cnnray.serving.bodies import RequestError

log = logging.getLogger(__name__)

API_KEY, API_KEY_FILE = "CNNRAY_API_KEY", "CNNRAY_API_KEY_FILE"
"""Environment variables with the API key, and with the name of a file that holds it, or several: see `read_keys`."""
_READ_AGAIN_SECONDS = 10.0
_PUBLIC = ("/health/", "/v2/health/", "/docs/")
_PUBLIC_PAGES = ("/", "/docs", "/openapi.json")


class ApiKeyError(BadInputError, ValueError):
    """API keys that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """An API key."""

    key: str
    name: str = ""
    """Of whoever has it, for the access log."""
    requests_per_second: float | None = None
    """Requests that a replica answers; None: any number."""
    admin: bool = False
    """Whether it may change what is served."""


def is_public(path: str) -> bool:
    """Whether requests for a path need no API key: probes and browsers cannot send one."""
    return path in _PUBLIC_PAGES or path.startswith(_PUBLIC)


def read_keys() -> list[Key]:
    """The keys, one of which a request must send; empty: requests need no key.

    It is the value of the environment variable `CNNRAY_API_KEY`, or they are in the file that `CNNRAY_API_KEY_FILE`
    names, a path or s3://: either a key alone, on one line and without blanks, or a YAML list of mappings with
    `key`, `name`, and where wanted `requests_per_second` and `admin`. The variables of a submitted job are no place
    for a secret: Ray shows them to everybody who may list jobs.

    Raises:
        ApiKeyError: both variables are set, or the file is empty or damaged.
        OSError: the file cannot be read.
    """
    key, file = os.environ.get(API_KEY), os.environ.get(API_KEY_FILE)
    if not file:
        return [Key(key=key)] if key else []
    if key:
        raise ApiKeyError(f"{API_KEY} and {API_KEY_FILE} are both set: set one of them.")
    text = storage.read_bytes(storage.absolute(file)).decode(errors="replace").strip()
    where = f"{file}, which {API_KEY_FILE} names,"
    if not text:
        raise ApiKeyError(f"{where} is empty.")
    if not text.startswith(("- ", "[", "{", "#")) and len(text.split()) == 1:
        return [Key(key=text)]
    try:
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        entries = None  # the error would show a part of the file
    if not isinstance(entries, list):
        raise ApiKeyError(f"{where} is neither a key, without blanks, nor a YAML list of keys.")
    keys = [_read_entry(entry, f"Entry {number} of {where}") for number, entry in enumerate(entries, start=1)]
    if len({key.key for key in keys}) < len(keys):
        raise ApiKeyError(f"{where} has a key twice.")
    if len({key.name for key in keys}) < len(keys):
        raise ApiKeyError(f"{where} has a name twice.")
    if not keys:
        raise ApiKeyError(f"{where} is empty.")
    return keys


def _read_entry(entry: object, where: str) -> Key:
    kinds = {"key": str, "name": str, "requests_per_second": int | float, "admin": bool}
    if not isinstance(entry, dict) or not {"key", "name"} <= entry.keys() <= kinds.keys():
        raise ApiKeyError(
            f"{where} must be a mapping with key and name, and where wanted requests_per_second and admin."
        )
    for name, value in entry.items():
        if not isinstance(value, kinds[name]) or (kinds[name] is not bool and not value):
            hint = " (quote one of digits alone)" if name in ("key", "name") else ""
            raise ApiKeyError(f"{where} has a {name} that is empty, or of the wrong type{hint}.")
    if not entry.get("requests_per_second", 1) > 0:
        raise ApiKeyError(f"{where} must have requests_per_second above 0.")
    return Key(**entry)


class Keys:
    """The keys of a replica, and how many requests each may send."""

    def __init__(self, keys: list[Key]) -> None:
        self._by_digest: dict[bytes, Key] = {}
        self._left: dict[str, tuple[float, float]] = {}
        """By name, the requests that were left at a moment."""
        self._set(keys)

    def _set(self, keys: list[Key]) -> None:
        self._by_digest = {_digest(key.key): key for key in keys}

    @property
    def are_needed(self) -> bool:
        """Whether requests need a key."""
        return bool(self._by_digest)

    def find(self, text: str) -> Key | None:
        """The key that a request has sent; None: it is none of them."""
        return self._by_digest.get(_digest(text))  # by digest, so that the time tells nothing about a key

    def take_request(self, key: Key) -> float:
        """Count a request. Returns the seconds after which it is allowed, 0 where it is now."""
        rate = key.requests_per_second
        if rate is None:
            return 0.0
        now, most = time.monotonic(), max(1.0, rate)
        left, moment = self._left.get(key.name, (most, now))
        left = min(most, left + rate * (now - moment))
        if left < 1:
            self._left[key.name] = left, now
            return (1 - left) / rate
        self._left[key.name] = left - 1, now
        return 0.0

    def check(self, headers: Mapping[str, str]) -> Key | None:
        """Check the key that a request has sent, and count the request.

        Args:
            headers: by name in lower case.

        Returns:
            The key; None: requests need none.

        Raises:
            RequestError: 401, there is no key, or it is wrong; 429, it has had its requests.
        """
        if not self.are_needed:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = self.find(token if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        if key is None:
            raise RequestError(401, "The API key is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        if wait := self.take_request(key):
            raise RequestError(
                429,
                f"This API key has had its {key.requests_per_second:g} requests a second: try again later.",
                {"Retry-After": str(math.ceil(wait))},
            )
        return key

    async def read_again(self) -> None:
        """Read the file anew, for ever, so that keys can be added and withdrawn while replicas run."""
        while os.environ.get(API_KEY_FILE):
            await asyncio.sleep(_READ_AGAIN_SECONDS)
            try:
                self._set(await asyncio.to_thread(read_keys))
            except Exception as error:  # whatever it is, the file must be read again
                log.error("The API keys stay as they are: %s", error)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
