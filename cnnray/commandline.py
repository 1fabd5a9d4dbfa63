"""The command line of all jobs: flags and YAML to a config, logs on stderr, one JSON line on stdout, exit codes."""

import dataclasses
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from cnnray import configs, flags
from cnnray.errors import CnnrayError

Config = TypeVar("Config", bound=configs.Config)

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_STOPPED = 128 + signal.SIGTERM

_NOISE = r"ray/issues/53727|Created TensorFlow Lite XNNPACK delegate"
"""Lines of workers that are not about the job: logs of Ray's own actors, and the first line of LiteRT."""


class _Parser(ArgumentParser):
    """Writes flags with dashes, and reports a mistake in one sentence."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("type") is bool:
            options |= {"nargs": "?", "const": True}  # --overwrite is --overwrite true
        if isinstance(options.get("default"), list):
            names = names[:1]
            options = {"help": options["help"], "default": options["default"], "nargs": "+"}  # --search A B
        flag_names = [n.replace("_", "-") if isinstance(n, str) and n.startswith("--") else n for n in names]
        return super().add_argument(*flag_names, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = " ".join(str(message).split())
        sys.stderr.write(f"{self.prog}: {sentence} (see --help)\n")
        sys.exit(EXIT_USAGE)


def parse(config_class: type[Config], prog: str, arguments: Sequence[str] | None = None) -> Config:
    """Build a config from `--config FILE` and the flags on top of it.

    Args:
        config_class: a dataclass; its fields are the flags, their docstrings the help. The groups that it inherits
            (see `cnnray.configs`) are the sections of the help. Flag names of earlier versions are accepted.
        prog: the job's name in messages.
        arguments: the command line; None: that of this process.

    Raises:
        SystemExit: with code 2 and one sentence on stderr for a mistake, 0 for `--help` and `--print-config`.
    """

    def loader(text: str) -> Any:
        # YAML 1.1 reads MIN:MAX of an earlier version's --workers, such as 1:4, as 64 (base 60).
        values = configs.read_yaml(re.sub(r"(?m)^(\s*workers:[ \t]+)(\d+:\d+)(?=[ \t]*(#.*)?$)", r'\1"\2"', text))
        return configs.without_header(config_class, values, "--config") if isinstance(values, dict) else values

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", loader, exceptions=(yaml.YAMLError, ValueError))
    parser = _Parser(
        prog=prog, description=(config_class.__doc__ or "").strip(), print_config="--print-config", allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these flags; flags go on top.")
    for group, inherited in configs.groups(config_class):
        parser.add_class_arguments(group, as_group=group is not config_class, skip=inherited)
    try:
        values = parser.parse_args(_with_new_names(config_class, sys.argv[1:] if arguments is None else arguments))
        values.pop("config")
        return config_class(**vars(parser.instantiate(values)))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _with_new_names(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Replace flags of earlier versions in a command line by those of today.

    Raises:
        ValueError: the value of a flag that was renamed cannot be read.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    renamed = {flags.flag_name(name): name for name in getattr(config_class, "RENAMED", {}) if name not in known}
    current: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in renamed:
            current.append(argument)
            continue
        earlier = {renamed[flag]: value if equals else next(rest, "")}
        for name, new in configs.upgrade(config_class, earlier).items():
            current += [flags.flag_name(name), "null" if new is None else str(new)]
    return current


def main(config_class: type[Config], prog: str, job: Callable[[Config], dict[str, Any]]) -> NoReturn:
    """Parse the command line, and run a job with its config: see `parse` and `run`."""
    config = parse(config_class, prog)
    run(lambda: job(config))


def run(job: Callable[[], dict[str, Any]]) -> NoReturn:
    """Run a job. Its result becomes the last line of stdout, an error one sentence on stderr.

    Raises:
        SystemExit: 0, `exit_code` of a `CnnrayError`, 1 for an `OSError`, 130 for Ctrl-C, 143 for SIGTERM
            (`ray job stop`). Other errors keep their traceback.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    # Ray reads these variables when it is imported, and when it prints a line of a worker.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _NOISE)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # As Ray's handler does after `ray.init`, raise an exception, so that contexts end and leases are released.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    try:
        result = job()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; the same command goes on from what was done.\n")
        sys.exit(130)
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:
            raise
        sys.stderr.write("Stopped; the same command goes on from what was done.\n")
        sys.exit(EXIT_STOPPED)
    except (CnnrayError, OSError) as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(error.exit_code if isinstance(error, CnnrayError) else EXIT_FAILURE)
    sys.stderr.flush()
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    sys.exit(0)
