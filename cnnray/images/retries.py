"""Trying again, after growing pauses, while storage is in trouble.

The storage layer itself repeats a request a few times within seconds. Throttling, outages and expired credentials
last longer, and no image is bad because of them.
"""

import contextlib
import functools
import logging
import math
import os
import random
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from cnnray.errors import CnnrayError, TransientError
from cnnray.images import storage

log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_SECONDS = "CNNRAY_STORAGE_RETRY_SECONDS"
_DEFAULT_SECONDS = 300.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0

_LOG_SECONDS = 60.0
"""Seconds between two log lines about the same bucket: under throttling, single images fail all the time."""

_logged_at: dict[str, float] = {}
"""When trouble of a bucket was last logged, by `time.monotonic`."""
_given_up: set[str] = set()
"""The buckets whose trouble has outlasted all attempts at an image: each image has one attempt until one succeeds."""


def retry_seconds() -> float:
    """How long an image is tried again: the environment variable CNNRAY_STORAGE_RETRY_SECONDS, or else 300.

    Raises:
        StorageError: the variable is not a number of seconds.
    """
    text = os.environ.get(_SECONDS)
    if not text:
        return _DEFAULT_SECONDS
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < math.inf:
            return seconds
    raise storage.StorageError(f"{_SECONDS} is {text!r}; expected a number of seconds.")


class Attempts:
    """The attempts at one file."""

    def __init__(self, uri: str) -> None:
        """
        Args:
            uri: the file.
        """
        self._place, self._pause, self._until = storage.root(uri), _FIRST_PAUSE, 0.0

    def wait(self, error: Exception) -> bool:
        """Pause after an error of `storage`, if another attempt may succeed.

        Returns:
            Whether to try again.

        Raises:
            StorageError: see `retry_seconds`.
        """
        if not isinstance(error, TransientError | storage.CredentialsError):
            return False
        now = time.monotonic()
        if not self._until:
            self._until = now + (0.0 if self._place in _given_up else retry_seconds())
        if now >= self._until:
            _given_up.add(self._place)
            return False
        if now - _logged_at.get(self._place, -math.inf) >= _LOG_SECONDS:
            _logged_at[self._place] = now
            log.warning("%s Trying again for %.0f s.", error, self._until - now)
        time.sleep(min(self._pause * random.uniform(0.5, 1.5), self._until - now))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return True

    def succeeded(self) -> None:
        """Record that storage answered."""
        _given_up.discard(self._place)
        self._pause, self._until = _FIRST_PAUSE, 0.0


def patient(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function of a file, or of a folder, whose address is its first argument.

    It is called again while storage is in trouble, also where the answer to a call was lost. What it raises is raised
    once no other attempt may succeed.
    """

    @functools.wraps(function)
    def patiently(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        attempts = Attempts(str(arguments[0]))
        while True:
            try:
                result = function(*arguments, **options)
            except CnnrayError as error:
                if not attempts.wait(error):
                    raise
            else:
                attempts.succeeded()
                return result

    return patiently
