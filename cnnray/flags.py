"""Checks of flags that the configs share. Each raises one sentence that names the flag."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from cnnray.images import storage


def flag_name(field: str) -> str:
    """The flag of a config's field: `--batch-size` for `batch_size`."""
    return "--" + field.replace("_", "-")


def check_at_least_one(config: Any, *fields: str) -> None:
    """Check that fields are None or at least 1.

    Raises:
        ValueError: a field is not.
    """
    _check(config, fields, lambda value: value >= 1, "at least 1")


def check_more_than_zero(config: Any, *fields: str) -> None:
    """Check that fields are None or more than 0.

    Raises:
        ValueError: a field is not.
    """
    _check(config, fields, lambda value: value > 0, "more than 0")


def check_not_negative(config: Any, *fields: str) -> None:
    """Check that fields are None or at least 0.

    Raises:
        ValueError: a field is not.
    """
    _check(config, fields, lambda value: value >= 0, "at least 0")


def check_share(config: Any, *fields: str) -> None:
    """Check that fields are None or 0 to 1.

    Raises:
        ValueError: a field is not.
    """
    _check(config, fields, lambda value: 0 <= value <= 1, "0 to 1")


def check_below_one(config: Any, *fields: str) -> None:
    """Check that fields are None or at least 0 and less than 1.

    Raises:
        ValueError: a field is not.
    """
    _check(config, fields, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def _check(config: Any, fields: Iterable[str], valid: Callable[[Any], bool], expected: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None and not valid(value):
            raise ValueError(f"{flag_name(field)} must be {expected}, not {value}.")


def check_choices(config: Any, **choices: Any) -> None:
    """Check that each field is None or has one of the values of its `Literal`.

    Args:
        config: a dataclass.
        choices: a `Literal` type by field.

    Raises:
        ValueError: a field has another value.
    """
    for field, literal in choices.items():
        value = getattr(config, field)
        if value is not None and value not in get_args(literal):
            raise ValueError(f"{flag_name(field)} {value!r} is not known; there are {', '.join(get_args(literal))}.")


def absolute(field: str, value: str) -> str:
    """The value of a flag that is a path or a remote address, as `storage.absolute` returns it.

    Raises:
        ValueError: it is empty, or a relative path in a job of `ray job submit`.
        OSError: the scheme is unknown.
    """
    if not value:
        raise ValueError(f"{flag_name(field)} is empty.")
    uri = storage.absolute(value)
    is_relative = storage.is_local(uri) and not Path(value).expanduser().is_absolute()
    if is_relative and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # Ray sets it for submitted jobs
        raise ValueError(
            f"{flag_name(field)} {value} is a relative path, and a submitted job works in Ray's copy of the working "
            "directory, which Ray deletes: give an absolute path that all nodes see, or s3://BUCKET/PREFIX."
        )
    return uri


def make_absolute(config: Any, *fields: str) -> None:
    """Replace paths and addresses in a config, even a frozen one, by what `absolute` returns; None stays None.

    Raises:
        ValueError, OSError: as `absolute`.
    """
    for field in fields:
        value = getattr(config, field)
        if value is not None:
            object.__setattr__(config, field, absolute(field, value))
