"""The command line of all jobs: flags and YAML to a config, logs on stderr, one JSON line on stdout, exit codes."""

import contextlib
import dataclasses
import json
import logging
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

import cnnray
from cnnray import cluster, configs, flags
from cnnray.errors import CnnrayError, TransientError
from cnnray.images import storage
from cnnray.supervisor import SIGNALS, Ending, supervised

Config = TypeVar("Config", bound=configs.Config)

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_STOPPED = 128 + signal.SIGTERM

LOG = "error.log"
"""The file in an output that holds the trace of the error that ended the last run; no job reads it."""

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
        current = _with_new_names(config_class, sys.argv[1:] if arguments is None else arguments)
        values = parser.parse_args(_with_values(config_class, current))
        values.pop("config")
        # vars() would give names of jsonargparse: it marks those that its own methods have, such as `update`.
        return config_class(**dict(parser.instantiate(values).items(branches=True, nested=False)))
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


def _with_values(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Add what flags without a value stand for: --multi-label is --multi-label=true, also where null is a value. (The
    parser itself does so where it is not.)"""
    fields = dataclasses.fields(config_class)
    known = {flags.flag_name(field.name) for field in fields if field.type == bool | None}
    following = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in known and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def main(config_class: type[Config], prog: str, job: Callable[[Config], dict[str, Any]]) -> NoReturn:
    """Parse the command line, and run a job with its config: see `parse` and `run`."""
    config = parse(config_class, prog)

    def run_job() -> dict[str, Any]:
        # Ray prints what happens to its workers to stdout, which holds the job's JSON line only.
        with contextlib.redirect_stdout(sys.stderr):
            return job(config)

    run(run_job, getattr(config, "folder", None) or getattr(config, "output", None))


def run(job: Callable[[], dict[str, Any]], output: str | None = None) -> NoReturn:
    """Run a job in a process of its own (see `supervisor`), and end as it ends.

    Args:
        job: returns the result.
        output: folder or s3:// prefix of the job's results, where the trace of an error belongs.

    Raises:
        SystemExit: with the code of the `ending`.
    """
    supervised(lambda: ending(job, output), _NOISE).leave()


def ending(job: Callable[[], dict[str, Any]], output: str | None = None) -> Ending:
    """Run a job in this process.

    Returns:
        0 and its result as a line of stdout; or else a sentence for stderr, and 1 for an error (or the
        `exit_code` of a `CnnrayError`), 130 for Ctrl-C, 143 for SIGTERM (`ray job stop`).
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    # Ray reads these variables when it is imported, and when it prints a line of a worker.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _NOISE)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # As Ray's handler does after `ray.init`, raise an exception, so that contexts end and leases are released.
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return Ending(code=0, out=json.dumps(job()) + "\n")
    except KeyboardInterrupt:
        return Ending(code=EXIT_INTERRUPTED, err="Interrupted; the same command goes on from what was done.\n")
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:
            raise
        return Ending(code=EXIT_STOPPED, err="Stopped; the same command goes on from what was done.\n")
    except Exception as error:
        code = error.exit_code if isinstance(error, CnnrayError) else EXIT_FAILURE
        return Ending(code=code, err=_report(error, output))


def _stop(number: int, _: object) -> NoReturn:
    """Signal handler: end the job with an exception, once. Both processes of a job may get the same signal."""
    signal.signal(number, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(number)


def _report(error: Exception, output: str | None) -> str:
    """The sentence for an error.

    The trace goes into a log file, which the sentence names; an error that the package raised by itself has none, as
    it says all. Where no log file can be written, the trace comes before the sentence.
    """
    if isinstance(error, CnnrayError) and error.__cause__ is None:
        return f"Error: {error}\n"
    sentence = str(error) if isinstance(error, CnnrayError) else f"{type(error).__name__}: {cluster.last_line(error)}"
    text = (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, cnnray {cnnray.__version__}, Python "
        f"{platform.python_version()}, {platform.platform()}\n{shlex.join(sys.argv)}\n\n{cluster.full_trace(error)}"
    )
    log_file = _write_log(text, None if isinstance(error, TransientError) else output)
    return f"Error: {sentence} (The trace is in {log_file}.)\n" if log_file else f"{text}\nError: {sentence}\n"


def _write_log(text: str, output: str | None) -> str | None:
    """Write a log file into the output, or else into the temporary folder.

    Returns:
        Its name; None where neither can be written to.
    """
    for folder in (output, None):
        try:
            name = f"cnnray-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
            uri = storage.join(folder, LOG) if folder else storage.join(tempfile.gettempdir(), name)
            storage.write_bytes(uri, text.encode(errors="replace"))
            return uri
        except Exception:  # the error may be that of the storage itself
            continue
    return None
