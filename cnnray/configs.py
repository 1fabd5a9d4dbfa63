"""Rules of the fields of configs, `config.yaml`, and the field names of earlier versions.

A config is a frozen dataclass whose fields are flags. The rules of a field are in its metadata, which a group (a
dataclass that configs inherit) can set for all its fields. No other module keeps a list of fields.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, is_dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

import yaml
from jsonargparse import get_loader

import cnnray
from cnnray.errors import BadInputError
from cnnray.flags import flag_name

CONFIG_FORMAT = 2
"""Format of `config.yaml`. Format 1 had no number, and MIN:MAX in the field `workers` of a training."""
OUTPUT_FORMAT = 2
"""Format of the other files from which a later run resumes: their names, columns and meaning."""
_HEADER = "cnnray"
_DEFAULTS = {"resumable": False, "searchable": True, "tracked": True}

read_yaml = get_loader("yaml")
"""Parse YAML as flags are parsed: 1e-4 is a number."""

Group = TypeVar("Group", bound=type)
Renamed = Mapping[str, Callable[[Any], dict[str, Any]]]


class NewerFormatError(BadInputError, ValueError):
    """A file of a later version of cnnray."""


class Config(Protocol):
    """Any of the jobs' configs."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def rules(*, resumable: bool | None = None, searchable: bool | None = None, tracked: bool | None = None) -> Any:
    """Metadata of a field, where it differs from that of its group.

    Args:
        resumable: whether a resumed run may have another value. The default is False, because another value gives
            another result.
        searchable: whether a search may vary the field; True by default.
        tracked: whether experiment trackers receive its value; True by default.
    """
    values = {"resumable": resumable, "searchable": searchable, "tracked": tracked}
    return {name: value for name, value in values.items() if value is not None}


def group(**defaults: bool) -> Callable[[Group], Group]:
    """Decorate a dataclass whose own fields have these `rules` unless their metadata says otherwise."""

    def decorate(cls: Group) -> Group:
        for name in cls.__annotations__:
            field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]  # a dataclass's
            field.metadata = MappingProxyType({**rules(**defaults), **field.metadata})
        return cls

    return decorate


def names(config_class: type[Config], **wanted: bool) -> set[str]:
    """The fields of a config with these `rules`, such as `resumable=True`."""
    return {
        field.name
        for field in dataclasses.fields(config_class)
        if all(field.metadata.get(rule, _DEFAULTS[rule]) == value for rule, value in wanted.items())
    }


def groups(config_class: type[Config]) -> list[tuple[type[Config], set[str]]]:
    """The dataclasses that a config inherits its fields from, the config itself last, in the order of their fields.

    Returns:
        Each with the names of fields that it inherits itself.
    """
    classes = []
    for cls in reversed(config_class.__mro__):
        if is_dataclass(cls) and (own := cls.__annotations__.keys() & names(cls)):
            classes.append((cls, names(cls) - own))
    return classes


def fields_of(config: Config, config_class: type[Config]) -> dict[str, Any]:
    """The values of those fields that another class has, too, by field."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config_class)}


def as_dict(config: Config) -> dict[str, Any]:
    """A config as plain values, for YAML and JSON."""
    return asdict(config)


def upgrade(config_class: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace fields of an earlier version by those of today.

    Args:
        config_class: may have `RENAMED`: for each renamed field, a function from its value to today's fields.
        values: by field, of this or an earlier version.
    """
    renamed: Renamed = getattr(config_class, "RENAMED", {})
    current = {name: value for name, value in values.items() if name not in renamed}
    for name in values.keys() & renamed.keys():
        current = renamed[name](values[name]) | current
    return current


def dump(config: Config, facts: Mapping[str, Any] | None = None, **changes: Any) -> bytes:
    """A config as `config.yaml`, with other values for some fields.

    The key `cnnray` holds the version that wrote it and the numbers of the formats.

    Args:
        config: of the run.
        facts: what else the key `cnnray` holds, for `load_facts`.
        changes: values for fields.
    """
    header = {"version": cnnray.__version__, "config": CONFIG_FORMAT, "output": OUTPUT_FORMAT, **(facts or {})}
    return yaml.safe_dump(as_dict(config) | changes | {_HEADER: header}, sort_keys=False).encode()


def load(config_class: type[Config], text: bytes | str, source: str) -> dict[str, Any]:
    """Read what `dump` wrote, as values by the config's fields of today; fields of other jobs stay as they are.

    Args:
        config_class: the job's.
        text: YAML.
        source: the file's name, for messages.

    Raises:
        NewerFormatError: a later version of cnnray wrote it.
        BadInputError: it is not the YAML of a config.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInputError(f"{source} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise BadInputError(f"{source} is not a config: expected a table of flags.")
    return without_header(config_class, values, source)


def load_facts(text: bytes | str) -> dict[str, Any]:
    """The facts in a text that `load` accepts."""
    header = yaml.safe_load(text).get(_HEADER)
    return dict(header) if isinstance(header, dict) else {}


def without_header(config_class: type[Config], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of a parsed `config.yaml`: see `load`."""
    header = values.get(_HEADER)
    header = header if isinstance(header, dict) else {}
    for name, newest in (("config", CONFIG_FORMAT), ("output", OUTPUT_FORMAT)):
        if isinstance(number := header.get(name), int) and number > newest:
            raise NewerFormatError(
                f"{source} was written by cnnray {header.get('version')} ({name} format {number}), and cnnray "
                f"{cnnray.__version__} reads up to {newest}: update cnnray."
            )
    return upgrade(config_class, {name: value for name, value in values.items() if name != _HEADER})


def differences(config: Config, earlier: Mapping[str, Any], fixed: Collection[str] = ()) -> list[str]:
    """The flags that would give another result than those of an earlier run, each with both values.

    Args:
        config: this run's.
        earlier: the earlier run's, from `load`. A missing field was added by a later version, with a default that
            does what earlier versions did.
        fixed: fields that may not differ although they are resumable.
    """
    free = names(type(config), resumable=True) - set(fixed)
    differing = []
    for field in dataclasses.fields(config):
        default = field.default_factory() if callable(field.default_factory) else field.default
        default = None if default is dataclasses.MISSING else _plain(default)
        now, before = _plain(getattr(config, field.name)), _plain(earlier.get(field.name, default))
        if isinstance(default, dict) and isinstance(before, dict):
            before = default | before
        if field.name not in free and now != before:
            differing.append(f"{flag_name(field.name)} {before} (now {now})")
    return differing


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
