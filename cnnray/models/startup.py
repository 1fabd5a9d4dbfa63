"""Importing TensorFlow and Keras without the lines that TensorFlow's libraries log before they read any setting."""

import contextlib
import importlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_LOG_LINES = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|[IW]\d{4} \d\d:|E\d{4} \d\d:.* failed call to cuInit"
    rb"|To enable the following instructions:"
)
"""Beginnings of lines about the machine; the one about cuInit says that it has no GPU."""


def load_tensorflow(*, gpus: bool = True) -> None:
    """Import TensorFlow and Keras, and let TensorFlow look for GPUs.

    What is written to stderr meanwhile, for several seconds, comes afterwards, without TensorFlow's own lines.

    Args:
        gpus: whether TensorFlow may use the GPUs visible to the process.
    """
    with _without_log_lines():
        import tensorflow as tf

        importlib.import_module("keras")
        if not gpus:
            tf.config.set_visible_devices([], "GPU")
        tf.config.list_physical_devices()
    logging.getLogger("tensorflow").setLevel(logging.WARNING)


def ensure_tensorflow() -> None:
    """Import TensorFlow and Keras if this process has not imported TensorFlow yet."""
    if "tensorflow" not in sys.modules:
        load_tensorflow()


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Hold stderr of the whole process back, and write it at the end, without lines of TensorFlow's libraries."""
    with tempfile.TemporaryFile() as held:
        try:
            with _redirected(held.fileno()):
                yield
        finally:
            held.seek(0)
            others = [line for line in held if not _LOG_LINES.match(line)]
            with contextlib.suppress(OSError), os.fdopen(os.dup(2), "wb") as stderr:
                stderr.writelines(others)


@contextlib.contextmanager
def suppress_stderr() -> Iterator[None]:
    """Discard stderr of the whole process, including output of native libraries. For programs only."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        with _redirected(devnull):
            yield
    finally:
        os.close(devnull)


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Let the file `target` take what this process and its libraries write to stderr."""
    numbers = {2}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # replaced by what is no file, or closed
        numbers.add(sys.stderr.fileno())
    originals = {number: os.dup(number) for number in numbers}
    for number in numbers:
        os.dup2(target, number)
    try:
        yield
    finally:
        for number, original in originals.items():
            os.dup2(original, number)
            os.close(original)
