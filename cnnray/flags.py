"""Checks that the configs of several jobs share: each names the flag in one sentence."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from cnnray.images import storage


def flag_name(field: str) -> str:
    """A config's field as it is flag_name on the command line."""
    return "--" + field.replace("_", "-")


def check_at_least_one(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field is neither None nor at least 1.
    """
    _check(config, fields, lambda value: value >= 1, "at least 1")


def check_more_than_zero(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field is neither None nor more than 0.
    """
    _check(config, fields, lambda value: value > 0, "more than 0")


def check_not_negative(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field is neither None nor at least 0.
    """
    _check(config, fields, lambda value: value >= 0, "at least 0")


def check_share(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field is neither None nor 0 to 1.
    """
    _check(config, fields, lambda value: 0 <= value <= 1, "0 to 1")


def check_below_one(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field is neither None nor at least 0 and less than 1.
    """
    _check(config, fields, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def _check(config: Any, fields: Iterable[str], valid: Callable[[Any], bool], expected: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None and not valid(value):
            raise ValueError(f"{flag_name(field)} must be {expected}, not {value}.")


def check_choices(config: Any, **choices: Any) -> None:
    """
    Raises:
        ValueError: a field is none of the values of the Literal that stands for it.
    """
    for field, literal in choices.items():
        value = getattr(config, field)
        if value not in get_args(literal):
            raise ValueError(f"{flag_name(field)} {value!r} is not known; there are {', '.join(get_args(literal))}.")


def absolute(field: str, value: str) -> str:
    """A path or s3:// address that a flag names, as `storage.absolute` gives it.

    Raises:
        ValueError: it is empty, or, in a job of `ray job submit`, a relative path.
        OSError: it is an address of another kind.
    """
    if not value:
        raise ValueError(f"{flag_name(field)} is empty.")
    found = storage.absolute(value)
    # Ray tells the driver of such a job in this variable what it was submitted with.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not (
        not storage.is_local(found) or Path(value).expanduser().is_absolute()
    ):
        raise ValueError(
            f"{flag_name(field)} {value} is a relative path, and a submitted job works in Ray's copy of the working "
            "directory, which Ray deletes: give an absolute path that all nodes see, or s3://BUCKET/PREFIX."
        )
    return found


def make_absolute(config: Any, *fields: str) -> None:
    """Make paths and s3:// addresses, of a frozen config too, what `absolute` gives; None stays None.

    Raises:
        ValueError, OSError: as `absolute`.
    """
    for field in fields:
        value = getattr(config, field)
        if value is not None:
            object.__setattr__(config, field, absolute(field, value))
